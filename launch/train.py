"""Trains a job: `deepspeed launch/train.py --config configs/NAME.yaml [section.key=value ...]`.

    --config FILE          the job; without it, the quickstart
    --check                say whether the job is valid and how it would be laid out, and stop; needs no GPU
    --world_size N         processes to check for (with --check)

Exit status: 0 done, 1 failed, 2 the configuration is wrong.
"""

from __future__ import annotations

import argparse
import importlib.resources
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.check import layout_report
from launch.config import load_job
from launch.environment import choose_device, place_in_world
from launch.violations import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parse(arguments)
    place = None if options.check else place_in_world()
    first = place is None or place.rank == 0
    world_size = options.world_size if place is None else place.world_size
    path = Path(options.config) if options.config else quickstart()
    try:
        # Every rank looks, so that all of them stop before any waits for another; rank 0's reading is what counts.
        job = load_job(path, options.overrides, world_size)
    except ConfigError as error:
        if first:
            print(error, file=sys.stderr)
        return 2
    if place is None:
        print(layout_report(job, world_size or 1))
        return 0
    device, device_note = choose_device(job.job.device, place)
    from launch.run import run  # DeepSpeed looks for its accelerator when imported; choose_device has just named it

    return run(job, place, device, device_note)


def quickstart() -> Path:
    """The job that needs no file of the user's."""
    return Path(str(importlib.resources.files("configs") / "quickstart.yaml"))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", help="YAML file of the job (default: the quickstart)")
    parser.add_argument("--check", action="store_true", help="validate the job and print its layout, then stop")
    parser.add_argument("--world_size", type=int, help="number of processes, for --check")
    parser.add_argument("--local_rank", type=int, help="given by the launcher; the environment is read instead")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override one key")
    options = parser.parse_intermixed_args(arguments)
    if options.world_size is not None and not options.check:
        parser.error("--world_size goes with --check; a real job takes its size from the launcher")
    return options


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status) if status == 0 else sys.exit(status)
