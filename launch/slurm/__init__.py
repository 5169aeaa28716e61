"""Slurm: the script of a job, its ranks, and what a submission leaves behind."""
