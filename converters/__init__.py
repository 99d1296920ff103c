"""Converters: checkpoints in, programs out."""
