"""The audit: silent on a run whose layout, weights and corpora changed at its resumes, loud where data went wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from launch import audit_data
from launch.config import JobConfig
from launch.data.corpora import fresh_cursor, load_corpora, training_batches
from launch.data.cursor import BlendedSamples, DataCursor
from launch.data.data_log import DataLog
from launch.data.indexed_writer import IndexedWriter
from launch.data.run_record import RunRecord
from launch.plurals import counted

ROOT = Path(__file__).parents[2]

JOB = """
job: {{name: audited, run_directory: {run}}}
model: {{vocab_size: 1000, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1,
         num_key_value_heads: 1}}
data: {{source: indexed, packing: {packing}, blend: [{blend}]}}
optimizer: {{learning_rate: 0.1}}
training: {{sequence_length: 16, global_batch_size: {size}, max_steps: 1000, skip_steps: {skip}}}
"""


class Simulated:
    """A run of the data pipeline alone: every data-parallel rank reads and notes its part."""

    def __init__(self, folder: Path, packing: str = "split") -> None:
        self.folder, self.run, self.packing = folder, folder / "run", packing
        self.record: dict | None = None
        self.run.mkdir()
        for seed, name in enumerate(("web", "code")):
            rng = np.random.default_rng(seed)
            lengths = rng.integers(1, 40, 60)
            writer = IndexedWriter(folder / name, np.dtype("<u2"))
            writer.write(rng.integers(0, 1000, lengths.sum()), lengths)
            writer.finish()

    def train(
        self,
        start: int,
        stop: int,
        weights: dict[str, float],
        dp: int = 1,
        size: int = 4,
        accept: tuple[str, ...] = (),
        skip: str = "[]",
    ) -> None:
        blend = ", ".join(f"{{path: {self.folder / name}, weight: {weight}}}" for name, weight in weights.items())
        text = JOB.format(run=self.run, packing=self.packing, blend=blend, size=size, skip=skip)
        job = JobConfig.from_yaml(text)
        (self.run / "config.yaml").write_text(text)
        corpora = load_corpora(job)
        cursor = fresh_cursor(corpora, job)
        if self.record is not None:
            cursor = DataCursor.from_record(self.record).continued(start, cursor, accept)
        self.record = cursor.record()
        for rank in range(dp):
            log = DataLog(self.run / "data", rank, dp, start or None, pytest.fail)
            log.write_cursor(cursor.record(), {corpus.label: corpus.path for corpus in job.data.blend})
            batches = replace(training_batches(corpora, job, cursor, dp, rank), note=log.note)
            for step in batches.steps(start, stop):
                batches.micro_batches(step)
            log.close()

    def entries(self, rank: int = 0) -> list[dict]:
        return [json.loads(line) for line in self.file(rank).read_text().splitlines()]

    def file(self, rank: int = 0) -> Path:
        return self.run / "data" / f"dp-{rank:05d}.jsonl"

    def rewrite(self, entries: list[dict]) -> None:
        self.file().write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def audited(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    status = audit_data.main([str(run), *options])
    said = capsys.readouterr()
    return status, said.out + said.err


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_a_run_that_was_moved_and_steered_is_sound(
    tmp_path: Path, packing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Simulated(tmp_path, packing)
    run.train(0, 25, {"web": 0.7, "code": 0.3}, dp=2)  # killed in step 26, resumed from the checkpoint of step 20
    run.train(20, 40, {"web": 0.2, "code": 0.8}, dp=4)
    run.train(38, 60, {"web": 1}, size=8)
    run.train(60, 90, {"code": 0.5, "web": 0.5}, dp=2)
    status, said = audited(run.run, capsys)
    assert status == 0, said
    assert "steps 1 to 90: 448 samples" in said  # 38 x 4 + 22 x 8 + 30 x 4
    assert "from step 21: 4 a step; web 0.2, code 0.8\n  from step 39: 8 a step; web 1" in said
    assert "epochs of " in said and "nothing was repeated within an epoch, and nothing was lost" in said
    with open(run.file(1), "a") as file:  # one rank had read a step more, and was cut short in the next
        file.write('{"step": 91, "samples": 2, "digest": 1}\n{"step": 92, "samp')
    status, said = audited(run.run, capsys, "--quick")
    assert status == 0 and "steps 1 to 90: 448 samples" in said


def test_steps_that_were_skipped_are_proven_to_be_unread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a spike the run goes back to step 20 and leaves out 29 to 36, on another layout."""
    run = Simulated(tmp_path)
    run.train(0, 38, {"web": 0.7, "code": 0.3}, dp=2)
    spiked = RunRecord.read(run.run).noted
    run.train(20, 40, {"web": 0.7, "code": 0.3}, dp=4, skip="[[29, 36]]")
    status, said = audited(run.run, capsys)
    assert status == 0, said
    assert "steps 1 to 40: 160 samples, 32 of them skipped\n" in said and "  skipped: steps 29 to 36\n" in said
    assert "nothing was repeated within an epoch, and nothing was lost but the steps skipped\n" in said
    audit = RunRecord.read(run.run)
    assert sorted({*range(40)} - audit.noted.keys()) == [*range(28, 36)]
    assert all(audit.noted[step] == spiked[step] for step in (*range(28), 36, 37)), "the order has moved"
    for name, sampler in audit.samplers.items():  # what it says of documents, token by token
        draws = {step: audit.cursor.draws(audit.indices(step)).get(name, ((), ()))[1] for step in range(40)}
        drawn, numbers = sum(map(len, draws.values())), [n for step in audit.noted for n in draws[step]]
        latest = [number for number in numbers if number >= drawn // sampler.num_windows * sampler.num_windows]
        spans = [span for window in sampler.windows(np.array(latest)).tolist() for span in sampler.stretches(window)]
        tokens = {token for start, stop in spans for token in range(start, stop)}
        edges = [0, *sampler.corpus.document_starts(0, len(sampler.corpus)).tolist(), len(sampler.corpus)]
        shares = [len(tokens & {*range(*edge)}) / (edge[1] - edge[0]) for edge in pairwise(edges)]
        assert f"corpus {name}: {drawn} samples, {drawn - len(numbers)} of them skipped, " in said, said
        whole, part = counted(shares.count(1.0), "document"), sum(0 < share < 1 for share in shares)
        assert re.search(f"corpus {name}: .*; of the next epoch {whole} whole and {part} in part\n", said), said
    assert "step 30 was skipped: no rank read this\nsample 116: " in audited(run.run, capsys, "--show", "30")[1]
    sound = run.entries()
    run.rewrite([*sound, sound[0] | {"step": 30}])
    status, said = audited(run.run, capsys, "--quick")
    assert status == 1 and "FAULT: step 30: to be skipped, but the ranks noted 2 samples\n" in said
    run.rewrite([entry for entry in sound if entry["step"] != 37])
    assert "FAULT: step 37: the ranks noted 3 samples instead of 4: some were lost" in audited(run.run, capsys)[1]


def test_a_run_that_skipped_nearly_all_is_no_damaged_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Simulated(tmp_path)
    run.train(0, 995, {"web": 1}, skip="[[2, 993]]")
    status, said = audited(run.run, capsys)
    assert status == 0 and "steps 1 to 995: 3,980 samples, 3,968 of them skipped\n" in said


def test_a_corpus_that_was_left_out_is_proven_too_where_it_still_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Simulated(tmp_path)
    run.train(0, 20, {"web": 1})
    run.train(20, 40, {"web": 0.2, "code": 0.8})
    run.train(40, 50, {"code": 1})
    status, said = audited(run.run, capsys)
    assert status == 0 and "corpus web: " in said and "corpus code: " in said, said
    assert said.count(" documents whole and ") == 2 and "only counted" not in said
    sound = run.entries()
    run.rewrite([sound[0] | {"digest": 1}, *sound[1:]])  # a step of the corpus that was left out
    status, said = audited(run.run, capsys)
    assert status == 1 and "FAULT: step 1: the ranks read other tokens" in said
    run.rewrite(sound)
    raw = bytearray((tmp_path / "web.bin").read_bytes())
    (tmp_path / "web.bin").write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    status, said = audited(run.run, capsys)
    assert status == 0 and f"corpus web, which data.blend names no more: {tmp_path}/web is not what was read" in said
    (tmp_path / "web.bin").rename(tmp_path / "elsewhere")
    status, said = audited(run.run, capsys)
    assert status == 0 and "corpus web, which data.blend names no more: " in said and "web.bin missing" in said
    assert "left out of data.blend, and not where it was: only counted" in said


def test_the_documents_of_a_step_are_those_that_its_tokens_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Simulated(tmp_path)
    run.train(0, 9, {"web": 0.7, "code": 0.3})
    status, said = audited(run.run, capsys, "--show", "7")
    assert status == 0
    assert said.count(": corpus ") == 4 and "sample 24: corpus " in said and "documents " in said
    audit = RunRecord.read(run.run)
    source = BlendedSamples(audit.samplers, audit.cursor)
    for name, sampler in audit.samplers.items():
        whole = sampler.corpus.shards[0]
        for at, number in zip(*audit.cursor.draws(audit.indices(6)).get(name, ((), ())), strict=True):
            sample = source.samples(audit.indices(6))[at]
            [(start, stop)] = sampler.stretches(int(sampler.windows(np.array([number]))[0]))
            named = [d for _, first, last in sampler.corpus.documents(start, stop) for d in range(first, last + 1)]
            text = np.concatenate([whole.read(*whole.begin(np.array([d, d + 1])).tolist()) for d in named])
            found = sample.input_ids[: stop - start]
            windows = np.lib.stride_tricks.sliding_window_view(text, len(found))
            assert (windows == found).all(axis=1).any()
    status, said = audited(run.run, capsys, "--show", "10")
    assert (status, "--show 10: the run's records hold steps 1 to 9; name one of them" in said) == (2, True)


def test_data_that_began_anew_is_audited_from_there_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Simulated(tmp_path)
    run.train(0, 9, {"code": 1})
    assert run.record is not None
    run.record["seed"] = 1  # as if the run had had another
    run.train(5, 12, {"web": 1}, accept=("data",))
    status, said = audited(run.run, capsys)
    assert status == 0 and "steps 6 to 12: 28 samples" in said, said


def test_a_step_that_was_lost_repeated_or_of_other_tokens_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Simulated(tmp_path)
    run.train(0, 9, {"web": 0.7, "code": 0.3})
    sound = run.entries()
    run.rewrite(sound[:4] + sound[5:])
    status, said = audited(run.run, capsys, "--quick")
    assert status == 1 and "FAULT: step 5: the ranks noted 0 samples instead of 4: some were lost" in said
    run.rewrite([*sound[:4], *sound[3:]])
    status, said = audited(run.run, capsys, "--quick")
    assert status == 1 and "FAULT: step 4: the ranks noted 8 samples instead of 4: some were repeated" in said
    run.rewrite([*sound[:6], sound[6] | {"digest": sound[5]["digest"]}, *sound[7:]])
    status, said = audited(run.run, capsys)
    assert status == 1 and "FAULT: step 7: the ranks read other tokens than the corpora hold" in said
    assert said.count("FAULT") == 1


def test_an_order_that_repeats_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the cursor, at a change of weights every corpus would begin again: such a run is not sound."""
    run = Simulated(tmp_path)
    run.train(0, 20, {"web": 0.7, "code": 0.3})
    read = RunRecord.read(run.run)
    windows = read.samplers["web"].windows
    monkeypatch.setattr(read.samplers["web"], "windows", lambda indices: windows(indices // 2))
    monkeypatch.setattr(RunRecord, "read", lambda directory: read)
    status, said = audited(run.run, capsys, "--quick")
    assert status == 1 and "corpus web, epoch 1: " in said and re.search("[2-9] stretches of tokens repeated", said)


def test_records_and_corpora_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Simulated(tmp_path)
    run.train(0, 3, {"web": 0.7, "code": 0.3})
    status, said = audited(tmp_path / "nowhere", capsys)
    assert status == 2 and "give the directory of a run that has begun" in said
    records = {path: path.read_text() for path in (run.run / "data").glob("dp-*.jsonl")}
    for damage, complaint in [
        ("{}\n", "line 1: no record of a step (KeyError('step'))"),
        ('{"step": 1.5, "samples": 4, "digest": 0}\n', "line 1: no record of a step (TypeError("),
        ("\ufeff\udcff\n", "line 1: no record of a step (UnicodeDecodeError("),
        ("", "hold no whole step"),
    ]:
        for path in records:
            path.write_bytes(damage.encode(errors="surrogateescape"))
        status, said = audited(run.run, capsys)
        assert status == 2 and complaint in said
    for path, text in records.items():
        path.write_text(text)
    far = '{"step": 100000000000, "samples": 4, "digest": 0}\n'  # none of these may be counted up to
    run.file().write_text(records[run.file()] + far)
    status, said = audited(run.run, capsys)
    assert status == 2 and re.search(
        r"hold [\d,]+ of the 400,000,000,000 samples .* the steps 1 to 100,000,000,000", said
    )
    run.file().write_text(records[run.file()])
    cursor = run.run / "data" / "cursor.json"
    kept = cursor.read_text()
    segment = json.loads(kept)["history"][0]
    for history, complaint in [
        ([], "history: Tuple should have at least 1 item"),
        ([segment | {"step": -1}], "step: Input should be greater than or equal to 0"),
        ([segment | {"global_batch_size": 4.5}], "global_batch_size: Input should be a valid integer"),
        ([segment | {"weights": {"web": "1"}}], "weights.web: Input should be a valid number"),
        ([segment | {"weights": {"web": float("inf")}}], "weights.web: Input should be a finite number"),
        ([segment | {"weights": {"web": 0}}], "weights {'web': 0.0} leave nothing to read"),
        ([segment | {"weights": {"new": 1}}], "the history names corpora without a fingerprint: new"),
        ([segment, segment], "the steps of the history [0, 0] do not ascend"),
        (
            [segment | {"global_batch_size": 10**11}, segment | {"step": 1}],
            "samples that cursor.json gives the steps 1 to ",
        ),
    ]:
        cursor.write_text(json.dumps(json.loads(kept) | {"history": history}))
        status, said = audited(run.run, capsys)
        assert status == 2 and complaint in said, said
    for damage, complaint in [
        ("{", "cursor.json: cannot be read (Expecting property name"),
        ("[]", "the record of what the run has read is not readable (AttributeError("),
    ]:
        cursor.write_text(damage)
        status, said = audited(run.run, capsys)
        assert status == 2 and complaint in said
    cursor.write_text(kept)
    raw = bytearray((tmp_path / "web.bin").read_bytes())
    raw[5] ^= 1
    (tmp_path / "web.bin").write_bytes(raw)
    status, said = audited(run.run, capsys)
    assert status == 2 and "corpus web is not what the run read (fingerprint " in said
