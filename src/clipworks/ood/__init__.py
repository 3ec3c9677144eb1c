"""Images of none of the known classes: scores, rules that reject, a text tower that says no."""
