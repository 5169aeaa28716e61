"""What makes a resume another run, and that batches are told apart by their tokens alone."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest

from launch.config import SECTIONS, JobConfig
from launch.data.batches import Batches, SequenceSampler
from launch.data.corpus import Corpus
from launch.saving.checkpoint_names import removable
from launch.saving.resume_checks import (
    NEXT_BATCHES,
    another_learning_rate,
    batch_hash,
    check_acceptable,
    differences,
    next_batches,
    other_batch,
    refusal,
    settings,
    unlike_recent,
)
from model.config import SHAPE_KEYS

LENGTH, GLOBAL_BATCH = 16, 8


def job(**changes: dict[str, object]) -> JobConfig:
    sections: dict[str, dict[str, object]] = {
        "model": {
            "vocab_size": 256,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "data": {"source": "python_stdlib"},
        "optimizer": {"learning_rate": 0.01},
        "training": {"sequence_length": 64, "global_batch_size": 8, "max_steps": 10},
    }
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values
    return JobConfig.model_validate(sections)


def batches(dp_size: int, dp_rank: int, seed: int = 0, tokens: int = 3000) -> Batches:
    text = np.random.default_rng(5).integers(0, 200, tokens).astype(np.uint8)
    corpus = Corpus.from_documents("training", text, [len(text)], "fingerprint")
    return Batches(SequenceSampler(corpus, LENGTH, seed), GLOBAL_BATCH, 1, dp_size, dp_rank)


def test_a_jump_of_the_learning_rate_is_told() -> None:
    """Cosine from 0.01 at step 1 to 0.001 at step 10, halfway down at 5.5; twice as long, at 10.5."""
    there = settings(job())
    longer = settings(job(training={"max_steps": 20}))
    assert another_learning_rate(there, settings(job(optimizer={"weight_decay": 0.3})), 5) is None
    said = another_learning_rate(there, longer, 9)
    assert said is not None and said.startswith("the learning rate of step 10 is 1.00e-03 by the schedule there and ")
    assert float(said.split(" and ")[1].split()[0]) == pytest.approx(
        0.001 + 0.009 * (1 + math.cos(math.pi * 9 / 19)) / 2, rel=1e-2
    )
    assert another_learning_rate(longer, there, 10) is None, "nothing is left to train"
    tokens = {"max_steps": None, "max_tokens": 10 * 8 * 64}
    assert another_learning_rate(there, settings(job(training=tokens)), 5) is None, "the same length in other words"
    constant = settings(job(optimizer={"schedule": "constant"}))
    assert another_learning_rate(there, constant, 9) == (
        "the learning rate of step 10 is 1.00e-03 by the schedule there and 1.00e-02 by the one here"
    )


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_the_hash_is_of_the_tokens_that_the_ranks_train_on(dp_size: int) -> None:
    """Rebuilt from what each data-parallel rank is given: the next 20 batches are the same on every layout."""
    for step in range(30, 30 + NEXT_BATCHES):
        by_rank = [batches(dp_size, rank).micro_batches(step) for rank in range(dp_size)]
        digest = hashlib.blake2b(digest_size=16)
        for in_step in zip(*by_rank, strict=True):  # accumulation step by accumulation step, rank by rank
            for micro in in_step:
                digest.update(micro.input_ids.astype("<i8").tobytes() + micro.labels.astype("<i8").tobytes())
        assert batch_hash(batches(1, 0), step) == digest.hexdigest()


def test_ranks_share_the_hashing() -> None:
    whole = next_batches(batches(1, 0), 7, 0, 1)
    shared = [next_batches(batches(1, 0), 7, rank, 3) for rank in range(3)]
    assert {step: one for part in shared for step, one in part.items()} == whole
    assert sum(map(len, shared)) == len(whole) == NEXT_BATCHES


def test_the_first_other_batch_is_named() -> None:
    there = next_batches(batches(1, 0), 7, 0, 1)
    assert other_batch(there, dict(there)) is None
    other = next_batches(batches(1, 0, seed=1), 7, 0, 1)
    said = f"the batch of step 8 has hash {there['7'][:12]} there and {other['7'][:12]} here"
    assert other_batch(there, other) == said
    assert "step 27 " in str(other_batch(there, there | {"26": "0" * 32}))


def test_a_step_that_is_skipped_is_neither_read_nor_compared() -> None:
    whole, skips = batches(1, 0), replace(batches(1, 0), skipped=((9, 12), (27, 40)))
    shared = [next_batches(skips, 7, rank, 3) for rank in range(3)]
    here = {step: one for part in shared for step, one in part.items()}
    assert sorted(map(int, here)) == [7, *range(12, 26)] and sum(map(len, shared)) == len(here)
    there = next_batches(whole, 7, 0, 1)
    assert other_batch(there, here) is None and other_batch(here, there) is None
    assert "step 26 " in str(other_batch(there | {"8": "0" * 32, "25": "0" * 32}, here))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": {"rope_theta": 5e5}}, "model.rope_theta is 10000.0 there and 500000.0 here"),
        ({"training": {"sequence_length": 32}}, "training.sequence_length is 64 there and 32 here"),
        ({"model": {"full_attention_layers": (1,)}}, "model.full_attention_layers is [] there and [1] here"),
        ({"job": {"seed": 1}}, "job.seed is 0 there and 1 here"),
        ({"optimizer": {"betas": [0.9, 0.99]}}, "optimizer.betas is [0.9, 0.95] there and [0.9, 0.99] here"),
        ({"data": {"document_mask": True}}, "data.document_mask is False there and True here"),
    ],
)
def test_another_run_is_refused_unless_accepted(change: dict[str, dict[str, object]], expected: str) -> None:
    there, here = settings(job()), settings(job(**change))
    key = expected.split()[0]
    assert differences(there, here, ()) == ({key: expected}, [])
    kind = "model" if key.startswith("model.") else "run"
    assert refusal({key: expected}) == (
        f"{kind}: {expected}; give this {kind} another job.name, or, if the change is meant, name {key} in "
        "checkpoint.accept_changes"
    )
    check_acceptable([key, "data"])
    assert differences(there, here, (key,)) == ({}, [expected])


def test_another_shape_is_refused_and_never_offered_to_be_accepted() -> None:
    """Every key of the model that is compared either changes its tensors, or can be accepted."""
    there = settings(job())
    wider = settings(job(model={"hidden_size": 64, "rope_theta": 5e5}, optimizer={"eps": 1e-6}))
    refused, _ = differences(there, wider, ())
    assert refused.keys() == {"model.hidden_size", "model.head_dim", "model.rope_theta", "optimizer.eps"}
    assert refusal(refused) == (
        f"model: {'; '.join(refused.values())}; its tensors do not fit another shape: set model.hidden_size, "
        "model.head_dim back to go on, or give this model another job.name, under which it begins anew"
    )
    shapes = {f"model.{key}" for key in SHAPE_KEYS}
    check_acceptable([key for key in there if key.startswith("model.") and key not in shapes])
    for key in (*shapes, "model.init_from", "model.attention_backend", "optimizer.learning_rate"):
        with pytest.raises(ValueError, match=f"^{key} (cannot be accepted|is no key that a resume refuses)"):
            check_acceptable(["data", key])


def test_a_checkpoint_older_than_a_key_is_of_the_run_without_it() -> None:
    there = settings(job())
    del there["model.full_attention_layers"]
    assert differences(there, settings(job()), ()) == ({}, [])
    windowed = settings(job(model={"full_attention_layers": (1,)}))
    expected = {"model.full_attention_layers": "model.full_attention_layers is [] there and [1] here"}
    assert differences(there, windowed, ()) == (expected, [])


def test_steering_is_told_and_the_layout_is_not_compared() -> None:
    there = settings(job())
    steered = settings(job(optimizer={"learning_rate": 0.02, "warmup_steps": 2}, training={"max_steps": 20}))
    refused, told = differences(there, steered, ())
    assert not refused and len(told) == 3 and "optimizer.learning_rate is 0.01 there and 0.02 here" in told
    moved = job(
        parallel={"tensor_parallel_size": 2, "zero_stage": 1},
        training={"micro_batch_size": 2, "evaluation_interval": 5},
        model={"attention_backend": "math"},
        checkpoint={"save_interval": 5},
    )
    assert settings(moved) == there


def test_every_stored_key_is_a_key() -> None:
    for key in settings(job()):
        section, name = key.split(".")
        assert name in SECTIONS[section].model_fields


def test_a_first_loss_out_of_the_ordinary() -> None:
    recent = {"1": 2.4, "2": 2.2, "3": 2.3}
    assert unlike_recent(2.25, recent) is None and unlike_recent(2.0, recent) is None
    assert "is 5.4000, but the last 3 before the checkpoint lay between 2.2000 and 2.4000" in str(
        unlike_recent(5.4, recent)
    )
    assert unlike_recent(5.4, {}) is None
    near, far = (1.97, 2.63), (1.95, 2.65)  # a tenth of the highest away, where that is more than they lie apart
    assert [unlike_recent(loss, recent) is None for loss in (*near, *far)] == [True, True, False, False]
    assert unlike_recent(3.4, {"1": 1.0, "2": 2.2}) is None and unlike_recent(3.5, {"1": 1.0, "2": 2.2}) is not None


def test_retention_keeps_the_last_and_every_so_many() -> None:
    steps = [10, 20, 30, 40, 50, 60]
    assert removable(steps, 2) == [10, 20, 30, 40]
    assert removable(steps, 2, keep_every=30) == [10, 20, 40]
    assert removable(steps, 9) == []
