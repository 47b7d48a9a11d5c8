"""Reads annotations: polygons and run lengths, in the forms of the tools that draw them.

To add a format, write its reader in a file of this folder, and name it in `READERS`.
"""
