"""EdgeKit."""
