"""Validation loss of a trained model, also by position: `deepspeed --num_gpus 4 launch/run_eval.py --run runs/NAME`.

Exit status: 0 done, 1 failed, 2 the configuration is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

from launch.config import load_job
from launch.environment import DeviceUnavailable, choose_device, end_process, place_in_world, report_failure
from launch.settings.violations import ConfigError
from launch.standard_output import output_matters
from launch.user_path import user_path
from launch.weights.stored_model import RUN_FILE


@output_matters
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parse(arguments)
    place = place_in_world()
    # Whatever the job says of the model must fit these weights: the rules of model.init_from see to that.
    overrides = [*options.overrides, f"model.init_from={json.dumps(str(options.run), ensure_ascii=False)}"]
    if options.config is None and not (options.run / RUN_FILE).is_file():
        report_failure(f"{options.run} has no {RUN_FILE}; name the job whose data to use with --config", place)
        return 2
    try:
        job = load_job(options.config or options.run / RUN_FILE, overrides, place.world_size)
        device, _ = choose_device(job.job.device, place)
    except (ConfigError, DeviceUnavailable) as error:
        report_failure(str(error), place)
        return 2
    from launch.inference.evaluation import evaluate_weights  # DeepSpeed looks for the device that was just chosen

    try:
        evaluate_weights(job, options.step, place, device, options.first_bucket, options.output)
    except (ValueError, OSError) as error:  # weights, corpus, kernel: the user's to mend
        report_failure(f"error: {error}", place)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=user_path, required=True, help="a run, or a model that convert.py from-hf wrote")
    parser.add_argument("--step", type=int, help="checkpoint to take (default: the newest)")
    parser.add_argument("--config", type=user_path, help="job whose data and layout to use (default: the run's)")
    parser.add_argument("--first_bucket", type=int, help="tokens of the first range; each further one doubles")
    parser.add_argument("--output", type=user_path, help="JSON (default: evaluation-CHECKPOINT.json in the folder)")
    parser.add_argument("--local_rank", type=int, help="given by the launcher; the environment is read instead")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="another layout, a longer sequence_length"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.first_bucket is not None and options.first_bucket < 1:
        parser.error(f"--first_bucket ({options.first_bucket}) must be at least 1")
    folder = options.run if options.output is None else options.output.parent
    if options.output is not None and (not folder.is_dir() or options.output.is_dir()):
        parser.error(
            f"--output {options.output} must be a file in a folder that exists; make {folder}, or name another"
        )
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        parser.error(f"the result cannot be written to {folder}; name a file elsewhere with --output")
    return options


if __name__ == "__main__":
    end_process(main())
