"""Scores models."""
