"""Python imports this at start-up wherever this folder is on PYTHONPATH: it strikes one rank at one exact moment.

FAULT is JSON: {"rank": 1, "event": "os.rename", "path": "00000002.partial", "nth": 1, "action": "kill"}. The audit
event (docs.python.org/3/library/audit_events.html) is raised before the operation that it announces is done; `path` is
any part of its first argument. Actions: kill (SIGKILL to itself), raise (RuntimeError) and run (a shell's "command",
after which the operation goes on). With "node" only a rank on that node of a Slurm cluster is struck;
with "every" at each such moment.
"""

import json
import os
import signal
import subprocess
import sys
from typing import Any


def install(fault: dict[str, Any]) -> None:
    """Waits for the fault's moment in this process."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event != fault["event"] or not arguments or fault["path"] not in str(arguments[0]):
            return
        seen += 1
        if seen != fault.get("nth", 1) and not fault.get("every"):
            return
        print(f"fault: rank {fault['rank']}, {event} {arguments[0]}", file=sys.stderr, flush=True)
        if fault["action"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault["action"] == "run":
            subprocess.run(["sh", "-c", fault["command"]], check=True)
            return
        raise RuntimeError("a fault of one rank alone")

    sys.addaudithook(hook)


if "FAULT" in os.environ and "RANK" in os.environ:
    wanted = json.loads(os.environ["FAULT"])
    here = wanted.get("node") in (None, os.environ.get("SLURMD_NODENAME"))
    if here and wanted["rank"] == int(os.environ["RANK"]):
        install(wanted)
