"""What data costs: tokenising against the tokenizers library, reading batches, opening a trillion tokens.

    python benchmarks/data_pipeline.py            all three, about two minutes
    python benchmarks/data_pipeline.py tokenise | batches | trillion

Everything is written to a temporary folder (TMPDIR): 300 MB, and for `trillion` an index of 20 GB beside 2 TB of tokens
that are a hole in a file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from launch.data.batches import Batches, SequenceSampler
from launch.data.blend import Blend
from launch.data.corpora import open_corpus
from launch.data.indexed import HEADER, MAGIC
from launch.data.indexed_writer import IndexedWriter
from launch.data.validation_split import split_corpus

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 16_000
_PEAK = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""
"""Runs a command and prints the KiB of its largest process. In between because a process counts its parent's memory as
its own until it has started."""


def standard_library() -> list[str]:
    """Real text: the interpreter's own sources."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    return [text for path in files if (text := path.read_text(errors="ignore"))]


def tokenise(folder: Path, megabytes: int, rounds: int) -> None:
    """`prepare_data.py` on JSON lines against encode_batch_fast on the same texts, both on all processors."""
    texts = standard_library()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False)
    tokenizer.train_from_iterator(texts[:400], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    documents: list[str] = []
    size = 0
    while size < megabytes << 20:
        documents.append(texts[len(documents) % len(texts)])
        size += len(documents[-1])
    with open(folder / "texts.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    script = [sys.executable, str(ROOT / "launch" / "prepare_data.py"), "--tokenizer", str(folder / "tokenizer.json")]
    (folder / "one.jsonl").write_text(json.dumps({"text": "a"}) + "\n")

    peaks: dict[str, float] = {}

    def prepare(name: str) -> None:
        for old in folder.glob(f"{name}.[bis]*"):
            old.unlink()
        command = [*script, "--input", str(folder / f"{name}.jsonl"), "--output", str(folder / name)]
        ended = subprocess.run([sys.executable, "-c", _PEAK, *command], check=True, stdout=subprocess.PIPE)
        peaks[name] = int(ended.stdout) / 1024

    def library() -> None:  # a fresh one, as each of ours is: it remembers the words that it has met
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch_fast(documents)

    sides = {"start-up": lambda: prepare("one"), "prepare_data.py": lambda: prepare("texts"), "tokenizers": library}
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    busy = os.getloadavg()[0]
    for _ in range(rounds):  # in turns, so that what else the machine does falls on all
        for name, action in sides.items():
            costs[name].append(cost(action))
    idle = [statistics.median(one[kind] for one in costs["start-up"]) for kind in (0, 1)]
    costs["prepare_data.py"] = [(wall - idle[0], work - idle[1]) for wall, work in costs["prepare_data.py"]]
    tokens = len(open_corpus(str(folder / "texts")))
    print(f"tokenise: {size / 1e6:,.0f} MB of Python source, {tokens / 1e6:.1f} M tokens, {os.cpu_count()} processors")
    print(f"  load average {busy:.1f} before; {rounds} rounds, less the start-up of {idle[0]:.1f} s; median (all)")
    for name in ("tokenizers", "prepare_data.py"):
        walls, works = zip(*costs[name], strict=True)
        print(f"  {name:16} wall {spread(walls, 's')}   processors {spread(works, 's')}")
    pairs = list(zip(costs["tokenizers"], costs["prepare_data.py"], strict=True))
    walls, works = ([theirs[kind] / ours[kind] for theirs, ours in pairs] for kind in (0, 1))
    print(f"  speed of prepare_data.py over the library's: wall {spread(walls)}   processors {spread(works)}")
    longest = max(map(len, documents)) / 1e6
    print(f"  largest process {peaks['texts']:,.0f} MiB (longest text {longest:.1f} MB), idle {peaks['one']:,.0f} MiB")


def spread(values: Sequence[float], unit: str = "") -> str:
    """Median, and all in order."""
    return f"{statistics.median(values):.2f} {unit}".strip() + f" ({' '.join(f'{value:.2f}' for value in values)})"


def cost(action: Callable[[], None]) -> tuple[float, float]:
    """Seconds of wall time, and of processors in this process and its children."""

    def used() -> float:
        return sum(
            usage.ru_utime + usage.ru_stime
            for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )

    begun, before = time.perf_counter(), used()
    action()
    return time.perf_counter() - begun, used() - before


def batches(folder: Path) -> None:
    """Micro-batches of one sequence of 8,192 tokens from a mapped corpus with documents of about 800 tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6.2, 1.0, 120_000).astype(np.int64) + 1
    writer = IndexedWriter(folder / "mapped", np.dtype("<u2"))
    writer.write(rng.integers(0, 50_000, int(lengths.sum()), dtype=np.uint16), lengths)
    print(f"batches: {writer.finish()}")
    corpus = open_corpus(str(folder / "mapped"), 50_000)
    for packing in ("split", "best_fit"):
        for mask in (False, True):
            sampler = SequenceSampler(corpus, 8192, 0, packing)
            source = Batches(sampler, 64, 1, 1, 0, document_mask=mask)
            source.micro_batches(0)
            begun, steps = time.perf_counter(), 20
            for step in range(1, steps + 1):
                source.micro_batches(step)
            rate = 64 * steps / (time.perf_counter() - begun)
            masked = "document mask" if mask else ""
            print(f"  {packing:8} {masked:13} {rate:8,.0f} micro-batches/s {rate * 8192 / 1e6:6,.1f} M tokens/s")
    samples = sampler.samples(np.arange(64))
    begun = time.perf_counter()
    for index, sample in enumerate(samples):
        sample.digest(index)
    print(f"  the digest for the audit takes {(time.perf_counter() - begun) / 64 * 1e6:.0f} us a sequence beside that")


def trillion(folder: Path) -> None:
    """A corpus of 10^12 tokens in 10^9 documents: a real index, sparse tokens."""
    documents, length = 10**9, 1000
    block = 10**7
    with open(folder / "huge.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        for _ in range(0, documents, block):
            file.write(np.full(block, length, "<i4").tobytes())
        for first in range(0, documents, block):
            file.write((np.arange(first, first + block, dtype="<i8") * (2 * length)).tobytes())
        for first in range(0, documents, block):
            file.write(np.arange(first, first + block, dtype="<i8").tobytes())
        file.write(np.array([documents], "<i8").tobytes())
    with open(folder / "huge.bin", "wb") as file:
        file.truncate(documents * length * 2)
    os.sync()
    for path in folder.glob("huge.*"):  # from the disk, not from the memory that writing filled
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    marks = [("", time.perf_counter())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    corpus = open_corpus(str(folder / "huge"), 50_000)
    mark("opened, sampled, fingerprinted")
    training, validation = split_corpus(corpus, 0.0001, seed=0)
    assert validation is not None
    mark(f"split: {len(validation):,} tokens held out")
    sampler = SequenceSampler(training, 8192, 0)
    sampler.samples(np.array([12345]))
    mark(f"first sequence of {sampler.num_windows:,}")
    sampler.samples(np.arange(1024) + 10**8)
    mark("1,024 sequences from anywhere")
    SequenceSampler(training, 8192, 0, "best_fit").samples(np.arange(64) + 10**8)
    mark("64 sequences by best_fit from anywhere")
    Blend({"web": 0.7, "code": 0.3}, 0).counts(10**8)
    mark("what each corpus of a blend gave in 10^8 samples")
    print(f"trillion: {len(corpus):,} tokens, {corpus.num_documents:,} documents")
    for (_, begun), (name, ended) in zip(marks, marks[1:], strict=False):
        print(f"  {ended - begun:8.3f} s  {name}")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"  {(after - before) / 1024:,.0f} MiB of resident memory more, mapped pages included")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["tokenise", "batches", "trillion", []])
    parser.add_argument("--megabytes", type=int, default=24, help="of text to tokenise (default: 24)")
    parser.add_argument("--rounds", type=int, default=5, help="of tokenising, each side in turn (default: 5)")
    options = parser.parse_args()
    for what in options.what or ["tokenise", "batches", "trillion"]:
        with tempfile.TemporaryDirectory() as folder:
            if what == "tokenise":
                tokenise(Path(folder), options.megabytes, options.rounds)
            else:
                {"batches": batches, "trillion": trillion}[what](Path(folder))


if __name__ == "__main__":
    main()
