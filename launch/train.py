"""Trains a job: `deepspeed launch/train.py --config configs/NAME.yaml [section.key=value ...]`.

Exit status: 0 done, 1 failed, 2 the configuration is wrong, 75 stopped by SIGUSR2 or SIGTERM with a checkpoint saved,
76 ended by the watchdog of a run that hung.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.resources
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.check import layout_report, planned_world_size
from launch.config import load_job
from launch.data.inspection import inspect_data
from launch.environment import choose_device, end_process, place_in_world, report_failure
from launch.precision import check_precision
from launch.settings.violations import ConfigError
from launch.standard_output import output_matters
from launch.stopping import StopRequests
from launch.user_path import user_path

_MOST_PROCESSES = 1_000_000_000
"""That --check lays out: MPI and torch number ranks in 32 bits."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parse(arguments)
    path = options.config or quickstart()
    if options.check:
        return _check(path, options.overrides, options.world_size)
    place = place_in_world()
    faulthandler.enable(all_threads=False)  # a rank that dies of a fault in some library's C++ tells where it was
    stop = StopRequests(place)
    try:
        # Every rank looks, so that all of them stop before any waits for another; rank 0's reading is what counts.
        job = load_job(path, options.overrides, place.world_size)
        device, device_note = choose_device(job.job.device, place)
        check_precision(job.resolve_precision(device.type), device.type)
    except ValueError as error:  # ConfigError, DeviceUnavailable, and a precision that the device lacks
        report_failure(str(error), place)
        return 2
    from launch.run import run  # DeepSpeed looks for its accelerator when imported; choose_device has just named it

    return run(job, place, device, device_note, stop)


@output_matters
def _check(path: Path, overrides: Sequence[str], world_size: int | None) -> int:
    """Prints the job's layout, or what is wrong with it; returns the exit status."""
    try:
        if world_size is None:
            world_size, reason = planned_world_size(load_job(path, overrides))
            print(f"--world_size is not given: {reason}")
        job = load_job(path, overrides, world_size)
        print(layout_report(job, world_size))
        found, faults = inspect_data(job)
        if lines := found or faults:  # what this machine lacks may be on the nodes, so that is no error
            print("\ndata, as this machine sees it", *lines, sep="\n  ")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def quickstart() -> Path:
    """The job that needs no file of the user's."""
    return Path(str(importlib.resources.files("configs") / "quickstart.yaml"))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=user_path, help="YAML file of the job (default: the quickstart)")
    parser.add_argument("--check", action="store_true", help="say whether the job is valid, and its layout; no GPU")
    parser.add_argument("--world_size", type=int, help="for --check (default: as the slurm section asks, else tp x cp)")
    parser.add_argument("--local_rank", type=int, help="given by the launcher; the environment is read instead")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override one key")
    options = parser.parse_intermixed_args(arguments)
    if options.world_size is not None and not options.check:
        parser.error("--world_size goes with --check; a real job takes its size from the launcher")
    if options.world_size is not None and not 1 <= options.world_size <= _MOST_PROCESSES:
        parser.error(f"--world_size ({options.world_size}) must be at least 1 and at most {_MOST_PROCESSES:,}")
    return options


if __name__ == "__main__":
    end_process(main())
