"""Reads a job file, and reports what is wrong with it."""
