"""Writes report.html, and shows the progress of a command."""
