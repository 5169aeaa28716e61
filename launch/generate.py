"""Writes text with a trained model: `python launch/generate.py --run runs/NAME --prompt "def main("`.

A model larger than one GPU: `deepspeed --num_gpus 4 launch/generate.py ...` splits it over four (tensor parallelism).
Exit status: 0 done, 1 failed, 2 a wrong command.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from launch.environment import choose_device, end_process, place_in_world, report_failure
from launch.inference.sampling import Sampling
from launch.standard_output import output_matters
from launch.user_path import user_path
from launch.weights.stored_model import stored_model


@output_matters
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parse(arguments)
    place = place_in_world()
    try:
        stored_model(options.run)  # a wrong folder is said before anything starts
        prompts = [*options.prompt, *map(_text, options.prompt_file)]
        device, _ = choose_device(options.device, place)
        from launch.inference.writing import Request, write_texts  # DeepSpeed looks for the device that was just chosen

        request = Request(
            folder=options.run,
            step=options.step,
            prompts=prompts,
            max_tokens=options.max_tokens,
            sampling=options.sampling,
            stops=options.stop,
            precision=options.precision,
            as_json=options.json,
        )
        write_texts(request, place, device)
    except (ValueError, OSError) as error:  # weights, tokenizer, device, kernel or layout: the user's to mend
        report_failure(f"error: {error}", place)
        return 1
    return 0


def _text(path: Path) -> str:
    """Raises ValueError, OSError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt_file {path} is not UTF-8 text (at byte {error.start}); save it as UTF-8") from error


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=user_path, required=True, help="a run, or a model that convert.py from-hf wrote")
    parser.add_argument("--step", type=int, help="checkpoint to take (default: the newest)")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; repeat it for a batch")
    parser.add_argument("--prompt_file", type=user_path, action="append", default=[], help="file with such a text")
    parser.add_argument("--max_tokens", type=int, default=128, help="most tokens to write (default: 128)")
    parser.add_argument(
        "--temperature", type=float, default=Sampling.temperature, help="0: take the likeliest token (default: 0.8)"
    )
    parser.add_argument("--top_k", type=int, default=Sampling.top_k, help="draw among the K likeliest (default 0: all)")
    parser.add_argument(
        "--top_p",
        type=float,
        default=Sampling.top_p,
        help="draw among the likeliest of this total probability (default 1: all)",
    )
    parser.add_argument("--seed", type=int, default=Sampling.seed, help="prompt i draws from seed + i (default: 0)")
    parser.add_argument("--stop", action="append", default=[], help="end before this text; may be repeated")
    parser.add_argument("--json", action="store_true", help="one object a line: prompt, text, tokens, what ended it")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    parser.add_argument("--local_rank", type=int, help="given by the launcher; the environment is read instead")
    options = parser.parse_args(arguments)
    if not options.prompt and not options.prompt_file:
        parser.error("give --prompt or --prompt_file")
    if options.max_tokens < 1:
        parser.error(f"--max_tokens ({options.max_tokens}) must be at least 1")
    if "" in options.stop:
        parser.error("--stop must not be empty: every text contains that")
    try:
        options.sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    except ValueError as error:
        parser.error(f"--{error}")
    return options


if __name__ == "__main__":
    end_process(main())
