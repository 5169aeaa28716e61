"""A real Slurm cluster on one machine: a controller and four nodes, each with its own network, host name and processes.

The controller's network holds a bridge; node-1 to node-4 hang on it by their eth0. Files are shared, as on a cluster,
but for /dev/shm. A node's processes live in a namespace of their own, so that killing its first process is a crash.

`tests.cluster.namespaces` says how all of it ends.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.namespaces import NODE, PATIENCE, SEARCH_PATH, Machines

PROGRAMS = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
}
NODES = ("node-1", "node-2", "node-3", "node-4")
CPUS = 4
"""Of each node, as Slurm counts them: more than the machine has, which only makes the ranks share."""

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=controller(10.78.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={scratch}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={scratch}/state
SlurmdSpoolDir={scratch}/spool-%n
SlurmctldPidFile={scratch}/slurmctld.pid
SlurmdPidFile={scratch}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=5
KillWait=15
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters={parameters}
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=100000,batch_sched_delay=0
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
"""

CONTROLLER = r"""
hostname controller
mount --bind "$0/hosts" /etc/hosts
ip link set lo up
ip link add bridge0 type bridge
ip addr add 10.78.0.1/24 dev bridge0
ip link set bridge0 up
munged --foreground --force --key-file="$0/munge.key" --socket="$0/munge.sock" --pid-file="$0/munged.pid" \
    --log-file="$0/munged.log" --seed-file="$0/munge.seed" &
until [ -S "$0/munge.sock" ]; do sleep 0.05; done
exec slurmctld -D -f "$0/slurm.conf"
"""

COMPUTE = r"""
hostname "$1"
mount --bind "$0/hosts" /etc/hosts
mount -t tmpfs shm /dev/shm
ip link set lo up
until ip link show eth0 >/dev/null 2>&1 && [ -S "$0/munge.sock" ]; do sleep 0.05; done
slurmd -D -N "$1" -f "$0/slurm.conf" &
wait
"""


