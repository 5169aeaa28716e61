"""From texts to tokens, through the cache or not, and what is said of texts that will not do."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from launch.data import sources
from launch.data.bigram import conditional_bigram_entropy
from launch.data.corpus import Corpus, CorpusError
from launch.data.encoders import TokenizerEncoder
from launch.data.sources import load_text
from launch.data.validation_split import split_corpus
from tests.unit.made_corpora import edges


def test_the_standard_library_is_real_text_and_always_the_same() -> None:
    corpus = load_text(source="python_stdlib", vocab_size=256)
    assert len(corpus) > 5_000_000
    assert corpus.num_documents > 300
    assert corpus.fingerprint == load_text(source="python_stdlib", vocab_size=256).fingerprint
    labels = [file.label for file in sources._standard_library()]
    assert labels == sorted(labels)
    assert "argparse.py" in labels and "json/decoder.py" in labels
    assert not [one for one in labels if {"test", "tests", "site-packages"} & set(one.split("/"))]
    training, validation = split_corpus(corpus, 0.05, seed=0)
    assert validation is not None
    assert 2.2 < conditional_bigram_entropy(validation.read(0, len(validation))) < 2.6


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Three files: 11, 0 and 9 bytes."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("the cat sat")
    (folder / "b.txt").write_text("")
    (folder / "deep" / "c.txt").write_text("a cat sat")
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Words, with [BOS] put before every text by the tokenizer's own post-processor."""
    words = {"[UNK]": 0, "[BOS]": 1, "the": 2, "cat": 3, "sat": 4, "a": 5}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def test_files_as_bytes(texts: Path) -> None:
    corpus = load_text(source="files", files=[f"{texts}/**/*.txt", f"{texts}/a.txt"], vocab_size=256)
    assert bytes(corpus.read(0, len(corpus)).astype(np.uint8)) == b"the cat sata cat sat"
    assert edges(corpus) == [0, 11, 20]


def test_files_relative_to_the_working_directory(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts)
    assert len(load_text(source="files", files=["*.txt"], vocab_size=128)) == 11


