"""What each context-parallel rank is handed of a micro-batch."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from launch.config import load_job
from launch.data.batches import MicroBatch
from launch.feed import Cutter
from parallel.mesh import MeshShape
from parallel.sequence import balanced_parts, causal_parts, zigzag_parts

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
S = 64
DOCUMENTS = (0, 5, 40, S, S + 20, S + 23, 2 * S)
"""Of two rows."""


@pytest.mark.parametrize(("mode", "mask"), [("exchange", True), ("exchange", False), ("ring", True)])
def test_rows_are_cut_as_their_documents_balance_for_an_exchange_only(mode: str, mask: bool) -> None:
    overrides = [f"training.sequence_length={S}", "parallel.context_parallel_size=2", "training.micro_batch_size=2"]
    overrides += [f"parallel.context_parallel_mode={mode}", f"data.document_mask={str(mask).lower()}"]
    job, shape = load_job(CONFIG, overrides), MeshShape(1, 2, 1)
    inputs = np.arange(2 * S).reshape(2, S)
    batch = MicroBatch(inputs, inputs + 1000, inputs + 2000, DOCUMENTS if mask else None)
    for rank in (0, 1):
        mesh = Mock(shape=shape, cp_size=2, cp_rank=rank)
        local = Cutter.of(job, mesh, torch.device("cpu")).cut(batch)
        assert local.boundaries == batch.boundaries and local.token_count == S
        for row, documents in enumerate(([0, 5, 40, S], [0, 20, 23, S])):
            parts = balanced_parts(S, 2, documents) if mode == "exchange" and mask else zigzag_parts(S, 2)
            positions = np.concatenate([np.arange(start, stop) for start, stop in parts[rank]])
            for tokens, full in zip(local.tokens, (batch.input_ids, batch.position_ids, batch.labels), strict=True):
                np.testing.assert_array_equal(tokens[row].numpy(), full[row, positions])
    assert balanced_parts(S, 2, [0, 5, 40, S]) != zigzag_parts(S, 2) != balanced_parts(S, 2, [0, 20, 23, S])


@pytest.mark.parametrize(("window", "full", "cut_by"), [("null", [], None), ("40", [], 40), ("40", [0], None)])
def test_sequences_without_documents_are_cut_as_an_exchange_attends(
    window: str, full: list[int], cut_by: int | None
) -> None:
    overrides = ["training.sequence_length=4096", "parallel.context_parallel_size=2", "training.micro_batch_size=2"]
    overrides += ["parallel.context_parallel_mode=exchange", f"model.sliding_window={window}"]
    overrides += [f"model.full_attention_layers={full}"]
    job, shape = load_job(CONFIG, overrides), MeshShape(2, 2, 1)
    inputs = np.arange(8192).reshape(2, 4096)
    heads = 2 * job.model.num_attention_heads // 2  # of two rows, on one of two tensor-parallel ranks
    parts = causal_parts(4096, 2, heads, cut_by)
    others = [causal_parts(4096, 2, count, cut_by) for count in (heads // 2, 2 * heads)]
    assert parts != zigzag_parts(4096, 2) and (parts in others) == (cut_by is not None)
    for rank in (0, 1):
        mesh = Mock(shape=shape, cp_size=2, cp_rank=rank)
        local = Cutter.of(job, mesh, torch.device("cpu")).cut(MicroBatch(inputs, inputs, inputs, None))
        expected = np.concatenate([inputs[:, start:stop] for start, stop in parts[rank]], axis=1)
        np.testing.assert_array_equal(local.tokens[0].numpy(), expected)
