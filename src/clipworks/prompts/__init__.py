"""Learned inputs of frozen towers: contexts in words, tokens among the patches. See `common` for what they share."""
