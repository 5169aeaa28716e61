"""Takes a run back to an earlier checkpoint, as after a spike of the loss.

    python launch/rollback.py RUN --step 1000

The next start continues from that step. Newer checkpoints are not deleted: they go to set-aside-TIME beside those that
stay, and metrics.jsonl is copied to metrics-TIME.jsonl, because a start drops its lines after the step it continues
from. Run it where the run was started, once its job has ended. Exit status: 0 done, 2 it cannot be done.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.config import JobConfig
from launch.plurals import counted
from launch.run_lock import lock_run
from launch.saving.checkpoint_names import complete_steps, newest_checkpoint, step_name
from launch.saving.storage import storage_at
from launch.standard_output import output_matters
from launch.user_path import user_path


def roll_back(run: Path, step: int) -> str:
    """Says what was done. Raises ConfigError where `run` is no run, RunDirectoryError while it trains,
    CheckpointError where it has no such checkpoint, and OSError. After a kill the same call completes it."""
    storage = storage_at(JobConfig.of_run(run).checkpoint_location_from(run))
    lock = lock_run(run)
    try:
        name = newest_checkpoint(storage, step)
        newer = [known for known in complete_steps(storage) if known > step]
        if not newer:
            return f"{name} is the newest checkpoint of {run} already: nothing was changed"
        stamp = time.strftime("%Y%m%d-%H%M%S")
        metrics, folder = run / "metrics.jsonl", f"set-aside-{stamp}"
        if metrics.exists():
            shutil.copy2(metrics, metrics.with_stem(f"metrics-{stamp}"))
        for known in reversed(newer):  # the newest first: whatever ends this, those that stay are the run's oldest
            storage.set_aside(step_name(known), folder)
        return (
            f"the next start of {run} continues from {name}; {counted(len(newer), 'newer checkpoint')} "
            f"({', '.join(map(step_name, newer))}) set aside in {storage.location}/{folder}"
        )
    finally:
        if lock is not None:
            lock.close()


@output_matters
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=user_path, metavar="RUN", help="run directory")
    parser.add_argument("--step", type=int, required=True, help="step of the checkpoint to continue from")
    options = parser.parse_args(arguments)
    try:
        print(roll_back(options.run, options.step))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
