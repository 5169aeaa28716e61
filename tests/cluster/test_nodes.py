"""The two nodes themselves: they are two, they reach each other, and nothing of them is left."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.two_nodes import FORWARDED, TwoNodes

pytestmark = pytest.mark.cluster
ALL_REDUCE = Path(__file__).with_name("all_reduce.py")
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240


def test_the_launcher_starts_ranks_on_both_nodes(cluster: TwoNodes, tmp_path: Path) -> None:
    """From a hostfile; from the default one, `test_training` does."""
    command = ["deepspeed", "--num_nodes", "2", "--hostfile", str(cluster.hostfile), str(ALL_REDUCE), str(tmp_path)]
    finished = cluster.run(command, cwd=tmp_path, timeout=SECONDS)
    assert finished.returncode == 0, finished.output
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert [report["host"] for report in reports] == ["node-a", "node-a", "node-b", "node-b"]
    assert [report["local_rank"] for report in reports] == [0, 1, 0, 1]
    assert all(report["total"] == 0b1111 for report in reports)
    assert all(report["environment"].items() >= FORWARDED.items() for report in reports)


def test_a_failing_rank_fails_the_command(cluster: TwoNodes, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import os, sys\nsys.exit(7 if os.environ['RANK'] == '3' else 0)\n")
    command = ["deepspeed", "--num_nodes", "2", "--hostfile", str(cluster.hostfile), str(script)]
    assert cluster.run(command, cwd=tmp_path, timeout=SECONDS).returncode != 0


def test_a_node_has_its_own_files_where_a_machine_has(cluster: TwoNodes, tmp_path: Path) -> None:
    cluster.serve_default_hostfile()
    script = "hostname; cat /job/hostfile; touch /dev/shm/mine; hostname -I; ssh node-b ls -A /dev/shm"
    finished = cluster.run(["bash", "-c", script], cwd=tmp_path, timeout=SECONDS)
    assert finished.returncode == 0, finished.output
    assert finished.output.split() == ["node-a", "node-a", "slots=2", "node-b", "slots=2", "10.77.0.1"]
    assert socket.gethostname() != "node-a" and not os.path.exists("/dev/shm/mine")
    assert "10.77.0." not in subprocess.run(["ip", "addr"], capture_output=True, text=True, check=True).stdout


def test_a_killed_test_leaves_no_process(cluster: TwoNodes, tmp_path: Path) -> None:
    """kill -9 of the process that holds two nodes, amid a command on both; other nodes do not notice."""
    (tmp_path / "held").mkdir()
    holder = textwrap.dedent(f"""
        from pathlib import Path
        from tests.cluster.two_nodes import FORWARDED, TwoNodes
        with TwoNodes(Path({str(tmp_path / "held")!r})) as nodes:
            there = f"touch {tmp_path}/$(hostname); sleep 1000"
            nodes.run(["bash", "-c", f"ssh node-b '{{there}}' & {{there}}"], cwd=Path("/"), timeout=1000)
    """)
    process = subprocess.Popen([sys.executable, "-c", holder], cwd=ROOT)
    deadline = time.monotonic() + SECONDS
    while not all((tmp_path / node).exists() for node in ("node-a", "node-b")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    everything = psutil.Process(process.pid).children(recursive=True)
    assert len(everything) >= 8
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(everything, timeout=SECONDS)
    assert not alive
    assert cluster.run(["ssh", "node-b", "hostname"], cwd=tmp_path, timeout=SECONDS).output.strip() == "node-b"


def test_a_command_that_hangs_is_ended(cluster: TwoNodes, tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="not done after 3 s; its output ends:\nwaiting"):
        cluster.run(["bash", "-c", "echo waiting; ssh node-b sleep 1000"], cwd=tmp_path, timeout=3)
