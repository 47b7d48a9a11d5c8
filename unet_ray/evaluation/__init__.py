"""Score a model."""
