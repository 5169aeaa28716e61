"""Fixtures that several files share, each from the helper that it belongs to."""

from tests.unit.slurm_stand_ins import slurm

__all__ = ["slurm"]
