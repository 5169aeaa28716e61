"""What a run leaves behind: lines, a bar, TensorBoard events, metrics.jsonl; the arithmetic of throughput."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.config import JobConfig
from launch.monitoring.monitor import Monitor, StepRecord
from launch.monitoring.run_monitor import RunMonitor
from launch.monitoring.step_lines import StepLines
from launch.monitoring.throughput import Throughput, flops_per_token, peak_flops_per_second
from launch.sections.monitor import MonitorSection
from model.config import ModelConfig

CPU = Throughput(tokens_per_step=1000, devices=4, flops_causal=1e6, flops_full=2e6, peak_flops=None)
GPU = Throughput(tokens_per_step=1000, devices=4, flops_causal=1e6, flops_full=2e6, peak_flops=1e10)


def record(step: int, loss: float = 1.5, **more: Any) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        gradient_norm=0.75,
        learning_rate=1e-3,
        tokens=1000 * step,
        seconds=0.25,
        parts={"data": 0.01, "compute": 0.2, "optimizer": 0.04},
        **{"peak_memory_bytes": 1 << 30, "stragglers": {}, "extra": {}} | more,
    )


def run(directory: Path, throughput: Throughput = CPU, **more: Any) -> tuple[RunMonitor, io.StringIO]:
    stream = more.pop("stream", io.StringIO())
    return RunMonitor(directory, throughput=throughput, total_steps=100, stream=stream, **more), stream


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def events(directory: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(directory / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_tensorboard_holds_every_promised_scalar(tmp_path: Path) -> None:
    monitor, _ = run(tmp_path, GPU)
    monitor.text("configuration", "job:\n  name: run")
    slow = {"slowest_rank": 3.0, "slowest_over_median": 1.5, "straggler": 3.0}
    monitor.log_step(record(10, peak_memory_bytes=3 << 29, extra={"loss_scale": 1024.0}, stragglers=slow))
    monitor.log_validation(10, 2.0, {"conditional_bigram_entropy": 2.4})
    monitor.log_histograms(10, {"weights/embed_tokens": np.arange(10.0)})
    monitor.close()
    monitor.close()
    board = events(tmp_path)
    expected = {
        "train/loss": 1.5,
        "train/gradient_norm": 0.75,
        "train/learning_rate": 1e-3,
        "train/loss_scale": 1024.0,
        "validation/loss": 2.0,
        "validation/conditional_bigram_entropy": 2.4,
        "tokens/seen": 10_000,
        "time/step": 0.25,
        "time/data": 0.01,
        "time/compute": 0.2,
        "time/optimizer": 0.04,
        "throughput/tokens_per_second": 4000.0,
        "throughput/tokens_per_second_per_device": 1000.0,
        "throughput/mfu_causal": 0.1,  # 1000 tokens/s * 1e6 FLOP / 1e10 FLOP/s
        "throughput/mfu_full": 0.2,
        "memory/peak_gib": 1.5,
        **{f"stragglers/{name}": value for name, value in slow.items()},
    }
    assert set(board.Tags()["scalars"]) == set(expected)
    for tag, value in expected.items():
        [event] = board.Scalars(tag)
        assert (event.step, event.value) == (10, pytest.approx(value))
    [text] = board.Tensors("configuration/text_summary")
    assert text.tensor_proto.string_val[0] == b"    job:\n      name: run"
    assert board.Tags()["histograms"] == ["weights/embed_tokens"]


def test_metrics_read_back_bit_for_bit(tmp_path: Path) -> None:
    loss = math.nextafter(1 / 3, 1)
    monitor, _ = run(tmp_path, tensorboard=False)
    monitor.log_step(record(1, loss))
    monitor.log_validation(1, math.pi, {"conditional_bigram_entropy": math.e})
    monitor.log_step(record(2, math.inf))
    monitor.close()
    train, validation, overflow = metrics(tmp_path)
    assert train == {
        "step": 1,
        "loss": loss,
        "gradient_norm": 0.75,
        "learning_rate": 1e-3,
        "tokens": 1000,
        "seconds": 0.25,
        "seconds_data": 0.01,
        "seconds_compute": 0.2,
        "seconds_optimizer": 0.04,
        "tokens_per_second": 4000.0,
        "tokens_per_second_per_device": 1000.0,
        "peak_memory_bytes": 1 << 30,
    }
    assert validation == {"step": 1, "validation_loss": math.pi, "conditional_bigram_entropy": math.e}
    assert overflow["loss"] == "inf"  # JSON has no infinity
    assert not (tmp_path / "tensorboard").exists()


def test_resume_drops_later_entries_and_keeps_the_others(tmp_path: Path) -> None:
    monitor, _ = run(tmp_path)
    for step in range(1, 8):
        monitor.log_step(record(step, loss=float(step)))
        monitor.log_validation(step, 10.0 * step, {})
    monitor.close()
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)

    monitor, _ = run(tmp_path, resumed_from=4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:8])
    monitor.log_step(record(5, loss=-5.0))
    monitor.close()
    assert [(m["step"], m.get("loss")) for m in metrics(tmp_path) if "loss" in m][-2:] == [
        (4, 4.0),
        (5, -5.0),
    ]
    board = events(tmp_path)
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, -5),
    ]
    assert [e.step for e in board.Scalars("validation/loss")] == [1, 2, 3, 4]

    monitor, _ = run(tmp_path)  # a fresh start in the same folder
    monitor.log_step(record(1, loss=0.5))
    monitor.close()
    assert [m["loss"] for m in metrics(tmp_path)] == [0.5]
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("train/loss")] == [(1, 0.5)]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n[]\n{"step": 2, "loss": 1.5}\n{"step": 2, "validation_lo')
    file = StepLines(path, resumed_from=2)
    file.append({"step": 3, "loss": 1.0})
    file.close()
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3]
    assert not (tmp_path / "metrics.jsonl.partial").exists()


def test_without_a_terminal_one_line_a_record(tmp_path: Path) -> None:
    monitor, stream = run(tmp_path, GPU, tensorboard=False)
    monitor.advance(9)
    monitor.log_step(record(10, peak_memory_bytes=1 << 30))
    monitor.log_validation(10, 2.25, {"conditional_bigram_entropy": 2.4})
    monitor.close()
    assert stream.getvalue().splitlines() == [
        "step  10/100  loss 1.5000  gradient norm 0.750  learning rate 1.00e-03  4,000 tokens/s  0.250 s/step"
        "  MFU 10.0% causal, 20.0% full  peak 1.00 GiB",
        "step 10/100  validation loss 2.2500  conditional bigram entropy 2.4000",
    ]


def test_missing_mfu_is_said_once(tmp_path: Path) -> None:
    monitor, stream = run(tmp_path, CPU, tensorboard=False)
    for step in (1, 2):
        monitor.log_step(record(step))
    monitor.close()
    assert stream.getvalue().count("MFU") == 1
    assert "no peak FLOP/s is known" in stream.getvalue()


@pytest.mark.parametrize(("mode", "drawn"), [("auto", True), ("on", True), ("off", False)])
def test_progress_bar_on_a_terminal(tmp_path: Path, mode: str, drawn: bool) -> None:
    terminal = Terminal()
    monitor, _ = run(tmp_path, tensorboard=False, progress_bar=mode, stream=terminal, resumed_from=20)
    for step in (21, 22, 23):
        monitor.advance(step)
    monitor.log_step(record(23))
    monitor.message("a checkpoint was saved")
    monitor.close()
    shown = terminal.getvalue()
    assert "a checkpoint was saved\n" in shown
    assert ("23/100 [" in shown and "loss 1.5000, 4,000 tokens/s" in shown) == drawn
    assert ("learning rate" in shown) != drawn


def test_a_lost_disk_is_reported_once_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor, stream = run(tmp_path)

    def full(self: StepLines, entry: dict[str, float]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StepLines, "append", full)
    monitor.log_step(record(1))
    monitor.log_step(record(2))
    monitor.close()
    [complaint] = [line for line in stream.getvalue().splitlines() if "No space" in line]
    assert complaint.startswith("metrics.jsonl cannot be written any more")
    assert [e.step for e in events(tmp_path).Scalars("train/loss")] == [1, 2]


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as stream:
        monitor, _ = run(tmp_path, stream=stream)
        monitor.log_step(record(1))
        monitor.message("saved")
        monitor.close()
        with pytest.raises(OSError, match="No space left"):
            stream.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or closing would raise, too
    assert capsys.readouterr().err.count("standard output cannot be written ([Errno 28] No space left") == 1
    assert [entry["step"] for entry in metrics(tmp_path)] == [1]


def test_a_silent_monitor_takes_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monitor = Monitor()
    monitor.advance(1)
    monitor.log_step(record(1))
    monitor.log_validation(1, 2.0, {})
    monitor.log_histograms(1, {})
    monitor.text("layout", "tp 2")
    monitor.message("hello")
    monitor.close()
    assert list(tmp_path.iterdir()) == []
    public = {name for name in vars(RunMonitor) if not name.startswith("_")}
    assert public == {name for name in vars(Monitor) if not name.startswith("_")}


def config(**more: Any) -> ModelConfig:
    shape: dict[str, Any] = {
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return ModelConfig(**shape | more)


def test_flops_per_token_by_hand() -> None:
    # q and o 8x8, k and v 8x4, three of 8x12; times 3 layers; head 8x10
    matrices = 3 * (64 + 64 + 32 + 32 + 3 * 96) + 80
    assert flops_per_token(config(), 16, causal=False) == 6 * matrices + 12 * 3 * 8 * 16
    assert flops_per_token(config(), 16, causal=True) == 6 * matrices + 12 * 3 * 8 * 8.5
    assert flops_per_token(config(tie_word_embeddings=True), 16, causal=True) == flops_per_token(
        config(), 16, causal=True
    )
    windowed = config(sliding_window=5)
    visible = sum(min(i, 5) for i in range(1, 17)) / 16
    assert flops_per_token(windowed, 16, causal=True) == 6 * matrices + 12 * 3 * 8 * visible
    assert flops_per_token(windowed, 16, causal=False) == 6 * matrices + 12 * 3 * 8 * 5
    assert flops_per_token(config(sliding_window=99), 16, causal=True) == flops_per_token(config(), 16, causal=True)
    mixed = config(sliding_window=5, full_attention_layers=(0, 2))
    assert flops_per_token(mixed, 16, causal=True) == 6 * matrices + 12 * 8 * (2 * 8.5 + visible)
    assert flops_per_token(mixed, 16, causal=False) == 6 * matrices + 12 * 8 * (2 * 16 + 5)


def test_flops_of_llama_3_8b_are_six_times_its_matrices_plus_attention() -> None:
    llama = ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    parameters = 8_030_261_248  # of the published checkpoint
    norms, embedding = 65 * 4096, 128256 * 4096
    attention = 12 * 32 * 4096 * 8192
    assert flops_per_token(llama, 8192, causal=False) == 6 * (parameters - norms - embedding) + attention


def test_throughput_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    job = JobConfig.from_yaml(f"""
model: {config().model_dump_json()}
data: {{source: indexed, blend: [{{path: unused}}]}}
optimizer: {{learning_rate: 0.01}}
training: {{sequence_length: 16, global_batch_size: 8, max_steps: 1}}
""")
    throughput = Throughput.of_job(job, 2, torch.device("cuda", 0))
    assert Throughput.of_job(job, 2, torch.device("cpu")) == dataclasses.replace(throughput, peak_flops=None)
    told = job.model_copy(update={"monitor": MonitorSection(peak_tflops=0.25)})
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        assert Throughput.of_job(told, 2, device) == dataclasses.replace(throughput, peak_flops=0.25e12)
    rates = throughput.rates(0.5)
    assert rates["tokens_per_second"] == 256
    assert rates["tokens_per_second_per_device"] == 128
    assert rates["mfu_full"] == pytest.approx(128 * flops_per_token(config(), 16, causal=False) / 989e12)
    assert rates["mfu_causal"] < rates["mfu_full"]


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835e12),
        ("NVIDIA GH200 480GB", "bf16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA GB200", "bf16", 2500e12),
        ("NVIDIA H20", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("cpu", "bf16", None),
    ],
)
def test_peak_of_a_device(name: str, precision: str, peak: float | None) -> None:
    assert peak_flops_per_second(name, precision) == peak
