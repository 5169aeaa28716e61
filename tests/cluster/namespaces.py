"""Machines made of namespaces, and the end of all that runs in them.

All of it hangs on one process: the init of a process namespace, which waits for the end of a pipe that the test process
holds. When the pipe closes, also because the test process was killed with -9, init ends, the kernel ends every other
process of that namespace, and the last namespaces, links and mounts go with them. Nothing has a name on the machine, so
two runs at a time cannot meet and an aborted one leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/bin", "/bin"])
MACHINE = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc"]
NODE = ["unshare", "--net", "--uts", "--mount", "--propagation=private"]
PATIENCE = 300.0
"""Seconds that anything may take on a machine that has more to do; nothing that goes well waits for so long."""


def program(name: str) -> str | None:
    """Absolute path of a system program, the sbin folders included, or None."""
    return shutil.which(name, path=SEARCH_PATH)


def what_is_missing(programs: Mapping[str, str]) -> str | None:
    """The system program (name -> Debian package) or permission without which no node can be made here, or None."""
    missing = [f"{name} (Debian package {package})" for name, package in programs.items() if not program(name)]
    if missing:
        return f"missing system programs: {', '.join(missing)}"
    if os.geteuid() != 0:
        return f"namespaces and the services in them need root, and this is uid {os.geteuid()}"
    # A container may forbid namespaces, new mounts of /proc, or the veth driver to its root.
    link = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]
    probe = subprocess.run([*MACHINE, *NODE, *link], capture_output=True, text=True, env={"PATH": SEARCH_PATH})
    if probe.returncode:
        return f"this system does not let root make namespaces joined by veth: {probe.stderr.strip()}"
    return None


class Machines(ABC):
    """Up for as long as the `with` block lasts. `scratch` is an empty folder: configuration and logs go there."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._started: list[subprocess.Popen[bytes]] = []

    @abstractmethod
    def _boot(self) -> None:
        """Starts everything, by `_start`, and waits until it serves."""

    def __enter__(self) -> Self:
        try:
            self._boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process; the kernel takes the namespaces and mounts back by itself."""
        for process in self._started:
            if process.stdin:
                process.stdin.close()
        for process in self._started:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._started.clear()

    def _start_machine(self) -> int:
        """The process that all others hang on."""
        return self._start([*MACHINE, "bash", "-c", "read -r _"], "machine", stdin=subprocess.PIPE)

    def _start(self, command: list[str], name: str, stdin: int = subprocess.DEVNULL) -> int:
        """Starts a process that forks into the process namespace; the child's id, once it is there."""
        log = self.scratch / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=stdin, stdout=output, stderr=output, env={"PATH": SEARCH_PATH}, start_new_session=True
            )
        self._started.append(process)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and process.poll() is None:
            # Until it has become the program asked for (or what that becomes), the child has not entered all its
            # namespaces. Parents are listed before their children.
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if child.name() not in ("nsenter", "unshare"):
                        return child.pid
            time.sleep(0.02)
        raise RuntimeError(f"{name} did not start: {log.read_text()}")
