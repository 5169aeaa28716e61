"""What the ranks of a run fed to the model, kept beside it for `launch/audit_data.py`.

    RUN/data/cursor.json      the data cursor of the run's last start (`launch.data.cursor`)
    RUN/data/corpora.json     where each corpus lies that the run has ever drawn from: {"web": "data/web"}
    RUN/data/dp-00003.jsonl   a line for each step of data-parallel rank 3:
                              {"step": 13, "samples": 128, "digest": 9125043421838452801}

Steps count from 1 as in metrics.jsonl. A digest is the sum, modulo 2**64, of the digests of the samples that the rank
read, so the ranks' sums add up to the same number on every layout. A resume drops what was read after its checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from launch.atomic_files import write_atomically
from launch.data.batches import Sample
from launch.data.corpus import Int64
from launch.monitoring.step_lines import StepLines

WHOLE = 1 << 64


def total_digest(indices: Iterable[int], samples: Iterable[Sample]) -> int:
    """The sum that stands for these global samples, in whatever order."""
    return sum(sample.digest(index) for index, sample in zip(indices, samples, strict=True)) % WHOLE


class DataLog:
    """One data-parallel rank's file. A step is noted when it is read, which is one step before it is trained on."""

    def __init__(
        self, directory: Path, dp_rank: int, dp_size: int, resumed_from: int | None, tell: Callable[[str], None]
    ) -> None:
        """resumed_from: the step of the loaded checkpoint; None drops all that was noted before. `tell` hears of a disk
        that fails: the training goes on without the record."""
        self._directory, self._tell, self._resumed = directory, tell, resumed_from is not None
        self._file: StepLines | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = StepLines(directory / f"dp-{dp_rank:05d}.jsonl", resumed_from)
            for stale in directory.glob("dp-*.jsonl") if dp_rank == 0 else ():
                if int(stale.stem.removeprefix("dp-")) >= dp_size:  # of ranks that this layout has not
                    StepLines(stale, resumed_from).close()
        except OSError as error:
            self._give_up(error)

    def write_cursor(self, record: Mapping[str, Any], paths: Mapping[str, str]) -> None:
        """Replaces cursor.json, and adds to corpora.json the `paths` of the corpora, by name."""
        try:
            before = read_paths(self._directory) if self._resumed else {}
            write_atomically(self._directory / "corpora.json", json.dumps(before | dict(paths), indent=1))
            write_atomically(self._directory / "cursor.json", json.dumps(record, indent=1))
        except OSError as error:
            self._give_up(error)

    def note(self, step: int, indices: Int64, samples: list[Sample]) -> None:
        """Notes a step, counted from 0: see `launch.data.batches.Batches`."""
        if self._file is None:
            return
        entry = {"step": step + 1, "samples": len(samples), "digest": total_digest(indices.tolist(), samples)}
        try:
            self._file.append(entry)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up(self, error: OSError) -> None:
        self._file = None
        self._tell(f"the record of the data cannot be written any more ({error}); the job goes on without it")


def read_paths(directory: Path) -> dict[str, str]:
    """What corpora.json says; nothing where there is none, or none that can be parsed."""
    try:
        return {str(name): str(path) for name, path in json.loads((directory / "corpora.json").read_text()).items()}
    except (FileNotFoundError, ValueError, AttributeError):
        return {}
