"""Public operators."""
