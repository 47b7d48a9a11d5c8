"""What jobs/benchmark.py measures, a file for each section."""
