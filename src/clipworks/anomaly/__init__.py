"""Defects: detectors that learn from images of good parts or from words, and return a heat map for every image."""
