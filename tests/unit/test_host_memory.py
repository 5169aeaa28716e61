"""Page-locked host memory: what the driver is asked, and what is said where it refuses. On GPUs: tests/gpu."""

from __future__ import annotations

import enum
import logging
import resource
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from parallel import host_memory
from parallel.host_memory import host_buffer, release_host_buffer

GPU, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)
MIB = 2**20


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713


class Driver:
    """Locks up to `limit` bytes; addresses by their sizes."""

    CUresult = CUresult

    def __init__(self, limit: int) -> None:
        self.limit, self.locked = limit, dict[int, int]()

    def cuMemHostRegister(self, address: int, size: int, flags: int) -> tuple[CUresult]:
        assert flags == 0 and address not in self.locked
        if sum(self.locked.values()) + size > self.limit:
            return (CUresult.CUDA_ERROR_OUT_OF_MEMORY,)
        self.locked[address] = size
        return (CUresult.CUDA_SUCCESS,)

    def cuMemHostUnregister(self, address: int) -> tuple[CUresult]:
        known = self.locked.pop(address, None)
        return (CUresult.CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED if known is None else CUresult.CUDA_SUCCESS,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """In place of cuda.bindings.driver, which a machine without GPUs has not."""
    made = Driver(limit=3 * MIB)
    bindings = ModuleType("cuda.bindings")
    bindings.driver = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(bindings=bindings))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(host_memory, "_refused", set())
    return made


def test_buffers_are_locked_and_given_back(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    buffers = [host_buffer(MIB, GPU) for _ in range(3)]
    assert driver.locked == {buffer.data_ptr(): MIB for buffer in buffers}
    host_buffer(5 * MIB, torch.device("cpu"))
    host_buffer(0, GPU)
    for buffer in buffers:
        release_host_buffer(buffer.view(torch.float32), GPU)
    assert not driver.locked and not caplog.records


@pytest.mark.parametrize(("limit", "allowed"), [(8 * MIB, "8.0 MiB"), (resource.RLIM_INFINITY, "unlimited")])
def test_a_refusal_is_told_once_for_each_gpu(
    driver: Driver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, limit: int, allowed: str
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, resource.RLIM_INFINITY))
    held = host_buffer(2 * MIB, GPU)  # or the next one may lie at the same address
    refused = host_buffer(4 * MIB, GPU)
    refused.fill_(7)
    host_buffer(6 * MIB, GPU)
    host_buffer(5 * MIB, OTHER)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    first, second = (record.getMessage() for record in caplog.records)
    assert first == (
        f"4.0 MiB of host memory for cuda:0 cannot be page-locked (CUDA_ERROR_OUT_OF_MEMORY; ulimit -l: {allowed}): "
        "copies to and from it are slower, and hold up the host; raise the limit, or do without "
        "(checkpoint.asynchronous=false, training.offload_activations=none)"
    )
    assert second.startswith("5.0 MiB of host memory for cuda:1")
    release_host_buffer(refused, GPU)
    assert driver.locked == {held.data_ptr(): 2 * MIB}, "what was locked stays so"
