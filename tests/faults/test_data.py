"""Blended corpora under the real command: killed and moved, steered at the resume, damaged while it trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from launch import audit_data
from launch.data.indexed_writer import IndexedWriter
from tests.faults.forked import Forked
from tests.faults.launched import TinyJob

pytestmark = pytest.mark.faults


def corpora(folder: Path) -> None:
    for seed, name in enumerate(("web", "code", "books")):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 90, 80)
        writer = IndexedWriter(folder / name, np.dtype("<u2"))
        writer.write(rng.integers(0, 256, lengths.sum()), lengths)
        writer.finish()


def blended(folder: Path, **weights: float) -> list[str]:
    entries = ", ".join(f"{{path: {folder / name}, weight: {weight}}}" for name, weight in weights.items())
    return ["data.source=indexed", "data.files=[]", f"data.blend=[{entries}]", "data.document_mask=true"]


def test_killed_and_moved_with_corpora_added_reweighted_and_left_out_nothing_is_repeated_or_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpora(tmp_path)
    tiny = TinyJob(tmp_path, max_steps=60)

    def lost_at(step: int, *overrides: str) -> None:
        fault = {"rank": 0, "event": "os.mkdir", "path": f"step-{step:08d}.partial", "action": "kill"}
        with Forked(tiny, 2, *overrides, fault=fault) as job:
            job.until_said("fault: rank 0")
            job.lose([0, 1], noticed_after=0)

    lost_at(9, *blended(tmp_path, web=0.7, code=0.3))
    moved = "parallel.tensor_parallel_size=2"
    lost_at(25, *blended(tmp_path, web=0.1, books=0.5, code=0.4), moved)
    said = tiny.finish(2, *blended(tmp_path, books=0.3, code=0.7))
    assert "resumed from step " in said and "corpus books: " in said and "corpus web: " not in said
    capsys.readouterr()
    status = audit_data.main([str(tiny.run)])
    told = capsys.readouterr().out
    assert status == 0, told
    assert "steps 1 to 60: 240 samples" in told and told.count("from step ") == 3
    assert all(f"corpus {name}: " in told for name in ("web", "code", "books")) and "only counted" not in told
    assert "1 epoch of " in told or "2 epochs of " in told  # the steps saw a corpus whole, and began it again


def files_of(tiny: TinyJob) -> dict[Path, bytes]:
    """What a run has that must not be lost."""
    paths = [*tiny.checkpoints.rglob("*"), *(tiny.run / "data").iterdir(), tiny.run / "metrics.jsonl"]
    return {path: path.read_bytes() for path in paths if path.is_file()}


def test_bad_corpora_at_a_resume_are_one_error_each_and_lose_nothing(tmp_path: Path) -> None:
    corpora(tmp_path)
    tiny = TinyJob(tmp_path, max_steps=4)
    blend = [*blended(tmp_path, web=1), f"data.blend=[{{path: '{tmp_path}/[cw]*', name: all}}]"]  # code and web
    with Forked(tiny, 1, *blend, "training.max_steps=2") as job:
        assert job.wait() == 0, job.output[-8000:]
    index, tokens = tmp_path / "web.idx", tmp_path / "web.bin"
    version = index.read_bytes()[:9] + b"\2" + index.read_bytes()[10:]
    token = tokens.read_bytes()[:2000] + b"\0\1" + tokens.read_bytes()[2002:]
    damages: list[tuple[Path, bytes | None, str, str]] = [
        (tokens, tokens.read_bytes()[:-3], "", "web.bin: cut short, "),
        (index, version, "", "web.idx: an index of version 2, this program reads version 1; write the corpus again"),
        (
            tokens,
            token,
            "",
            "web: the token id 256 is beyond model.vocab_size (256); set model.vocab_size to at least 257",
        ),
        (tokens, None, "", "web: web.bin missing (the other is there)"),
        (tmp_path / "web.summary.json", b"{}", "", "web.summary.json: cannot be read ('tokens'); delete it"),
        (
            tokens,
            tokens.read_bytes(),
            "model.hidden_size=64",
            "is of another model: model.hidden_size is 32 there and 64",
        ),
    ]
    before = files_of(tiny)
    for path, damaged, override, complaint in damages:
        sound = path.read_bytes()
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with Forked(tiny, 1, *blend, *filter(None, [override])) as job:
            assert job.wait() == 1, job.output[-8000:]
            assert complaint in job.output and job.output.count("error: ") == 1, job.output[-8000:]
            assert "Traceback" not in job.output
        path.write_bytes(sound)
        assert files_of(tiny) == before, complaint
    with Forked(tiny, 1, *blend) as job:
        assert job.wait() == 0, job.output[-8000:]
        assert "resumed from step 2, " in job.output
    assert tiny.complete() == [2, 3, 4]


def test_a_corpus_that_is_damaged(tmp_path: Path) -> None:
    corpora(tmp_path)
    tiny = TinyJob(tmp_path, max_steps=2000, checkpoint={"save_interval": 0})
    with tiny.launch(2, *blended(tmp_path, web=0.7, code=0.3)) as job:
        job.until(lambda: tiny.logged() >= 2)
        with open(tmp_path / "web.bin", "r+b") as file:
            file.write(b"\xff" * (tmp_path / "web.bin").stat().st_size)
        assert job.wait() == 1, job.output[-8000:]
        said = job.output
    assert (
        f"error: {tmp_path}/web, token " in said and "the token id 65535 is beyond model.vocab_size (256); set" in said
    )
    # Two replicas, which read apart: where one has nothing damaged to read, it tells how it lost the other.
    assert "CorpusError" not in said and 1 <= said.count("error: ") <= 2, said[-8000:]
    with open(tmp_path / "code.bin", "r+b") as file:
        file.truncate(1000)
    with tiny.alone(*blended(tmp_path, web=0, code=1)) as job:
        assert job.wait() == 1, job.output[-8000:]
        assert job.output.count("error: ") == 1 and "Traceback" not in job.output
