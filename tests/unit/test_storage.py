"""Where checkpoints lie: what is listed is complete, on disks and in object stores, and leftovers are removed."""

from __future__ import annotations

import errno
import json
import os
import zlib
from pathlib import Path
from typing import BinaryIO
from unittest.mock import patch

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from launch.saving.checkpoint_names import complete_steps
from launch.saving.manifest import CheckpointFiles, damage, encode, missing_file
from launch.saving.storage import LocalStorage, ObjectStorage, Storage, check_client, storage_at

NAME, OTHER = "step-00000001", "step-00000002"


class Bucket(MemoryFileSystem):
    """An object store as they are: no rename, and objects appear whole or not at all."""

    protocol = "bucket"
    store: dict = {}
    pseudo_dirs = [""]

    def mv(self, *_arguments: object, **_options: object) -> None:
        raise NotImplementedError("an object store has no rename")

    rename = move = mv


@pytest.fixture(params=["local", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return LocalStorage(tmp_path / "checkpoints")
    Bucket.store.clear()
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    return ObjectStorage("bucket://runs/a")


def write(storage: Storage, name: str, complete: bool = True) -> dict[str, dict[str, int]]:
    files = CheckpointFiles(storage, name)
    storage.begin(name)
    for file, content in (("__0_0.distcp", b"one" * 1000), (".metadata", b"two")):
        with files.create(file) as stream:
            stream.write(content)
            stream.write(memoryview(content))
    if complete:
        assert missing_file(storage, name, files.sums) is None
        storage.complete(name, encode({"format": 2, "files": files.sums}))
    return files.sums


def test_a_checkpoint_is_listed_from_its_completion_to_its_removal(storage: Storage) -> None:
    assert storage.names() == []
    sums = write(storage, NAME, complete=False)
    assert storage.names() == []
    storage.complete(NAME, encode({"format": 2, "files": sums}))
    assert storage.names() == [NAME]
    assert damage(storage, NAME, 0, 1) is None
    with storage.open(NAME, "__0_0.distcp") as stream:
        assert stream.read() == b"one" * 2000
    write(storage, OTHER)
    storage.remove(NAME)
    assert storage.names() == [OTHER]
    if "://" not in storage.location:
        assert os.listdir(storage.location) == [OTHER], "what is removed takes no room"
    with pytest.raises(FileNotFoundError):
        storage.open(NAME, "__0_0.distcp")


def test_what_a_killed_save_or_removal_left_goes_at_the_next_save(storage: Storage) -> None:
    write(storage, NAME)
    write(storage, OTHER, complete=False)
    write(storage, OTHER)  # over what was left
    assert sorted(storage.names()) == [NAME, OTHER] and damage(storage, OTHER, 0, 1) is None
    write(storage, "step-00000003", complete=False)
    storage.discard("step-00000003")
    storage.discard("step-00000003")
    assert sorted(storage.names()) == [NAME, OTHER]
    lying = os.listdir(storage.location) if isinstance(storage, LocalStorage) else Bucket.store
    assert not any("step-00000003" in path for path in lying), "what is discarded takes no room"
    if isinstance(storage, ObjectStorage):
        with patch.object(Bucket, "rm", side_effect=OSError("killed")), pytest.raises(OSError, match="killed"):
            storage.remove(NAME)
        assert storage.names() == [OTHER], "a removal that stopped half way leaves no checkpoint"
        write(storage, "step-00000004")
        assert not any(NAME in path for path in Bucket.store)


def test_a_checkpoint_that_is_set_aside_is_whole_and_stays(storage: Storage) -> None:
    sums = write(storage, NAME)
    write(storage, OTHER)
    if isinstance(storage, ObjectStorage):
        with patch.object(Bucket, "cp_file", side_effect=OSError("killed")), pytest.raises(OSError, match="killed"):
            storage.set_aside(OTHER, "set-aside-1")
        assert sorted(storage.names()) == [NAME, OTHER] and damage(storage, OTHER, 0, 1) is None
    storage.set_aside(OTHER, "set-aside-1")
    assert OTHER not in storage.names() and complete_steps(storage) == [1]
    with pytest.raises(FileNotFoundError):
        storage.open(OTHER, "__0_0.distcp")
    assert write(storage, OTHER) == sums  # the run makes that step again, which clears up
    for name in (NAME, OTHER):
        storage.remove(name)
    aside = storage_at(f"{storage.location}/set-aside-1")
    assert complete_steps(aside) == [2] and damage(aside, OTHER, 0, 1) is None


def test_what_others_keep_beside_the_checkpoints_stays(tmp_path: Path) -> None:
    """Such as a model that launch/convert.py is writing there, under a name that ends alike."""
    storage = LocalStorage(tmp_path)
    (tmp_path / "exported.partial").mkdir()
    (tmp_path / "exported.partial" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "archive.tar.partial").write_bytes(b"half")
    write(storage, OTHER, complete=False)
    write(storage, NAME)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive.tar.partial", "exported.partial", NAME]
    assert (tmp_path / "exported.partial" / "model.safetensors").read_bytes() == b"weights"


def test_a_file_that_the_disk_does_not_give_is_damage(tmp_path: Path) -> None:
    """So that a resume names the newest sound checkpoint instead."""
    storage = LocalStorage(tmp_path)
    write(storage, NAME)

    class Broken(LocalStorage):
        def open(self, name: str, file: str) -> BinaryIO:
            stream = open(tmp_path / name / file, "rb")  # noqa: SIM115 (the caller closes it)
            if file == "__0_0.distcp":
                stream.read = raises  # type: ignore[method-assign]
            return stream

    def raises(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    assert damage(Broken(tmp_path), NAME, 0, 1) == "__0_0.distcp cannot be read ([Errno 5] Input/output error)"


def test_damage_is_named(storage: Storage) -> None:
    write(storage, NAME)
    with patch("zlib.crc32", side_effect=lambda _data, _value=0: 1):
        assert damage(storage, NAME, 0, 1) == "manifest.json cannot be read (it does not match its own CRC-32)"
    assert damage(storage, OTHER, 0, 1) is not None
    truncated = {"__0_0.distcp": {"bytes": 7, "crc32": 0}}
    storage.begin(OTHER)
    storage.complete(OTHER, encode({"format": 2, "files": truncated}))
    assert damage(storage, OTHER, 0, 1) == "__0_0.distcp is missing"


def test_a_file_that_rank_0_does_not_see_is_noticed_before_the_checkpoint_appears(storage: Storage) -> None:
    sums = write(storage, NAME, complete=False)
    assert "__1_0.distcp was written but cannot be seen from rank 0" in str(
        missing_file(storage, NAME, sums | {"__1_0.distcp": {"bytes": 1, "crc32": 0}})
    )
    assert missing_file(storage, NAME, {".metadata": {"bytes": 1, "crc32": 0}}) == ".metadata has 6 bytes instead of 1"


def test_sums_are_those_of_the_file(tmp_path: Path) -> None:
    """Against zlib over the whole file."""
    storage = LocalStorage(tmp_path)
    sums = write(storage, NAME)
    for file, entry in sums.items():
        content = (tmp_path / NAME / file).read_bytes()
        assert entry == {"bytes": len(content), "crc32": zlib.crc32(content)}
    manifest = json.loads((tmp_path / NAME / "manifest.json").read_text())
    assert manifest["files"] == sums
    own, rest = manifest.pop("crc32"), json.dumps(manifest, sort_keys=True)
    assert own == zlib.crc32(rest.encode()), "older checkpoints are to be read"


def test_what_a_power_cut_must_not_take_is_on_the_disk_before_the_checkpoint_appears(tmp_path: Path) -> None:
    """The files whole, then their folder, then the rename, then the folder that the new name is in."""
    storage, fsync, rename, done = LocalStorage(tmp_path), os.fsync, Path.rename, []
    open_files = len(os.listdir("/proc/self/fd"))

    def note_sync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append((path.name, None if path.is_dir() else path.stat().st_size))
        fsync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        done.append((path.name, "becomes"))
        return rename(path, target)

    with patch("os.fsync", note_sync), patch.object(Path, "rename", note_rename):
        write(storage, NAME)
    manifest = (tmp_path / NAME / "manifest.json").stat().st_size
    partial = f"{NAME}.partial"
    files = [("__0_0.distcp", 6000), (".metadata", 6), ("manifest.json", manifest)]
    assert done == [*files, (partial, None), (partial, "becomes"), (tmp_path.name, None)]
    write(storage, OTHER)
    done.clear()
    with patch("os.fsync", note_sync), patch.object(Path, "rename", note_rename):
        for name in (NAME, OTHER):
            storage.set_aside(name, "aside")
    moves = [[(name, "becomes"), ("aside", None), (tmp_path.name, None)] for name in (NAME, OTHER)]
    assert done == [*moves[0], *moves[1]]
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_sizes_alone_are_looked_at_where_nobody_asks_for_more(storage: Storage) -> None:
    sums = write(storage, NAME, complete=False)
    other = {file: entry | {"crc32": entry["crc32"] ^ 1} for file, entry in sums.items()}
    storage.complete(NAME, encode({"format": 2, "files": other}))
    assert damage(storage, NAME, 0, 1, contents=False) is None
    assert [damage(storage, NAME, rank, 3) for rank in range(3)] == [
        "__0_0.distcp does not match its CRC-32",
        ".metadata does not match its CRC-32",
        None,
    ]
    storage.begin(OTHER)
    with storage.create(OTHER, ".metadata") as stream:
        stream.write(b"two")
    storage.complete(OTHER, encode({"format": 2, "files": {".metadata": sums[".metadata"]}}))
    for contents in (True, False):
        assert damage(storage, OTHER, 0, 1, contents=contents) == ".metadata has 3 bytes instead of 6"


def test_an_error_of_the_disk_is_not_swallowed(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch("os.fsync", side_effect=full), pytest.raises(OSError, match="No space left"):
        write(storage, NAME)
    assert storage.names() == []


def test_a_location_is_a_path_or_a_url(tmp_path: Path) -> None:
    assert isinstance(storage_at(str(tmp_path)), LocalStorage)
    assert storage_at(f"file://{tmp_path}").location == str(tmp_path)
    assert isinstance(storage_at("memory://runs/a"), ObjectStorage)
    check_client("memory://runs")
    check_client("runs/a")
    with pytest.raises(ValueError, match="nosuch"):
        check_client("nosuch://runs/a")