def _has_heard(process: psutil.Process) -> bool:
    """Whether a signal waits for a process that is stopped, or it is not stopped any more."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    waiting = re.search(r"^ShdPnd:\s*(\w+)$", status, re.MULTILINE)
    return waiting is None or int(waiting[1], 16) != 0 or not re.search(r"^State:\s*[Tt]", status, re.MULTILINE)


class SlurmCluster(Machines):
    """`scratch` needs a short path."""

    def __init__(self, scratch: Path, parameters: str = "preempt_send_user_signal") -> None:
        super().__init__(scratch)
        self._parameters = parameters
        self._nodes: dict[str, int] = {}

    def _boot(self) -> None:
        self._write_files()
        self._machine = self._start_machine()
        self._controller = self._start(
            [*self._inside(), *NODE, "bash", "-euc", CONTROLLER, str(self.scratch)], "controller"
        )
        for name in NODES:
            self.boot(name)
        self.until(lambda: self.idle() == len(NODES))

    # -- what a user does ----------------------------------------------------------------------------------------------

    def run(
        self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the controller, as on a login node; nothing of the environment is inherited."""
        enter = [
            "nsenter",
            f"--target={self._controller}",
            "--net",
            "--uts",
            "--mount",
            "--pid",
            "--wd=" + str(cwd or "/"),
        ]
        variables = {
            "PATH": SEARCH_PATH,
            "SLURM_CONF": f"{self.scratch}/slurm.conf",
            "HOME": "/root",
            "LANG": "C.UTF-8",
        }
        return subprocess.run(
            [*enter, *command],
            capture_output=True,
            text=True,
            env=variables | dict(environment or {}),
            timeout=PATIENCE,
        )

    def command(self, *command: str, check: bool = True) -> str:
        """A command's standard output, stripped."""
        ended = self.run(*command)
        assert not check or ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    def facts(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", "--oneliner", str(job))))

    def state(self, job: int) -> str:
        return self.facts(job)["JobState"]

    def end(self, job: int) -> str:
        """Waits until the job is over; its last state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        return str(self.until(lambda: (state := self.state(job)) in over and state))

    def until(self, condition: Callable[[], Any], timeout: float = PATIENCE) -> Any:
        """The condition's first true value. Raises AssertionError when time runs out."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.2)  # what is asked costs the jobs more of the processor than its answer saves
        raise AssertionError(f"the moment did not come in {timeout} s; {self.command('squeue', '-l', check=False)}")

    def idle(self) -> int:
        """Nodes that wait for a job."""
        return int(self.command("sinfo", "-h", "-t", "idle", "-p", "main", "-o", "%D", check=False) or 0)

    # -- what only a test can do ---------------------------------------------------------------------------------------

    def boot(self, name: str) -> None:
        """Starts a node, or starts it again."""
        own = ["--pid", "--fork", "--kill-child", "--mount-proc"]
        script = ["bash", "-euc", COMPUTE, str(self.scratch), name]
        self._nodes[name] = self._start([*self._inside(), *NODE, *own, *script], name)
        self._join(NODES.index(name) + 1, self._nodes[name])

    def crash(self, name: str) -> None:
        """Ends a node at once, with everything that runs on it."""
        os.kill(self._nodes.pop(name), signal.SIGKILL)

    def processes(self, job: int) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
        """Every living process that inherited the job's environment, with that."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                mine = environment.get("SLURM_CONF") == f"{self.scratch}/slurm.conf"
                if mine and environment.get("SLURM_JOB_ID") == str(job) and process.status() != psutil.STATUS_ZOMBIE:
                    yield process, environment

    def ranks(self, job: int) -> dict[int, psutil.Process]:
        """Rank -> process of the living ranks, without what those have started themselves."""
        found = {process: int(variables["RANK"]) for process, variables in self.processes(job) if "RANK" in variables}
        known, ranks = {process.pid for process in found}, {}
        for process, rank in found.items():
            with suppress(psutil.Error):
                if process.ppid() not in known:
                    ranks[rank] = process
        return ranks

    def launchers(self, job: int, name: str) -> list[psutil.Process]:
        """Those whose command line has a word that ends with `name`, one for each node."""
        found = []
        for process, environment in self.processes(job):
            with suppress(psutil.Error):
                words = process.cmdline()
                inside = "RANK" not in environment and "SLURM_STEP_ID" in environment
                if inside and any(word.endswith(name) for word in words) and "srun" not in words[0]:
                    found.append(process)
        return found

    @contextmanager
    def stopped(self, process: psutil.Process) -> Iterator[None]:
        """Stands still until what the block sends has reached it: how long that takes on its way decides nothing."""
        process.suspend()
        try:
            yield
            self.until(lambda: _has_heard(process))
        finally:
            with suppress(psutil.NoSuchProcess):
                process.resume()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _write_files(self) -> None:
        (self.scratch / "state").mkdir()
        for name in NODES:
            (self.scratch / f"spool-{name}").mkdir()
        key = self.scratch / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        addresses = {name: f"10.78.0.{10 + number}" for number, name in enumerate(NODES, start=1)}
        hosts = "127.0.0.1 localhost\n10.78.0.1 controller\n"
        hosts += "".join(f"{address} {name}\n" for name, address in addresses.items())
        (self.scratch / "hosts").write_text(hosts)
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={address} CPUs={CPUS} RealMemory=4000" for name, address in addresses.items()
        )
        text = CONFIGURATION.format(scratch=self.scratch, nodes=nodes, parameters=self._parameters)
        (self.scratch / "slurm.conf").write_text(text.replace("SlurmctldParameters=\n", ""))

    def _inside(self) -> list[str]:
        return ["nsenter", f"--target={self._machine}", "--pid", "--mount"]

    def _join(self, number: int, node: int) -> None:
        port, address = f"port{number}", f"10.78.0.{10 + number}/24"
        inside = ["nsenter", f"--target={self._controller}", "--net", "ip", "link"]
        commands = [
            [*inside, "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(node)],
            ["nsenter", f"--target={node}", "--net", "ip", "addr", "add", address, "dev", "eth0"],
            ["nsenter", f"--target={node}", "--net", "ip", "link", "set", "eth0", "up"],
            [*inside, "set", port, "master", "bridge0", "up"],
        ]
        for command in commands:
            deadline = time.monotonic() + PATIENCE
            # The bridge is the controller's to make, at its own pace.
            while (
                ended := subprocess.run(command, capture_output=True, text=True, env={"PATH": SEARCH_PATH})
            ).returncode:
                assert time.monotonic() < deadline, ended.stderr
                time.sleep(0.05)
