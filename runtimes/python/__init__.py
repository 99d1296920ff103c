"""The Python runtime: one engine over every backend."""
