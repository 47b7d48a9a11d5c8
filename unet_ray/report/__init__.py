"""report.html, and what a command shows while it works."""
