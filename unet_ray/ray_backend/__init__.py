"""Holds all code that uses Ray."""
