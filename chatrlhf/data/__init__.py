"""Rows on disk, how they are rendered, and how they become tokens."""
