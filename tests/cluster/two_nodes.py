"""Two machines made of namespaces: ssh, pdsh and the deepspeed launcher see two hosts.

Each node has its own network (one end of a veth pair, called eth0), host name, /etc/hosts, /etc/shadow,
/job, /run and /dev/shm; the other files are shared, as they are on a cluster. A node's root folder is a
tmpfs with a bind mount of every entry of the real one, so /job exists there although the machine has none.

`tests.cluster.namespaces` says how all of it ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.namespaces import NODE, PATIENCE, SEARCH_PATH, Machines, program

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


class TwoNodes(Machines):
    """node-a and node-b, for as long as the `with` block lasts.

    `scratch` is an empty folder: keys, configuration, logs and the hostfile go there.
    """

    def __init__(self, scratch: Path, slots: int = 2) -> None:
        super().__init__(scratch)
        self.hostfile = scratch / "hostfile"
        self.hostfile.write_text(f"node-a slots={slots}\nnode-b slots={slots}\n")
        self._nodes: list[Node] = []
        self._commands = 0

    def _boot(self) -> None:
        self._write_files()
        machine = self._start_machine()
        for name, address in (("node-a", "10.77.0.1"), ("node-b", "10.77.0.2")):
            inside = ["nsenter", f"--target={machine}", "--pid", "--mount"]
            script = ["bash", "-c", NODE_SCRIPT, "node", name, str(self.scratch), str(program("sshd"))]
            self._nodes.append(Node(name, address, self._start([*inside, *NODE, *script], name)))
        self._join_networks()
        self._wait_for_sshd()

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
                process.wait(timeout=PATIENCE)
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

    def _join_networks(self) -> None:
        a, b = self._nodes
        link = ["ip", "link", "add", "eth0", "netns", str(a.pid), "type", "veth"]
        subprocess.run([*link, "peer", "name", "eth0", "netns", str(b.pid)], check=True, env={"PATH": SEARCH_PATH})
        for node in self._nodes:
            for command in (f"addr add {node.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                enter = ["nsenter", f"--target={node.pid}", "--net", "ip", *command.split()]
                subprocess.run(enter, check=True, env={"PATH": SEARCH_PATH})

    def _wait_for_sshd(self) -> None:
        deadline = time.monotonic() + PATIENCE
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
