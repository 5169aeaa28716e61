"""Checkpoints: any layout continues from any other's, nothing half-written or damaged is ever loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.checkpoint_ranks import (
    NO_SPACE,
    NOT_SEEN,
    SAVED_AT,
    Layout,
    Written,
    cross_each_other,
    fail_saves,
    follow_saves,
    look_at,
    lose_the_connection,
    progress_at,
    read,
    refusals,
    resume,
    save_often,
    write,
)
from tests.distributed.checkpoint_states import assemble, check_working_copies
from tests.distributed.harness import run_distributed

LAYOUTS = [
    Layout(1, 1, 1, 0),
    Layout(1, 1, 1, 3),
    Layout(2, 1, 1, 1),
    Layout(1, 2, 1, 3),
    Layout(1, 1, 2, 2),
    Layout(2, 1, 2, 0),
    Layout(2, 2, 1, 3),
    Layout(1, 2, 2, 1),
    Layout(1, 4, 1, 2),
    Layout(2, 1, 1, 3, "bf16"),
    Layout(1, 1, 2, 0, "bf16"),
    Layout(2, 2, 1, 1, "bf16"),
    Layout(2, 1, 2, 2, "bf16"),
    Layout(2, 1, 1, 2, "fp16"),
    Layout(1, 1, 2, 3, "fp16"),
]
"""tp x cp x dp, ZeRO stage, precision: each axis with and without a partner, each stage, each precision."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def written(folder: Path) -> dict[Layout, list[Written]]:
    """Each layout's uninterrupted run, rank by rank; its checkpoint is in folder/LAYOUT."""
    runs: dict[Layout, list[Written]] = {}
    for world_size in (1, 2, 4):
        layouts = [layout for layout in LAYOUTS if layout.world_size == world_size]
        by_rank = run_distributed(write, world_size, layouts, folder)
        runs |= {layout: list(ranks) for layout, ranks in zip(layouts, zip(*by_rank, strict=True), strict=True)}
    return runs


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], where: str) -> None:
    assert one.keys() == other.keys(), where
    different = [key for key in one if not np.array_equal(one[key], other[key])]
    assert not different, (where, different)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_continues_from_every_other(
    world_size: int, written: dict[Layout, list[Written]], folder: Path
) -> None:
    layouts = [layout for layout in LAYOUTS if layout.world_size == world_size]
    sources = {layout: [layout, *(other for other in LAYOUTS[::-1] if other != layout)] for layout in layouts}
    directories = [[folder / str(source) for source in sources[layout]] for layout in layouts]
    by_rank = run_distributed(read, world_size, layouts, directories)
    for layout, by_source in zip(layouts, zip(*by_rank, strict=True), strict=True):
        for source, ranks in zip(sources[layout], zip(*by_source, strict=True), strict=True):
            pair = f"{source} read by {layout}"
            states = [rank.loaded for rank in ranks]
            assert_same(assemble(states), assemble([rank.saved for rank in written[source]]), pair)
            check_working_copies(states, layout.precision, layout.stage)
            if layout.precision == source.precision:
                scalers = [state.loss_scaler for state in states]
                assert scalers == [written[source][0].saved.loss_scaler] * len(states), pair
                assert bool(scalers[0]) == (layout.precision == "fp16")
            assert {state.step_count for state in states} == {SAVED_AT}, pair
            assert all(rank.progress == progress_at(SAVED_AT) for rank in ranks), pair
            assert all(rank.numbers == ranks[0].numbers for rank in ranks), pair
            expected = written[source][0].numbers
            if source == layout:
                assert ranks[0].numbers == expected, pair
                ended = [rank.ended for rank in ranks if rank.ended]
                assert_same(assemble(ended), assemble([rank.ended for rank in written[source]]), pair)
            elif ranks[0].numbers:
                same_arithmetic = layout.precision == source.precision == "fp32"
                tolerance = 1e-5 if same_arithmetic else 2e-2
                np.testing.assert_allclose(ranks[0].numbers, expected, rtol=tolerance, err_msg=pair)


