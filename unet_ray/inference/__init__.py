"""Segment images with a trained network."""
