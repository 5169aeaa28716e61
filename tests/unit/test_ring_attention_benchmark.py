"""benchmarks/ring_attention.py: what it enters, merges, leaves out and divides, and that its contestants agree."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, create_mask

import attention_blocks
from attention_contest import results as book
from attention_contest.contestants import Stage, auto_name, our_contestants
from attention_contest.measure import Inputs, Measurement, attention_and_rest, covered, measure_row
from attention_contest.peers import block_mask, peers
from attention_contest.reference import sampled_attention
from attention_contest.report import all_tables, bars_table, grid_table
from attention_contest.rows import (
    ANCHOR,
    HEAD_DIM,
    IDEAL,
    ONE_GPU,
    RING_FLASH_ATTN,
    TORCH,
    Bar,
    Row,
    all_rows,
    bars,
    document_lengths,
)
from model.kernels import KERNELS, AttentionMask, Documents
from ring_attention import wanted_rows
from tests.differentiable import attention
from tests.distributed.harness import run_distributed

ROW = Row(32, 8, 16384)


def mode(milliseconds: float, ours: bool = True) -> dict[str, Any]:
    errors = dict.fromkeys(("out", "dq", "dk", "dv"), 1e-3)
    times = {"forward": milliseconds / 4, "forward_backward": milliseconds, "kernels": 1.0, "exposed": 0.5}
    return {**times, "peak_gib": 1.0, "errors": errors, "ours": ours}


def entry(row: Row = ROW, kernel: str = "flash_attn_4", **modes: Any) -> book.Entry:
    named = {name.replace("_", " "): value for name, value in modes.items()}
    return {"row": vars(row), "kernel": kernel, "gpus": 2, "modes": named}


def filled(run: str, *entries: book.Entry) -> book.Results:
    results: book.Results = {"runs": {}, "rows": {}}
    for one in entries:
        book.add(results, run, {"gpus": 2, "gpu": "a GPU", "torch": "2"}, one)
    return results


# -- what is entered ---------------------------------------------------------------------------------------------------


def test_runs_merge_by_row_and_are_never_mixed(tmp_path: Path) -> None:
    slow = filled("1", entry(**{ONE_GPU: mode(100), "exchange": mode(60)}))
    fast = filled("2", entry(**{ONE_GPU: mode(80), "exchange": mode(50)}), entry(ANCHOR, **{ONE_GPU: mode(13)}))
    together = book.merged([slow, fast, slow])
    assert set(together["runs"]) == {"1", "2"} and len(together["rows"]) == 2
    shares = {run: book.share_of_ideal(one, "exchange") for run, one in book.runs_of(together, ROW, "flash_attn_4")}
    assert shares == {"2": pytest.approx(40 / 50), "1": pytest.approx(50 / 60)}
    book.save(together, tmp_path / "results.json")
    assert book.load(tmp_path / "results.json") == together
    assert book.load(tmp_path / "none.json") == {"runs": {}, "rows": {}}


def test_a_row_is_left_out_once_one_run_has_measured_all_that_is_wanted() -> None:
    results = book.merged(
        [
            filled("1", entry(exchange=mode(60), ring=mode(70))),
            filled("2", entry(heads=mode(60), peer={"failed": "no"})),
        ]
    )
    assert book.measured(results, ROW, "flash_attn_4", ["exchange", "ring"])
    assert book.measured(results, ROW, "flash_attn_4", ["heads", "peer"]), "a failure is not tried again"
    assert not book.measured(results, ROW, "flash_attn_4", ["exchange", "heads"]), "no run had both"
    assert not book.measured(results, ROW, "flash_attn_2", ["exchange"])
    assert not book.measured(results, ANCHOR, "flash_attn_4", ["exchange"])


def options(**changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"set": "grid", "rows": "", "kernel": None, "shard": "1/1"} | changed)


def test_shards_cover_the_grid_once_and_each_begins_with_the_anchor() -> None:
    shards = [wanted_rows(options(shard=f"{index}/3")) for index in (1, 2, 3)]
    assert all(shard[0] == (ANCHOR, "flash_attn_4") for shard in shards)
    rest = [pair for shard in shards for pair in shard[1:]]
    assert len(rest) == len(set(rest)) == len(all_rows()) - 1
    assert {row for row, _ in rest} | {ANCHOR} == set(all_rows())


def test_every_bar_is_a_row_that_the_bars_run_measures() -> None:
    chosen = wanted_rows(options(set="bars"))
    assert set(chosen) == {(bar.row, bar.kernel) for bar in bars()}
    assert {kernel for _, kernel in wanted_rows(options(set="bars", kernel="flash_attn_2"))} == {"flash_attn_2"}
    assert [row for row, _ in wanted_rows(options(rows="window 1024"))][1:] == [
        r for r in all_rows() if r.window == 1024
    ]


# -- what is divided ---------------------------------------------------------------------------------------------------


def test_shares_and_bars() -> None:
    one = entry(**{ONE_GPU: mode(100), "exchange": mode(52), "heads": mode(55)})
    one["modes"]["torch context_parallel (cuDNN, allgather)"] = mode(65, ours=False)
    one["modes"]["torch context_parallel (cuDNN, alltoall)"] = mode(60, ours=False)
    one["modes"]["another peer"] = mode(40, ours=False)
    ideal, against_torch, unmet = (Bar(ROW, "flash_attn_4", rival, 1, 1) for rival in (IDEAL, TORCH, RING_FLASH_ATTN))
    assert book.reached(one, ideal) == (pytest.approx(50 / 52), "exchange", IDEAL)
    peer = "torch context_parallel (cuDNN, alltoall)"
    assert book.reached(one, against_torch) == (pytest.approx(60 / 52), "exchange", peer)
    assert book.reached(one, unmet) is None
    assert book.reached(one, ideal, "heads") == (pytest.approx(50 / 55), "heads", IDEAL)
    table = bars_table(filled("1", one))
    assert "96.2% (missed)" in table and table.count("not measured") == len(bars()) - 1


def test_what_auto_takes_is_a_contestant() -> None:
    for row in all_rows():
        for ranks in (2, 4):
            stage = Mock(row=row, kernel="math", ranks=ranks)
            with patch("attention_contest.contestants.graphs_run", return_value=False):
                assert auto_name(row, ranks) in our_contestants(stage), row
    assert auto_name(ROW, 1) is None


def test_flops_count_the_visible_pairs() -> None:
    for row in (Row(3, 1, 40), Row(3, 1, 40, 7), Row(3, 1, 600, 0, 1), Row(3, 1, 600, 50, 2), Row(1, 1, 5, 99)):
        bounds, pairs = row.boundaries(2), 0
        for start, end in zip(bounds, bounds[1:], strict=False):
            for query in range(start, end):
                pairs += sum(query - key < (row.window or math.inf) for key in range(start, query + 1))
        assert row.flops(2) == 4 * 3 // (3 if row.heads == 1 else 1) * HEAD_DIM * pairs
    one = entry(**{ONE_GPU: mode(100), "exchange": mode(50)})
    assert book.tflops(one, "exchange") == book.tflops(one, ONE_GPU) == pytest.approx(3.5 * ROW.flops(2) / 0.1 / 1e12)


def test_documents_are_long_tailed_and_the_same_everywhere() -> None:
    lengths = document_lengths(2**20, 1)
    assert sum(lengths) == 2**20 and lengths == document_lengths(2**20, 1) != document_lengths(2**20, 2)
    ordered = sorted(lengths)
    assert 800 < ordered[len(ordered) // 2] < 1300 and 1700 < sum(lengths) / len(lengths) < 2600
    assert document_lengths(32768, 1)[:4] == [2123, 1007, 4485, 3464], "published figures stand for these documents"


def test_covered_time_counts_what_overlaps_once() -> None:
    assert covered([(0, 2), (1, 3), (1.5, 2), (5, 6)]) == 4
    assert covered([]) == 0


def test_exposed_time_is_what_the_profiled_repetitions_spend_without_attention() -> None:
    forward, backward = "void flash_fwd_kernel<x>", "kernel_cutlass_FlashAttentionBackwardSm90"
    alone = [(forward, 10.0, 13.0), (backward, 13.0, 20.0)] * 2 + [(forward, 20.0, 23.0), (backward, 23.0, 30.0)]
    assert attention_and_rest(alone) == (20, 0), "one GPU, one kernel after the other"
    copies = [("Memcpy DtoD", 8.0, 11.0), ("add_shares", 19.5, 20.5), ("Memcpy DtoD", 30.0, 30.5)]
    assert attention_and_rest(alone + copies) == (20, 2.5), "beside a kernel nothing is exposed"
    waiting = [(forward, 10.0, 13.0), (backward, 15.0, 20.0)]
    assert attention_and_rest(waiting) == (8, 2), "a GPU without work is"
    assert attention_and_rest(copies) is None


# -- what is told ------------------------------------------------------------------------------------------------------


def test_tables_hold_every_run_and_mode() -> None:
    results = book.merged(
        [
            filled("1", entry(**{ONE_GPU: mode(100), "exchange": mode(60)}, peer={"failed": "ImportError: no"})),
            filled("2", entry(**{ONE_GPU: mode(100), "exchange": mode(50), "theirs": mode(80, ours=False)})),
        ]
    )
    text = all_tables(results)
    assert text.count("## 32/8 heads, 16k") == 2 and "- peer: ImportError: no" in text
    assert "| 83.3% |" in text and "| 100.0% |" in text
    assert "| exchange | 100.0% | theirs | 62.5% |" in grid_table(results)
    newer = filled("3", entry(**{ONE_GPU: mode(100), "exchange": mode(80)}))
    assert "| exchange | 62.5% | theirs | 62.5% |" in grid_table(book.merged([results, newer])), (
        "each in its newest run"
    )


# -- what is measured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "bounds"), [(None, [0, 96]), (9, [0, 96]), (None, [0, 1, 40, 96]), (20, [0, 50, 96])]
)
def test_the_reference_is_attention_with_a_gradient_at_a_few_queries(window: int | None, bounds: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v, dout = (torch.randn(1, 96, heads, 16, generator=generator) for heads in (4, 2, 2, 4))
    at = torch.tensor([0, 3, 39, 40, 95])
    sparse = torch.zeros_like(dout)
    sparse[:, at] = dout[:, at]
    for tensor in (q, k, v):
        tensor.requires_grad_()
    mask = AttentionMask(window=window, documents=Documents.from_boundaries(bounds, "cpu"))
    out = attention(q, k, v, kernel=KERNELS["math"], scale=0.25, mask=mask)
    out.backward(sparse)
    assert q.grad is not None and k.grad is not None and v.grad is not None
    expected = out[0, at], q.grad[0, at], k.grad[0], v.grad[0]
    with torch.no_grad():
        found = sampled_attention(q[0, at], k[0], v[0], dout[0, at], at, scale=0.25, window=window, boundaries=bounds)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _measured() -> dict[str, Any]:
    found = {}
    for row in (Row(4, 2, 128), Row(4, 2, 256, 9), Row(4, 2, 256, 0, 8)):
        masked = bool(row.window or row.documents)
        stage = Stage.of_world(row, "math" if masked else "cpu", torch.device("cpu"))
        ours, others = our_contestants(stage), peers(replace(stage, kernel="flash_attn_4")) if masked else {}
        two_rounds = patch("attention_contest.measure.ROUNDS", 2)  # of numbers that nobody looks at
        with two_rounds, patch("attention_contest.peers._flex_attention", lambda: _dense):
            found[row.name] = measure_row(stage, ours | others | {"a peer": _broken}, set(ours), repetitions=1)
    # A contestant that computes something else is told from the right ones by its error.
    stage = Stage.of_world(Row(4, 2, 64), "cpu", torch.device("cpu"))
    right = our_contestants(stage)["exchange"]()
    wrong = type(right)(stage.contiguous(), right.attend)
    measurement = Measurement("wrong", wrong, Inputs(stage))
    dist.all_reduce(measurement.squares)
    found["wrong"] = (measurement.squares[:, 0] / measurement.squares[:, 1]).sqrt().tolist()
    return found


def test_blocks_go_to_the_first_free_multiprocessor_in_the_order_of_issue() -> None:
    equal, count = [10] * 3, attention_blocks.MULTIPROCESSORS
    assert attention_blocks.last_to_end(equal * 44) == 10 + attention_blocks.OVERHEAD, "one whole wave"
    assert attention_blocks.last_to_end(equal * 44 + [10]) == 2 * (10 + attention_blocks.OVERHEAD)
    assert attention_blocks.last_to_end([1] * count + [50]) == 51 + 2 * attention_blocks.OVERHEAD
    assert attention_blocks.last_to_end([50] + [1] * count) == 50 + attention_blocks.OVERHEAD, "the longest first"
    assert list(attention_blocks.in_sections([3, 1], 3, 2)) == [3, 3, 1, 1, 3, 1]
    assert [attention_blocks.fitting(2**20 * size) for size in (8, 16, 17, 60)] == [4, 2, 2, 1]
    for (heads, c), measured in attention_blocks.MEASURED.items():
        modelled = attention_blocks.shares(heads, c, 0, in_turns=False)
        assert all(abs(one - other) < 3 for one, other in zip(modelled, measured, strict=True)), (heads, c)


def _dense(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, scale: float, enable_gqa: bool) -> Tensor:
    """What FlexAttention computes, which has no backward on CPUs."""
    mask = create_mask(block_mask.mask_mod, 1, 1, query.shape[2], key.shape[2], device="cpu")
    return functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)


def test_the_mask_of_flex_attention_is_made_as_by_looking_at_every_pair() -> None:
    """In all its blocks, for documents and windows, in any order of blocks."""
    length = 1536
    for seed in range(8):
        random = Random(seed)
        bounds = sorted({0, length, *(random.randrange(length) for _ in range(random.choice((0, 3, 20)))), 256 * seed})
        blocks, window = list(torch.arange(length).split(128)), random.choice((None, 1, 128, 129, 300))
        random.shuffle(blocks)
        keys = torch.cat(blocks)
        queries = keys[: length // 2]
        document = torch.searchsorted(torch.tensor(bounds), torch.arange(length), right=True)

        def visible(
            batch: Tensor, head: Tensor, query: Tensor, key: Tensor, at: Any = (queries, keys, document, window)
        ) -> Tensor:
            queries, keys, document, window = at
            query, key = queries[query], keys[key]
            seen = (key <= query) & (document[key] == document[query])
            return seen if window is None else seen & (query - key < window)

        found = block_mask(queries, keys, bounds, window, torch.device("cpu"))
        expected = create_block_mask(visible, 1, 1, len(queries), length, device="cpu")
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), (seed, name)
        assert torch.equal(found.to_dense(), expected.to_dense()), seed
        pairs = torch.arange(len(queries))[:, None], torch.arange(length)
        nothing = torch.tensor(0)
        assert torch.equal(found.mask_mod(nothing, nothing, *pairs), expected.mask_mod(nothing, nothing, *pairs)), seed


def _broken() -> Any:
    raise ImportError("not installed")


def test_contestants_take_turns_and_agree_with_fp32() -> None:
    found = run_distributed(_measured, 2)[0]
    wrong = found.pop("wrong")
    assert min(wrong) > 0.1
    for row, modes in found.items():
        assert modes.pop("a peer") == {"failed": "ImportError: not installed"}
        if (flex := modes.pop(f"{TORCH}, FlexAttention", None)) or "window" in row or "documents" in row:
            assert flex and "failed" not in flex, flex
            assert not flex["ours"] and max(flex["errors"].values()) < 2e-2, (row, flex)
        assert set(modes) == {ONE_GPU, "heads, 1 group", "exchange", "exchange, balanced cut", "zigzag ring"}, row
        for name, result in modes.items():
            assert result["forward_backward"] > 0 and result["ours"]
            assert max(result["errors"].values()) < 1e-2, (row, name, result["errors"])
