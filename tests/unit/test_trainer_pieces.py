"""The small parts around the training loop: feeding, timing, the launcher's environment, prompts."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tokenizers
import torch

from launch.config import JobConfig
from launch.data.batches import Batches, MicroBatch
from launch.data.encoders import encoder_of
from launch.environment import DeviceUnavailable, Place, choose_device, place_in_world, report_failure
from launch.feed import Cutter
from launch.monitoring.timing import StepClock, StepTimer
from launch.saving.checkpoint_records import Progress
from launch.step_outcome import StepOutcome
from launch.stepper import Stepper
from launch.trainer import NonFiniteLoss, Trainer
from model.kernels.linear_cross_entropy import IGNORED_LABEL

WORLD = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# -- feed ----------------------------------------------------------------------------------------------------------


def micro_batch(rows: int, length: int, boundaries: tuple[int, ...] | None = None) -> MicroBatch:
    ids = np.arange(rows * length, dtype=np.int64).reshape(rows, length)
    labels = np.where(ids % 3 == 0, IGNORED_LABEL, ids + 1000)
    return MicroBatch(ids, labels, np.tile(np.arange(length), (rows, 1)), boundaries)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_the_ranks_of_a_sequence_share_a_batch_without_loss(cp_size: int) -> None:
    batch = micro_batch(2, 16)
    parts = [Cutter(cp_size, rank).cut(batch) for rank in range(cp_size)]
    assert sum(part.token_count for part in parts) == int((batch.labels != IGNORED_LABEL).sum())
    for part in parts:
        ids, positions, labels, documents = part.to(torch.device("cpu"))
        assert ids.shape == (2, 16 // cp_size) and documents is None
        # Position tells which column of the whole batch this is; all three arrays must agree on it.
        for row in range(2):
            assert torch.equal(ids[row], torch.from_numpy(batch.input_ids[row])[positions[row]])
            assert torch.equal(labels[row], torch.from_numpy(batch.labels[row])[positions[row]])
    seen = np.sort(np.concatenate([part.tokens[0].numpy().ravel() for part in parts]))
    assert np.array_equal(seen, batch.input_ids.ravel())


def test_documents_of_the_whole_sequences_go_to_every_rank() -> None:
    boundaries = (0, 5, 16, 19, 32)
    for rank in range(2):
        part = Cutter(2, rank).cut(micro_batch(2, 16, boundaries))
        documents = part.to(torch.device("cpu")).documents
        assert documents is not None and documents.boundaries == boundaries and documents.max_seqlen == 13


# -- timing --------------------------------------------------------------------------------------------------------


def test_step_timer_gives_means_and_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 4.0, 10.0, 13.0, 14.0, 20.0, 22.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    timer = StepTimer(torch.device("cpu"))
    for _ in range(2):
        timer.start()
        timer.mark("data")
        timer.mark("compute")
    assert timer.collect() == {"data": 2.0, "compute": 2.0}  # (1 + 3) / 2 and (3 + 1) / 2; 6 s between steps left out
    assert timer.collect() == {}
    timer.start()
    timer.mark("data")
    assert timer.collect() == {"data": 2.0}


def test_step_clock_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 6.0, 8.0, 10.0, 110.0, 118.0, 121.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    clock = StepClock()
    for _ in range(4):
        clock.count()
    with clock.paused():  # from 6 to 8
        pass
    with clock.paused():  # from 10 to 110
        pass
    assert clock.read() == 4.0  # 118 s less 2 and 100, over four steps
    clock.count()
    assert clock.read() == 3.0


# -- environment ---------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No launcher's variables; whatever the test sets is undone."""
    before = dict(os.environ)
    for name in (*LAUNCHER, "DS_ACCELERATOR"):
        os.environ.pop(name, None)
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)


def test_place_without_a_launcher_is_a_world_of_one(bare: pytest.MonkeyPatch) -> None:
    assert place_in_world() == Place(rank=0, local_rank=0, world_size=1, local_size=1)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and os.environ["MASTER_PORT"] == "0"
    assert place_in_world() == Place(0, 0, 1, 1)  # reading twice is reading once