def test_files_through_a_tokenizer_are_cached_and_mapped(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    def load() -> Corpus:
        return load_text(
            source="files",
            files=[f"{texts}/**/*.txt"],
            tokenizer=str(tokenizer),
            vocab_size=6,
            cache_directory=tmp_path / "cache",
        )

    first = load()
    assert first.read(0, len(first)).tolist() == [1, 2, 3, 4, 1, 1, 5, 3, 4]  # the empty file is a lone [BOS]
    assert mapped(first)
    [entry] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    written = (entry / "tokens.bin").stat().st_mtime_ns
    assert load().fingerprint == first.fingerprint
    assert (entry / "tokens.bin").stat().st_mtime_ns == written
    (texts / "a.txt").write_text("the cat")  # another size and time: another entry
    assert load().read(0, 3).tolist() == [1, 2, 3]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def mapped(corpus: Corpus) -> bool:
    """Whether the tokens lie in a file."""
    base: object = corpus.shards[0].tokens
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    return isinstance(base, np.memmap)


def test_large_byte_corpora_go_through_the_cache(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_text(source="files", files=[f"{texts}/*.txt"], vocab_size=256)
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 4)
    kept = load_text(source="files", files=[f"{texts}/*.txt"], vocab_size=256, cache_directory=tmp_path / "cache")
    assert mapped(kept) and not mapped(plain)
    assert kept.fingerprint == plain.fingerprint
    assert (kept.read(0, 11) == plain.read(0, 11)).all()


def _load_in_process(texts: Path, tokenizer: Path, cache: Path, log: Path, together: Barrier) -> None:
    encode = TokenizerEncoder.encode

    def recorded(self: TokenizerEncoder, paths: list[Path], contents: list[bytes]) -> list[sources.Tokens]:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return encode(self, paths, contents)

    TokenizerEncoder.encode = recorded  # type: ignore[method-assign,assignment]
    together.wait()
    files = [f"{texts}/**/*.txt"]
    corpus = load_text(source="files", files=files, tokenizer=str(tokenizer), vocab_size=6, cache_directory=cache)
    assert len(corpus) == 9


def test_one_process_tokenises_and_the_others_wait(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(3)
    arguments = (texts, tokenizer, tmp_path / "cache", tmp_path / "log", together)
    processes = [context.Process(target=_load_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_killed_builder_leaves_nothing_that_is_believed(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    files = [f"{texts}/**/*.txt"]
    with pytest.raises(CorpusError, match="token id 5"):
        load_text(source="files", files=files, tokenizer=str(tokenizer), vocab_size=5, cache_directory=cache)
    [entry] = [path for path in cache.iterdir() if path.is_dir()]
    entry.rename(entry.with_name(entry.name + ".partial"))  # the state just before the last rename
    corpus = load_text(source="files", files=files, tokenizer=str(tokenizer), vocab_size=6, cache_directory=cache)
    assert len(corpus) == 9
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [entry.name]
    with open(entry / "tokens.bin", "r+b") as file:
        file.truncate(4)
    with pytest.raises(CorpusError, match=r"damaged \(.*4 bytes instead of the 18 of .*\); delete that folder"):
        load_text(source="files", files=files, tokenizer=str(tokenizer), vocab_size=6, cache_directory=cache)


def test_errors_of_sources_say_what_to_do(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    def refuse(match: str, *files: str, tokenizer: str = "bytes", vocab_size: int = 256) -> None:
        with pytest.raises(CorpusError, match=match):
            load_text(
                source="files",
                files=files,
                tokenizer=tokenizer,
                vocab_size=vocab_size,
                cache_directory=tmp_path / "cache",
            )

    refuse(r"no file matches '.*\*.md'", f"{texts}/*.txt", f"{texts}/*.md")
    refuse(rf"data.files: '{texts}' is a folder; name the files in it, such as '{texts}/\*\*/\*.txt'", f"{texts}")
    (texts / "c.jsonl").write_text('{"text": "a"}')
    refuse(r"data.files: .*/c.jsonl is no plain text.* launch/prepare_data.py and source: indexed", f"{texts}/c*")
    refuse(r"corpus is empty: 1 file, 0 tokens", f"{texts}/b.txt")
    refuse(r"token id 116 \(data.tokenizer: bytes\), beyond model.vocab_size \(100\); .* at least 256",
           f"{texts}/a.txt", vocab_size=100)  # fmt: skip
    refuse(r"token id 4 .*beyond model.vocab_size \(4\); .* at least 6",
           f"{texts}/a.txt", tokenizer=str(tokenizer), vocab_size=4)  # fmt: skip
    refuse(r"'/nowhere.json' cannot be read", f"{texts}/a.txt", tokenizer="/nowhere.json")
    refuse(r"a.txt' is no tokenizer.json", f"{texts}/a.txt", tokenizer=f"{texts}/a.txt")
    (texts / "binary.txt").write_bytes(b"text\0text")
    refuse(r"binary.txt: binary, not text \(NUL at byte 4\); .*data.tokenizer: bytes",
           f"{texts}/*.txt", tokenizer=str(tokenizer))  # fmt: skip
    (texts / "binary.txt").write_bytes(b"caf\xe9 au lait")
    refuse(r"binary.txt: not UTF-8 text \(at byte 3\); .*data.tokenizer: bytes",
           f"{texts}/*.txt", tokenizer=str(tokenizer))  # fmt: skip
    assert not list((tmp_path / "cache").glob("*.partial"))
    assert len(load_text(source="files", files=[f"{texts}/*.txt"], vocab_size=256)) == 23
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    (tmp_path / "cache").write_text("a file where the folder should be")
    refuse(r"token cache .*cache cannot be used .*data.cache_directory",
           f"{texts}/a.txt", tokenizer=str(tokenizer))  # fmt: skip
