"""The text of a job file, and what is wrong with it."""
