"""Finds, pairs, splits, decodes, caches and writes images and masks."""
