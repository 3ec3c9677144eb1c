"""Ranking, linking and comparing images and texts: queries, re-ranking, record linkage, differences of sets."""
