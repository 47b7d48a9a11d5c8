"""Holds the sections of jobs/benchmark.py, one file each."""
