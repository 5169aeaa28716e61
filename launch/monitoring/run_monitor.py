"""Writes a run's reports to the terminal, TensorBoard and metrics.jsonl."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from launch.monitoring.monitor import Monitor, StepRecord
from launch.monitoring.step_lines import StepLines
from launch.monitoring.throughput import Throughput

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


_LOG = "standard output"


class RunMonitor(Monitor):
    """Writes under run_directory: metrics.jsonl, and TensorBoard events in tensorboard/.

    A sink that fails to write (a full disk) is given up with one message: monitoring never stops a training.
    """

    def __init__(
        self,
        run_directory: Path,
        *,
        throughput: Throughput,
        total_steps: int,
        resumed_from: int | None = None,
        progress_bar: Literal["auto", "on", "off"] = "auto",
        tensorboard: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        """resumed_from: the step of the loaded checkpoint; what an earlier run wrote after it is dropped, in
        metrics.jsonl and in what TensorBoard shows. None drops everything earlier.

        progress_bar: auto draws one when `stream` (default: standard output) is a terminal; otherwise log_step prints a
        line.
        """
        self._throughput = throughput
        self._total_steps = total_steps
        self._stream = stream or sys.stdout
        self._first_step = resumed_from or 0
        self._bar = self._make_bar(progress_bar)
        self._metrics: StepLines | None = None
        self._writer: SummaryWriter | None = None
        self._lost: set[str] = set()
        self._attempt("metrics.jsonl", lambda: self._open_metrics(run_directory, resumed_from))
        if tensorboard:
            self._attempt("TensorBoard", lambda: self._open_tensorboard(run_directory, resumed_from))
        if throughput.peak_flops is None:
            self.message(
                "MFU is left out: no peak FLOP/s is known for this device and precision; monitor.peak_tflops gives one"
            )

    def _open_metrics(self, run_directory: Path, resumed_from: int | None) -> None:
        run_directory.mkdir(parents=True, exist_ok=True)
        self._metrics = StepLines(run_directory / "metrics.jsonl", resumed_from)

    def _open_tensorboard(self, run_directory: Path, resumed_from: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import; only the rank that writes pays

        purge = 0 if resumed_from is None else resumed_from + 1
        self._writer = SummaryWriter(str(run_directory / "tensorboard"), purge_step=purge)

    def _make_bar(self, progress_bar: str) -> Any:
        if progress_bar == "off" or (progress_bar == "auto" and not self._stream.isatty()):
            return None
        return tqdm(total=self._total_steps, initial=self._first_step, unit="step", file=self._stream)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log_step(self, record: StepRecord) -> None:
        rates = self._throughput.rates(record.seconds)
        values: dict[str, tuple[str, float | int]] = {  # name in metrics.jsonl: tag in TensorBoard
            "loss": ("train/loss", record.loss),
            "gradient_norm": ("train/gradient_norm", record.gradient_norm),
            "learning_rate": ("train/learning_rate", record.learning_rate),
            "tokens": ("tokens/seen", record.tokens),
            "seconds": ("time/step", record.seconds),
            **{f"seconds_{part}": (f"time/{part}", value) for part, value in record.parts.items()},
            **{name: (f"throughput/{name}", value) for name, value in rates.items()},
            **{name: (f"stragglers/{name}", value) for name, value in record.stragglers.items()},
            **{name: (f"train/{name}", value) for name, value in record.extra.items()},
        }
        entry = {"step": record.step, **{name: value for name, (_, value) in values.items()}}
        entry["peak_memory_bytes"] = record.peak_memory_bytes
        scalars = {**dict(values.values()), "memory/peak_gib": record.peak_memory_bytes / 2**30}
        self._write(record.step, entry, scalars)
        if self._bar is None:
            self.message(self._line(record, rates))
        else:
            self._bar.set_postfix_str(f"loss {record.loss:.4f}, {rates['tokens_per_second']:,.0f} tokens/s")

    def _line(self, record: StepRecord, rates: Mapping[str, float]) -> str:
        fields = [
            f"step {record.step:>{len(str(self._total_steps))}}/{self._total_steps}",
            f"loss {record.loss:.4f}",
            f"gradient norm {record.gradient_norm:.3f}",
            f"learning rate {record.learning_rate:.2e}",
            f"{rates['tokens_per_second']:,.0f} tokens/s",
            f"{record.seconds:.3f} s/step",
        ]
        if "mfu_causal" in rates:
            fields.append(f"MFU {rates['mfu_causal']:.1%} causal, {rates['mfu_full']:.1%} full")
        fields.append(f"peak {record.peak_memory_bytes / 2**30:.2f} GiB")
        return "  ".join(fields)

    def log_validation(self, step: int, loss: float, extra: Mapping[str, float]) -> None:
        scalars = {f"validation/{name}": value for name, value in extra.items()}
        self._write(step, {"step": step, "validation_loss": loss, **extra}, {"validation/loss": loss, **scalars})
        beside = "".join(f"  {name.replace('_', ' ')} {value:.4f}" for name, value in extra.items())
        self.message(f"step {step}/{self._total_steps}  validation loss {loss:.4f}{beside}")

    def log_histograms(self, step: int, values: Mapping[str, npt.ArrayLike]) -> None:
        def add(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_histogram(name, np.asarray(value), step)

        self._to_tensorboard(add)

    def text(self, tag: str, text: str) -> None:
        block = "\n".join("    " + line for line in text.splitlines())  # Markdown's preformatted text
        self._to_tensorboard(lambda writer: writer.add_text(tag, block, self._first_step))

    def message(self, text: str) -> None:
        try:
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
                self._stream.flush()
            else:
                print(text, file=self._stream, flush=True)
        except OSError as error:  # tried again with the next line: a full disk under the log may be emptied
            if _LOG not in self._lost:
                self._lost.add(_LOG)
                with suppress(OSError):  # it may be the same file
                    print(f"{_LOG} cannot be written ({error}); the job goes on", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._metrics is not None:
            self._attempt("metrics.jsonl", self._metrics.close)
            self._metrics = None
        self._to_tensorboard(lambda writer: writer.close())
        self._writer = None

    def _write(self, step: int, entry: Mapping[str, float | int], scalars: Mapping[str, float | int]) -> None:
        metrics = self._metrics
        if metrics is not None:
            self._attempt("metrics.jsonl", lambda: metrics.append(entry))

        def add(writer: SummaryWriter) -> None:
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, step)
            writer.flush()  # what was logged survives a kill

        self._to_tensorboard(add)

    def _to_tensorboard(self, action: Callable[[SummaryWriter], None]) -> None:
        writer = self._writer
        if writer is not None:
            self._attempt("TensorBoard", lambda: action(writer))

    def _attempt(self, sink: str, action: Callable[[], None]) -> None:
        if sink in self._lost:
            return
        try:
            action()
        except OSError as error:
            self._lost.add(sink)
            self.message(f"{sink} cannot be written any more ({error}); the job goes on without it")
