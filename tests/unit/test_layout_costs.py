"""What layouts move, as docs/parallelism.md counts it."""

from __future__ import annotations

from benchmarks.layout_costs import DOCUMENT, exchange_payload
from launch.config import load_job
from launch.memory import formulas
from parallel.exchange_plan import exchange_plan
from parallel.sequence import chunk_starts
from workload import CONFIG


def test_the_exchange_moves_what_its_plan_says() -> None:
    """For more ranks than a test of processes can afford: the plan's own count of fetched keys, mean over the ranks."""
    model = load_job(CONFIG).model
    for size in (2, 4, 8):
        length = 64 * size
        assert len(chunk_starts(length, size, 0)) == 2
        fetched = sum(exchange_plan(length, size, rank).received_tokens for rank in range(size)) / size
        keys = 2 * fetched * model.num_key_value_heads * model.head_dim * model.num_hidden_layers * 2
        moved = exchange_payload(model, length // size, 2, tp=1, cp=size, checkpointing=False)
        assert moved == keys * (3 if size > 2 else 2)


def test_the_page_holds_the_formulas_that_a_check_prints() -> None:
    block = formulas.block_formula(qk_norm=False, sequence_parallel=False, tiled=False, compiled=False)
    kept = [formulas.kept_formula(policy, False, False) for policy in ("selective", "attention", "full")]
    work = (formulas.HEAD_FORMULA, formulas.EXCHANGE_FORMULA, formulas.RING_FORMULA, formulas.HEADS_FORMULA)
    page = DOCUMENT.read_text()
    assert not [formula for formula in (block, *kept, *work) if f"| {formula} |" not in page]
