"""Checkpoints: whole or not seen, on disk and in an object store."""
