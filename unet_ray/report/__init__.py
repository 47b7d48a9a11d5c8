"""report.html, and what a run shows while it goes."""