@pytest.mark.parametrize("local", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
def test_place_as_the_launcher_says(bare: pytest.MonkeyPatch, local: str) -> None:
    os.environ.update(WORLD | {local: "4"})
    assert place_in_world() == Place(
        rank=5, local_rank=1, world_size=8, local_size=4, master_address="node-1", master_port=29500
    )


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8, but MASTER_ADDR is not set; start the job by deepspeed, torchrun or srun"),
        (WORLD | {"WORLD_SIZE": "all"}, "WORLD_SIZE=all, but WORLD_SIZE is 'all', no number"),
        (WORLD | {"RANK": ""}, "WORLD_SIZE=8, but RANK is not set"),
        (WORLD | {"MASTER_PORT": "29500/tcp"}, "MASTER_PORT is '29500/tcp', no number"),
        (WORLD | {"RANK": "8"}, "WORLD_SIZE=8 and RANK=8, LOCAL_SIZE=1 and LOCAL_RANK=1; ranks count from 0"),
        (WORLD | {"LOCAL_SIZE": "1"}, "LOCAL_SIZE=1 and LOCAL_RANK=1; ranks count from 0"),
    ],
)
def test_variables_that_describe_no_world(
    bare: pytest.MonkeyPatch, variables: dict[str, str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ.update(variables)
    with pytest.raises(SystemExit) as ended:
        place_in_world()
    assert ended.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "gpus", "device", "note"),
    [
        ("auto", 0, "cpu", "CPU with gloo: 0 GPUs for 4 processes on this node"),
        ("auto", 3, "cpu", "CPU with gloo: 3 GPUs for 4 processes on this node"),
        ("auto", 4, "cuda:2", "GPUs with NCCL: 4 GPUs for 4 processes on this node"),
        ("cuda", 8, "cuda:2", "GPUs with NCCL: job.device is cuda"),
        ("cpu", 8, "cpu", "CPU with gloo: job.device is cpu"),
    ],
)
def test_the_device_and_why(bare: pytest.MonkeyPatch, wanted: str, gpus: int, device: str, note: str) -> None:
    set_device = Mock()
    bare.setattr(torch.cuda, "device_count", lambda: gpus)
    bare.setattr(torch.cuda, "set_device", set_device)
    assert choose_device(wanted, Place(6, 2, 8, 4)) == (torch.device(device), note)
    assert os.environ["DS_ACCELERATOR"] == device.split(":")[0]
    assert [call.args for call in set_device.call_args_list] == ([(2,)] if "cuda" in device else [])


