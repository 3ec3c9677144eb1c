"""Embedding collections: what `embed` writes and search reads."""

import os

# LanceDB's library logs to stderr that it makes a new table; errors still come as exceptions
os.environ.setdefault("LANCEDB_LOG", "error")
