"""What only one rank meets ends all of them with the same words, and what all meet needs no word of the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from launch.agreement import raised_on_all_ranks
from launch.data.corpora import corpora_on_all_ranks
from launch.data.corpus import CorpusError
from launch.environment import Place
from launch.run import _lock
from launch.run_lock import RunDirectoryError
from tests.distributed.harness import run_distributed


def of_a_block(error: type[Exception], *ranks: int) -> str:
    """What this rank hears where `ranks` raise `error`."""
    mine = dist.get_rank()
    try:
        with raised_on_all_ranks(CorpusError):
            if mine in ranks:
                raise error(f"by {mine}" if mine != 1 else "")
        return "nothing"
    except Exception as heard:
        return f"{type(heard).__name__}: {heard}"


def of_corpora(*fingerprints: str) -> str:
    """What this rank hears where each reads a corpus of that fingerprint, or none."""
    own = fingerprints[dist.get_rank()]
    loading: dict[str, Any] = {"return_value": SimpleNamespace(fingerprint=own * 16)}
    if not own:
        loading = {"side_effect": CorpusError("unreadable")}
    with patch("launch.data.corpora.load_corpora", **loading):
        try:
            return corpora_on_all_ranks(None).fingerprint  # type: ignore[arg-type]  # nothing reads the job
        except CorpusError as error:
            return str(error)


def of_locks(folder: Path) -> list[str | None]:
    """What this rank gets of a directory that can be locked, and of one that cannot."""
    rank, got = dist.get_rank(), list[str | None]()
    for path in (folder / "free", folder / "file"):
        try:
            lock = _lock(SimpleNamespace(run_path=path), Place(rank, rank, 3, 3))  # type: ignore[arg-type]
            got.append(lock and Path(lock.name).name)
        except RunDirectoryError as error:
            got.append(str(error))
    return got


def hear(folder: Path) -> tuple[list[str], list[str], list[str | None]]:
    blocks = [of_a_block(CorpusError), of_a_block(CorpusError, 2), of_a_block(CorpusError, 1, 2)]
    blocks.append(of_a_block(KeyError, 0, 1, 2))
    return blocks, [of_corpora("a", "a", "a"), of_corpora("a", "a", "b"), of_corpora("a", "b", "")], of_locks(folder)


def test_the_first_rank_that_fails_speaks_for_all(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for rank, (blocks, corpora, (lock, refused)) in enumerate(run_distributed(hear, 3, tmp_path)):
        own = "KeyError: ''" if rank == 1 else f"KeyError: 'by {rank}'"
        assert blocks == ["nothing", "CorpusError: by 2", "CorpusError: ", own]
        another = "rank 2 reads another corpus than rank 0 (fingerprints bbbbbbbbbbbb and aaaaaaaaaaaa); give"
        assert corpora[0] == "a" * 16 and corpora[1].startswith(another) and corpora[2] == "unreadable"
        assert lock == (None if rank else "lock")
        assert refused is not None and f"{tmp_path}/file cannot be written" in refused
