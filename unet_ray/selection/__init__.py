"""Chooses which images to label next."""
