"""Slurm: the job script, ranks that srun starts, and the files of a submission."""
