"""Two machines made of namespaces: ssh, pdsh and the deepspeed launcher see two hosts.

Each node has its own network (one end of a veth pair, called eth0), host name, /etc/hosts, /etc/shadow,
/job, /run and /dev/shm; the other files are shared, as they are on a cluster. A node's root folder is a
tmpfs with a bind mount of every entry of the real one, so /job exists there although the machine has none.

All of it hangs on one process: the init of a process namespace, which waits for the end of a pipe that the
test process holds. When the pipe closes, also because the test process was killed with -9, init ends, the
kernel ends every other process of that namespace, and the last namespaces, links and mounts go with them.
Nothing has a name on the machine, so two runs at a time cannot meet and an aborted one leaves nothing
behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

PROGRAMS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
FORWARDED = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_IB_HCA": "mlx5_0,mlx5_1"}
"""Variables that every rank must see, on whichever node."""
_PATIENCE = 120.0
"""Seconds that a node may take to be there on a busy machine."""
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/bin", "/bin"])
MACHINE = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc"]
NODE = ["unshare", "--net", "--uts", "--mount", "--propagation=private"]

NODE_SCRIPT = r"""
set -eu
name=$1 scratch=$2 sshd=$3 root=$2/$1.root
hostname "$name"
mkdir "$root"
mount -t tmpfs -o mode=755 "$name" "$root"
for entry in /*; do
    if [ -L "$entry" ]; then cp -P "$entry" "$root/"
    elif [ -d "$entry" ]; then mkdir "$root$entry"; mount --rbind "$entry" "$root$entry"
    else touch "$root$entry"; mount --bind "$entry" "$root$entry"
    fi
done
mkdir -p "$root/job"
mount --bind "$scratch/job" "$root/job"
mount --bind "$scratch/hosts" "$root/etc/hosts"
mount --bind "$scratch/shadow" "$root/etc/shadow"
mount -t tmpfs run "$root/run"
mkdir "$root/run/sshd"
mount -t tmpfs shm "$root/dev/shm"
exec chroot "$root" "$sshd" -D -e -f "$scratch/sshd_config"
"""

SSHD_CONFIG = """\
Port 22
HostKey {scratch}/host_key
AuthorizedKeysFile {scratch}/user_key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
PidFile none
MaxStartups 100
"""

SSH_CONFIG = """\
Host *
    IdentityFile {scratch}/user_key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


def program(name: str) -> str | None:
    """Absolute path of a system program, the sbin folders included, or None."""
    return shutil.which(name, path=SEARCH_PATH)


def what_is_missing() -> str | None:
    """The system program or permission without which no node can be made here, or None."""
    missing = [f"{name} (Debian package {package})" for name, package in PROGRAMS.items() if not program(name)]
    if missing:
        return f"missing system programs: {', '.join(missing)}"
    if os.geteuid() != 0:
        return f"network namespaces and sshd need root, and this is uid {os.geteuid()}"
    # A container may forbid namespaces, new mounts of /proc, or the veth driver to its root.
    link = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]
    probe = subprocess.run([*MACHINE, *NODE, *link], capture_output=True, text=True, env={"PATH": SEARCH_PATH})
    if probe.returncode:
        return f"this system does not let root make namespaces joined by veth: {probe.stderr.strip()}"
    return None


@dataclass(frozen=True)
class Node:
    name: str
    address: str
    pid: int
    """Of the node's sshd, as the real machine counts."""


@dataclass(frozen=True)
class Finished:
    returncode: int
    output: str
    """Standard output and error, in the order they came."""
    seconds: float


class TwoNodes:
    """node-a and node-b, for as long as the `with` block lasts.

    `scratch` is an empty folder: keys, configuration, logs and the hostfile go there.
    """

    def __init__(self, scratch: Path, slots: int = 2) -> None:
        self.scratch = scratch
        self.hostfile = scratch / "hostfile"
        self.hostfile.write_text(f"node-a slots={slots}\nnode-b slots={slots}\n")
        self._started: list[subprocess.Popen[bytes]] = []
        self._nodes: list[Node] = []
        self._commands = 0

    def __enter__(self) -> Self:
        try:
            self._write_files()
            machine = self._start([*MACHINE, "bash", "-c", "read -r _"], "machine", stdin=subprocess.PIPE)
            for name, address in (("node-a", "10.77.0.1"), ("node-b", "10.77.0.2")):
                inside = ["nsenter", f"--target={machine}", "--pid", "--mount"]
                script = ["bash", "-c", NODE_SCRIPT, "node", name, str(self.scratch), str(program("sshd"))]
                self._nodes.append(Node(name, address, self._start([*inside, *NODE, *script], name)))
            self._join_networks()
            self._wait_for_sshd()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process of both nodes; the kernel takes the namespaces and mounts back by itself."""
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

    def serve_default_hostfile(self) -> None:
        """Put the hostfile where DeepSpeed looks by itself: /job/hostfile, on the nodes alone."""
        shutil.copy(self.hostfile, self.scratch / "job" / "hostfile")

    def run(self, command: list[str], *, cwd: Path, timeout: float) -> Finished:
        """Run a command on node-a, as a user logged in there would, and wait for it.

        The environment is made here and nothing is inherited: DeepSpeed would forward a PYTHONPATH of the
        test process, and hide that a package is not installed. Raises TimeoutError, with the end of the
        output, after `timeout` seconds; the nodes are gone then.
        """
        self._commands += 1
        log = self.scratch / f"command-{self._commands}.log"
        started = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._on(self._nodes[0], ["bash", "-c", 'cd "$0" && exec "$@"', str(cwd), *command]),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(),
            )
            try:
                returncode = process.wait(timeout)
            except BaseException as error:
                self.close()
                process.wait(timeout=10)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                tail = log.read_text(errors="replace")[-4000:]
                raise TimeoutError(
                    f"{' '.join(command)}: not done after {timeout} s; its output ends:\n{tail}"
                ) from None
        return Finished(returncode, log.read_text(errors="replace"), time.monotonic() - started)

    def _environment(self) -> dict[str, str]:
        path = [self.scratch / "bin", Path(sys.executable).parent, SEARCH_PATH]
        return {
            "PATH": os.pathsep.join(map(str, path)),
            "HOME": os.environ.get("HOME", "/root"),
            "USER": "root",
            "LANG": "C.UTF-8",
            "DS_ENV_FILE": str(self.scratch / ".deepspeed_env"),
            **self._job_environment(),
        }

    def _job_environment(self) -> dict[str, str]:
        extensions = self.scratch / "extensions"
        return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(extensions)}

    def _write_files(self) -> None:
        (self.scratch / "job").mkdir()
        (self.scratch / "bin").mkdir()
        for key in ("user_key", "host_key"):
            path = self.scratch / key
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
        hosts = "127.0.0.1 localhost\n10.77.0.1 node-a\n10.77.0.2 node-b\n"
        (self.scratch / "hosts").write_text(hosts)
        # Without PAM, sshd turns root away where its password is locked with "!", as some distributions do.
        (self.scratch / "shadow").write_text("root:*:19000:0:99999:7:::\n")
        (self.scratch / "sshd_config").write_text(SSHD_CONFIG.format(scratch=self.scratch))
        (self.scratch / "ssh_config").write_text(SSH_CONFIG.format(scratch=self.scratch))
        # First on PATH, because the launcher and pdsh start plain `ssh`: no personal settings are read.
        ssh = self.scratch / "bin" / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {program("ssh")} -F {self.scratch}/ssh_config "$@"\n')
        ssh.chmod(0o755)
        # DeepSpeed forwards only a few variables to the nodes; the others come from this file, which may hold
        # neither a comment nor an empty line.
        variables = self._job_environment() | FORWARDED
        lines = "".join(f"{key}={value}\n" for key, value in variables.items())
        (self.scratch / ".deepspeed_env").write_text(lines)

    def _start(self, command: list[str], name: str, stdin: int = subprocess.DEVNULL) -> int:
        """Start a process that forks into the process namespace; the child's id, once it is there."""
        with (self.scratch / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=log,
                stderr=log,
                env={"PATH": SEARCH_PATH},
                start_new_session=True,
            )
        self._started.append(process)
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and process.poll() is None:
            children = psutil.Process(process.pid).children()
            # Until it has become the program asked for, the child has not entered all its namespaces.
            if children and children[0].name() not in ("unshare", "nsenter"):
                return children[0].pid
            time.sleep(0.02)
        raise RuntimeError(f"{name} did not start: {(self.scratch / f'{name}.log').read_text()}")

    def _join_networks(self) -> None:
        a, b = self._nodes
        link = ["ip", "link", "add", "eth0", "netns", str(a.pid), "type", "veth"]
        subprocess.run([*link, "peer", "name", "eth0", "netns", str(b.pid)], check=True, env={"PATH": SEARCH_PATH})
        for node in self._nodes:
            for command in (f"addr add {node.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                enter = ["nsenter", f"--target={node.pid}", "--net", "ip", *command.split()]
                subprocess.run(enter, check=True, env={"PATH": SEARCH_PATH})

    def _wait_for_sshd(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        for node in self._nodes:
            command = self._on(self._nodes[0], ["ssh", node.name, "hostname"])
            while True:
                answer = subprocess.run(command, capture_output=True, text=True, env=self._environment())
                if answer.returncode == 0 and answer.stdout.strip() == node.name:
                    break
                if time.monotonic() > deadline:
                    log = (self.scratch / f"{node.name}.log").read_text()
                    raise RuntimeError(f"no ssh to {node.name}: {answer.stdout}{answer.stderr}\nits sshd: {log}")
                time.sleep(0.1)

    @staticmethod
    def _on(node: Node, command: list[str]) -> list[str]:
        """The command that runs `command` on a node, in its root folder."""
        return [
            "nsenter",
            f"--target={node.pid}",
            "--pid",
            "--net",
            "--uts",
            "--mount",
            "--root",
            "--wd",
            *command,
        ]
