"""What --check says of a job's data: what is there, what is not, and what does not fit the job."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from launch import prepare_data
from launch.config import JobConfig
from launch.data.encoders import encoder_of
from launch.data.indexed_writer import IndexedWriter
from launch.data.inspection import inspect_data, other_tokenizers
from launch.train import main
from tests.unit.transformers_models import write_tokenizer


def job_text(data: str, vocabulary: int = 300) -> str:
    return f"""
model: {{vocab_size: {vocabulary}, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1,
  num_key_value_heads: 1}}
data: {{{data}}}
optimizer: {{learning_rate: 0.1}}
training: {{sequence_length: 8, global_batch_size: 2, max_steps: 10}}
"""


def inspected(data: str, vocabulary: int = 300) -> tuple[list[str], list[str]]:
    return inspect_data(JobConfig.from_yaml(job_text(data, vocabulary)))


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """50 documents of 20 tokens below 200, whose tokenizer nobody has noted."""
    monkeypatch.chdir(tmp_path)
    writer = IndexedWriter(tmp_path / "web", np.dtype(np.uint8))
    writer.write(np.arange(1000, dtype=np.uint8) % 200, np.full(50, 20))
    writer.finish()
    return tmp_path / "web"


def test_corpora_are_described_as_a_run_will_read_them(corpus: Path) -> None:
    (line,), faults = inspected("source: indexed, blend: [{path: web}], validation_fraction: 0.2")
    assert faults == [] and line.startswith("corpus web: 800 tokens, 40 documents, weight 1.000")
    assert line.endswith("at the end of the job 0.20")  # 20 sequences of 8 of 800 tokens


def test_all_that_is_missing_is_told_at_once(corpus: Path) -> None:
    found, faults = inspected(
        "source: indexed, tokenizer: none.json, blend: [{path: web}, {path: code}, {path: x*}], "
        "validation_paths: [held_out, y*]"
    )
    said = ["code.idx and code.bin missing", "data.blend: no .bin", "held_out.idx and", "data.validation_paths: no"]
    assert found == [] and len(faults) == 5
    for fault, part in zip(faults, [*said, "the tokenizer 'none.json' cannot be read"], strict=True):
        assert part in fault
    assert inspected("source: files, files: ['*.txt', '*.idx']")[1][0].startswith("data.files: no file matches '*.txt'")


def test_what_does_not_fit_is_told(corpus: Path) -> None:
    _, (fault,) = inspected("source: indexed, blend: [{path: web}]", 100)
    assert "token id 199 is beyond model.vocab_size (100)" in fault
    short = inspected("source: indexed, blend: [{path: web}], validation_fraction: 0.001")
    assert "validation" in short[1][0]


def test_texts_are_counted_and_not_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("x" * 750_000)
    assert inspected("source: files, files: ['*.txt', 'a*']") == (["2 texts, 1.5 MB"], [])


def test_the_tokenizer_has_to_be_the_corpus_s_and_the_model_s(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(Path("tokenizer.json"))
    size = encoder_of("tokenizer.json").vocab_size
    Path("a.txt").write_text("a cat and a dog " * 9)
    command = ["--input", "a.txt", "--tokenizer", "tokenizer.json", "--output", "made", "--workers", "1"]
    assert prepare_data.main(command) == 0
    for name, lines in (("bytes", 1), ("tokenizer.json", 0), ("gone.json", 0)):
        data = f"source: indexed, tokenizer: {name}, blend: [{{path: made}}, {{path: web}}]"
        told = other_tokenizers(JobConfig.from_yaml(job_text(data)))
        assert [line.split(" by ")[0] for line in told] == ["corpus made was tokenised"] * lines
    _, faults = inspected("source: indexed, tokenizer: tokenizer.json, blend: [{path: web}]", size - 1)
    assert f"has {size} tokens, more than model.vocab_size ({size - 1})" in faults[-1]


def test_check_prints_it_and_calls_the_job_valid(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("job.yaml").write_text(job_text("source: indexed, blend: [{path: elsewhere}]"))
    assert main(["--check", "--config", "job.yaml"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("--world_size is not given") and "\n\ndata, as this machine sees it\n  elsewhere: " in said
    assert main(["--check"]) == 0  # the standard library is everywhere
    assert "as this machine sees it" not in capsys.readouterr().out
