"""The benchmark: every method on features, on any labelled set, by the field's protocols."""