PAIR = Layout(1, 1, 2, 3)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1, 2 and 3, written by two ranks. Copy it before changing it."""
    directory = tmp_path_factory.mktemp("three") / "checkpoints"
    run_distributed(save_often, PAIR.world_size, PAIR, directory, [1, 2, 3], False)
    return directory


def test_retention_and_leftovers(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    killed_save = directory / "step-00000002.partial"
    killed_removal = directory / "step-00000000.partial"
    for leftover in (killed_save, killed_removal):
        leftover.mkdir(parents=True)
        (leftover / "__0_0.distcp").write_bytes(b"junk of a killed save")
    (directory / "notes.txt").write_text("not ours")
    seen = run_distributed(save_often, 2, PAIR, directory, [1, 2, 4, 5, 6], True, 2, 4)[0]
    assert seen == [[1], [1, 2], [2, 4], [4, 5], [4, 5, 6]]
    assert sorted(path.name for path in directory.iterdir()) == [
        "notes.txt",
        "step-00000004",
        "step-00000005",
        "step-00000006",
    ]
    assert run_distributed(resume, 2, PAIR, [(directory, "auto")]) == [[6], [6]]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_object_store(tmp_path: Path, asynchronous: bool) -> None:
    location = f"bucket://{tmp_path}/run"
    killed_save = tmp_path / "run" / "step-00000003"
    killed_save.mkdir(parents=True)
    (killed_save / "__0_0.distcp").write_bytes(b"junk of a killed save")
    seen = run_distributed(save_often, 2, PAIR, location, [1, 2, 4], asynchronous, 2)
    assert seen == [[[1], [1, 2], [2, 4]]] * 2
    assert not killed_save.exists() and not (tmp_path / "run" / "step-00000001").exists()
    assert run_distributed(resume, 2, PAIR, [(location, "auto")]) == [[4], [4]]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def replace_text(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    return change


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("__1_0.distcp", truncate, "__1_0.distcp has "),
    ("__0_0.distcp", flip_a_bit, "__0_0.distcp does not match its CRC-32"),
    (".metadata", flip_a_bit, ".metadata does not match its CRC-32"),
    ("__0_0.distcp", Path.unlink, "__0_0.distcp is missing"),
    (".metadata", Path.unlink, ".metadata is missing"),
    ("manifest.json", Path.unlink, "manifest.json cannot be read ([Errno 2] No such file or directory"),
    ("manifest.json", truncate, "manifest.json cannot be read (Expecting"),
    ("manifest.json", lambda path: path.write_bytes(b"\xff\x00"), "manifest.json cannot be read ("),
    ("manifest.json", lambda path: path.write_text("[]"), "manifest.json cannot be read (not a JSON object"),
    (
        "manifest.json",
        replace_text('"optimizer_steps": 3', '"optimizer_steps": 7'),
        "manifest.json cannot be read (it does not match its own CRC-32)",
    ),
    ("manifest.json", replace_text('"format": 2', '"format": 3'), "format 3, this program reads 2"),
]


def test_damage_is_refused_by_name_and_the_previous_one_offered(three: Path, tmp_path: Path) -> None:
    attempts: list[tuple[Path, dict[str, Any]]] = []
    for number, (name, damage, _) in enumerate(DAMAGES):
        directory = Path(shutil.copytree(three, tmp_path / str(number)))
        damage(directory / "step-00000003" / name)
        attempts.append((directory, {}))
    two_damaged = Path(shutil.copytree(three, tmp_path / "two"))
    all_damaged = Path(shutil.copytree(three, tmp_path / "all"))
    for step in (3, 2):
        truncate(two_damaged / f"step-0000000{step}" / ".metadata")
    for step in (3, 2, 1):
        truncate(all_damaged / f"step-0000000{step}" / ".metadata")
    untouched = Path(shutil.copytree(three, tmp_path / "untouched"))
    by_rank = run_distributed(refusals, 2, PAIR, [*attempts, (two_damaged, {}), (all_damaged, {}), (untouched, {})])
    assert by_rank[0] == by_rank[1]
    *said, said_two, said_all, said_untouched = by_rank[0]
    for (directory, _), (_, _, expected), message in zip(attempts, DAMAGES, said, strict=True):
        assert message is not None, expected
        assert message.startswith(f"checkpoint {directory}/step-00000003 is damaged: "), message
        assert expected in message
        assert message.endswith("; go back to the newest sound one: python launch/rollback.py RUN --step 2"), message
    assert said_two.endswith("; go back to the newest sound one: python launch/rollback.py RUN --step 1")
    assert "there is no sound one; move step-00000001, step-00000002, step-00000003 away to start again" in said_all
    assert said_untouched is None


def test_another_model_or_corpus_is_refused_with_the_difference(three: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"settings": {"model.hidden_size": 64, "model.qk_norm": False}},
        {"settings": {"optimizer.betas": [0.8, 0.9]}},
        {"data_seed": 1},
        {"settings": {"optimizer.betas": [0.8, 0.9]}, "accept_changes": ("optimizer.betas",)},
        {"data_seed": 1, "accept_changes": ("data",)},
        {},
    ]
    said = run_distributed(refusals, 2, PAIR, [(three, change) for change in changes])
    assert said[0] == said[1]
    other_model, other_betas, other_order, *accepted, same = said[0]
    assert f"{three}/step-00000003 is of another model: model.hidden_size is 32 there and 64 here; " in other_model
    assert "model.qk_norm is True there and False here; its tensors do not fit another shape: set " in other_model
    assert "accept_changes" not in other_model
    assert "step-00000003 is of another run: optimizer.betas is [0.9, 0.95] there and [0.8, 0.9] here" in other_betas
    there = json.loads((three / "step-00000003" / "manifest.json").read_text())["next_batches"]["3"][:12]
    assert f"step-00000003 would go on with other data: the batch of step 4 has hash {there} there and " in other_order
    assert accepted == [None, None]
    assert same is None


def test_resume_never_and_required(three: Path, tmp_path: Path) -> None:
    empty = tmp_path / "checkpoints"
    only_partial = tmp_path / "partial" / "checkpoints"
    (only_partial / "step-00000002.partial").mkdir(parents=True)
    repaired = Path(shutil.copytree(three, tmp_path / "repaired"))
    truncate(repaired / "step-00000003" / ".metadata")
    (repaired / "step-00000003").rename(repaired / "damaged-3")  # as the refusal says
    attempts = [
        (repaired, "auto"),
        (three, "auto"),
        (three, "required"),
        (three, "never"),
        (empty, "auto"),
        (empty, "never"),
        (empty, "required"),
        (only_partial, "auto"),
    ]
    got = run_distributed(resume, 2, PAIR, attempts)
    assert got[0] == got[1]
    before, auto, required, never, fresh, fresh_never, nothing, nothing_whole = got[0]
    assert (before, auto, required, fresh, fresh_never, nothing_whole) == (2, 3, 3, None, None, None)
    assert f"checkpoint.resume is never, but {three} holds checkpoints that a fresh run would overwrite" in never
    assert f"checkpoint.resume is required, but {empty} holds no complete checkpoint" in nothing


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_save_is_told_on_every_rank_and_costs_nothing(tmp_path: Path, asynchronous: bool) -> None:
    directory = tmp_path / "checkpoints"
    writing = "torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data"
    faults = [
        (0, "launch.saving.storage.LocalStorage.begin"),
        (0, writing),
        (1, writing),
        (1, "torch.distributed.checkpoint.filesystem.FileSystemWriter.prepare_local_plan"),
        (0, "torch.distributed.checkpoint.filesystem.FileSystemWriter.finish"),
        (1, "os.fsync"),
        (1, "launch.saving.resume_checks.batch_hash"),
        (0, "launch.saving.storage.LocalStorage.written_size"),
        (0, "launch.saving.storage.LocalStorage.complete"),
    ]
    # Each node's own disk in place of a shared one: what rank 1 wrote is nowhere to be seen.
    every = [
        *((*fault, NO_SPACE) for fault in faults),
        (0, "launch.saving.storage.LocalStorage.written_size", NOT_SEEN),
    ]
    by_rank = run_distributed(fail_saves, 2, PAIR, directory, every, asynchronous)
    assert by_rank[0] == by_rank[1]
    first, *failed, last = by_rank[0]
    assert first == ("", ["step-00000001"])
    for step, ((culprit, moment, broken), (said, left)) in enumerate(zip(every, failed, strict=True), start=2):
        expected = f"checkpoint {directory}/step-{step:08d} could not be written: rank {culprit}: "
        why = (
            "was written but cannot be seen from rank 0; all nodes must share" if broken is NOT_SEEN else str(NO_SPACE)
        )
        assert said.startswith(expected) and why in said, (moment, said)
        assert left == ["step-00000001"], moment
    assert last == ("", ["step-00000001", f"step-{len(every) + 2:08d}"])


def test_an_unforeseen_error_of_the_writing_thread_reaches_the_training_thread(tmp_path: Path) -> None:
    assert run_distributed(lose_the_connection, 1, Layout(1, 1, 1, 0), tmp_path) == ["Connection closed by peer"]


def test_the_outcome_is_that_of_all_ranks_and_of_all_that_was_to_be_done(tmp_path: Path) -> None:
    by_rank = run_distributed(follow_saves, 2, PAIR, tmp_path)
    assert by_rank[0] == by_rank[1]
    none, early, path, after, stayed, load = by_rank[0]
    assert (none, early, path, after) == (None, None, f"{tmp_path}/step-00000001", None)
    assert stayed == f"checkpoint {tmp_path}/step-00000002 is complete, but an older one stayed: rank 0: {NO_SPACE}"
    assert load == f"checkpoint {tmp_path}/step-00000002 could not be loaded: rank 1: another shape"


def test_the_threads_that_train_and_that_write_never_hear_each_other() -> None:
    assert run_distributed(cross_each_other, 2) == [(["training"] * 2, ["writing"] * 2)] * 2


def test_a_place_that_cannot_be_written_is_told_before_the_first_step(tmp_path: Path) -> None:
    """By every rank, also where only one of them cannot, or writes to another node's disk than rank 0 sees."""
    shared, own, file, full = (tmp_path / name for name in ("shared", "own", "file", "full"))
    (own / "step-probe.partial").mkdir(parents=True)  # as if rank 1 had made its own: nothing but rank 0 sees the lack
    file.touch()
    ranks = run_distributed(look_at, 2, [[shared, shared], [shared, own], [shared, file], [file, file], [shared, full]])
    assert [bool(said) for said in ranks[0]] == [bool(said) for said in ranks[1]] == [False, True, True, True, True]
    fine, elsewhere, one, both, no_space = ranks[0]
    assert fine == "" and list(shared.iterdir()) == []
    assert f"{shared}: rank 0: [Errno 2] No such file or directory: '{shared}/step-probe.partial/rank-1'" in elsewhere
    assert f"rank 1: [Errno 20] Not a directory: '{file}/step-probe.partial/rank-1'; give checkpoint.directory" in one
    assert f"checkpoints could not be written to {file}: rank 0: " in both
    assert f"checkpoints could not be written to {shared}: rank 1: {NO_SPACE}; give" in no_space
