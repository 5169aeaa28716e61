"""Fixtures that several files share, each from the helper that it belongs to."""

from tests.unit.prepared_texts import small_blocks, tokenizer
from tests.unit.slurm_stand_ins import slurm

__all__ = ["slurm", "small_blocks", "tokenizer"]