def test_missing_gpus_are_told_with_both_numbers(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(torch.cuda, "device_count", lambda: 2)
    expected = (
        r"job.device is cuda, but this node has 2 GPUs for 4 processes; start fewer processes,? or set job.device"
    )
    with pytest.raises(DeviceUnavailable, match=expected):
        choose_device("cuda", Place(0, 0, 4, 4))


@pytest.mark.parametrize(
    ("place", "speaks", "waits"),
    [
        (Place(0, 0, 8, 4), True, False),
        (Place(1, 1, 8, 4), False, True),
        (Place(4, 0, 8, 4), True, True),  # the first of another node
        (Place(5, 1, 8, 4), False, True),
    ],
)
def test_a_failure_is_told_once_a_node_and_by_rank_0_first(
    place: Place, speaks: bool, waits: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept = Mock()
    monkeypatch.setattr(time, "sleep", slept)
    report_failure("too bad", place)
    assert slept.called is waits
    assert capsys.readouterr().err == ("too bad\n" if speaks else "")


# -- text ----------------------------------------------------------------------------------------------------------


def test_bytes_go_out_and_come_back() -> None:
    tokenizer = encoder_of("bytes")
    text = "def naïve(): return '∑'\n"
    assert tokenizer.prompt(text) == list(text.encode()) and tokenizer.decode(tokenizer.prompt(text)) == text
    assert tokenizer.decode([0x61, 0xE2, 0x88]) == "a\ufffd"  # a character cut short
    assert tokenizer.decode([0x61, 300, 0x62]) == "ab"  # rows of the vocabulary beyond the bytes
    assert tokenizer.prompt("") == []


def test_a_prompt_begins_as_a_document_does(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[BOS]": 0, "one": 1, "two": 2}, unk_token="[BOS]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["[BOS]"])
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[BOS] $A [BOS]", special_tokens=[("[BOS]", 0)]
    )
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = encoder_of(str(tmp_path / "tokenizer.json"))
    assert tokenizer.prompt("two one") == [0, 2, 1], "and does not end as one"
    assert tokenizer.prompt("") == [0]
    assert tokenizer.decode([0, 2, 1]) == "two one"


# -- a run that is complete, and one that fails -----------------------------------------------------------------------


def small_job(run: Path) -> JobConfig:
    return JobConfig.from_yaml(f"""
job: {{run_directory: {run}}}
model: {{vocab_size: 256, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1,
  num_key_value_heads: 1}}
data: {{source: python_stdlib}}
optimizer: {{learning_rate: 1e-3}}
training: {{sequence_length: 8, global_batch_size: 1, max_steps: 3}}
""")


@pytest.mark.parametrize("done", [3, 5])
def test_a_complete_run_is_neither_trained_nor_evaluated_again(
    done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    job = small_job(tmp_path)
    stepper, monitor, checkpoints = Mock(), Mock(), Mock()
    trainer = Trainer(
        job, stepper, Batches(Mock(), 1, 1, 1, 0), Mock(), {}, monitor, checkpoints, lambda: False, Mock(), None
    )
    reached = trainer.run(Progress(step=done, tokens=8 * done))
    assert reached.step == done
    monitor.message.assert_called_once()
    assert f"step {done} of 3: this run is already complete" in monitor.message.call_args.args[0]
    monitor.log_validation.assert_not_called()  # metrics.jsonl would have the last evaluation twice
    stepper.evaluate.assert_not_called()
    checkpoints.save.assert_not_called()


def test_the_weights_that_failed_are_not_offered_after_skipped_steps_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 1201 follows step 1000, whose checkpoint holds what it failed with."""
    for name, does in {"get_rank": lambda: 0, "get_world_size": lambda: 1, "all_reduce": lambda flags: None}.items():
        monkeypatch.setattr(f"torch.distributed.{name}", does)
    stepper, checkpoints = Mock(), Mock()
    stepper.is_sound.return_value, stepper.engine.device = False, torch.device("cpu")
    checkpoints.outcome.return_value, checkpoints.steps.return_value = None, [950, 1000]
    batches = Batches(Mock(), 1, 1, 1, 0, skipped=((1001, 1200),))
    trainer = Trainer(
        small_job(tmp_path), stepper, batches, Mock(), {}, Mock(), checkpoints, lambda: False, Mock(), None
    )
    nan = torch.tensor(float("nan"))
    with pytest.raises(NonFiniteLoss, match=f"Last good checkpoint: step-00000950 in .*{tmp_path} --step 950 goes"):
        trainer._check_finite(StepOutcome(1201, applied=True, loss=nan, local_loss=nan, grad_norm=nan))


# -- what came of a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("applied", "scaler", "loss", "norm", "sound"),
    [
        (True, {}, 2.0, 1.0, True),
        (True, {}, math.nan, 1.0, False),
        (True, {}, 2.0, math.inf, False),
        (True, {"cur_scale": 1024.0}, 2.0, math.inf, False),
        (False, {"cur_scale": 1024.0}, 2.0, math.inf, True),
        (False, {"cur_scale": 1024.0}, math.inf, math.inf, False),
        (False, {}, 2.0, math.nan, False),
    ],
)
def test_only_a_loss_scaler_makes_a_skipped_step_right(
    applied: bool, scaler: dict[str, float], loss: float, norm: float, sound: bool
) -> None:
    stepper = Mock(engine=Mock(loss_scaler_state=scaler))
    assert Stepper.is_sound(stepper, Mock(applied=applied, loss=loss, grad_norm=norm)) is sound


@pytest.mark.parametrize("norm", [0.75, torch.tensor(0.75), torch.tensor(0.75, dtype=torch.float64)])
def test_numbers_of_a_step(norm: float | torch.Tensor) -> None:
    loss, local_loss = torch.tensor(2.5), torch.tensor(10.0)
    outcome = StepOutcome(3, applied=True, loss=loss, local_loss=local_loss, grad_norm=norm)
    local_loss += 1  # later steps use the memory again
    assert (outcome.loss, outcome.local_loss, outcome.grad_norm) == (2.5, 10.0, 0.75)
