"""Converts models from and to the Hugging Face format.

    python launch/convert.py from-hf FOLDER OUT                 a downloaded model -> OUT, for model.init_from
    python launch/convert.py to-hf RUN OUT [--step N] [--dtype bf16]
                                                                a run or a converted model -> OUT, for transformers

One tensor is in memory at a time, and one shard of the result (2 GiB). OUT appears when it is complete.
Exit status: 0 done, 1 failed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from launch.atomic_files import completed_folder
from launch.config import JobConfig
from launch.data.encoders import BYTES, ByteEncoder, byte_tokenizer, tokenizer_for
from launch.precision import DTYPES
from launch.standard_output import output_matters
from launch.user_path import user_path
from launch.weights.hugging_face import COMPANIONS, config_for, model_from, their_name
from launch.weights.safetensors_folder import SHARD_BYTES, SafetensorsFolder, ShardWriter
from launch.weights.stored_model import (
    COMPANION_FOLDER,
    RUN_FILE,
    WeightsError,
    check_shapes,
    parameter_shapes,
    stored_model,
    write_model,
)
from launch.weights.suitability import longest_context

_UNKNOWN_CONTEXT = 2048
"""Tokens of context that an export names where nothing says how long sequences were: transformers' own default."""


@output_matters
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parse(arguments)
    try:
        if options.command == "from-hf":
            print(from_hf(options.folder, options.out))
        else:
            print(to_hf(options.run, options.out, step=options.step, dtype=DTYPES.get(options.dtype)))
    except (ValueError, OSError) as error:  # weights, a model or a run's configuration: the user's to mend
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def from_hf(folder: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> str:
    """Writes the Hugging Face model in `folder` as weights that a job can start from; returns what to do with them.

    Tensors keep their dtype. Raises UnsupportedModel and WeightsError; `out` does not exist then.
    """
    config = _read_config(folder)
    model, files = model_from(config), SafetensorsFolder(folder)
    shapes = parameter_shapes(model)
    _check_tensors(files, {their_name(name): shape for name, shape in shapes.items()}, model.tie_word_embeddings)
    _check_absent(out)
    with completed_folder(out) as partial:
        writer = ShardWriter(partial, shard_bytes)
        for name, shape in shapes.items():
            theirs = their_name(name)
            tensor = torch.empty(shape, dtype=files.dtypes[theirs])
            files.read(theirs, (0,) * len(shape), tensor)
            writer.add(name, tensor)
        writer.finish()
        write_model(partial, model)
        companions = partial / COMPANION_FOLDER
        companions.mkdir()
        for name in ("config.json", *COMPANIONS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, companions / name)
    tokenizer = out / COMPANION_FOLDER / "tokenizer.json"
    advice = f"model.init_from={out}" + (f" data.tokenizer={tokenizer_for(tokenizer)}" if tokenizer.is_file() else "")
    return f"{out}: {_size(shapes)}; a job starts from it with {advice}"


def to_hf(
    run: Path, out: Path, *, step: int | None = None, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> str:
    """Writes a run's weights, or a converted model's, as a folder that transformers loads; returns what was written.

    Without `dtype` numbers stay as they are stored: fp32 from a run. Raises UnsupportedModel and WeightsError; `out`
    does not exist then.
    """
    from launch.weights.reader import Part, open_weights  # imports DeepSpeed, which the other direction does not need

    model, weights = stored_model(run), open_weights(run, step, verify=True)
    kept = run / COMPANION_FOLDER
    source = _read_config(kept) if (kept / "config.json").is_file() else None
    common = dtype or weights.dtypes["embed_tokens.weight"]
    config = config_for(
        model,
        max_position_embeddings=longest_context(run) or _UNKNOWN_CONTEXT,
        dtype=str(common).removeprefix("torch."),
        source=source,
    )
    _check_absent(out)
    with completed_folder(out) as partial:
        writer = ShardWriter(partial, shard_bytes)
        for name, shape in weights.shapes.items():
            tensor = torch.empty(shape, dtype=dtype or weights.dtypes[name])
            weights.read([Part(name, (0,) * len(shape), tensor)])
            writer.add(their_name(name), tensor)
        writer.finish()
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer = _write_companions(run, partial, config)
    return f"{out}: {config['architectures'][0]}, {_size(weights.shapes)} of {weights.origin}; {tokenizer}"


def _check_absent(out: Path) -> None:
    if out.exists():
        raise WeightsError(f"{out} exists already; name a folder that does not, or move it away")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{folder} has no config.json; give the folder of a downloaded model") from None
    except ValueError as error:
        raise WeightsError(f"{folder / 'config.json'} is not JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{folder / 'config.json'} is not a group of keys; download it again")
    return config


def _check_tensors(files: SafetensorsFolder, wanted: dict[str, tuple[int, ...]], tied: bool) -> None:
    """Like `check_shapes`, but a tied head may be stored a second time, and old files hold RoPE's frequencies."""
    ignored = {"lm_head.weight"} if tied else set()
    found = {
        name: shape
        for name, shape in files.shapes.items()
        if name not in ignored and not name.endswith("rotary_emb.inv_freq")
    }
    check_shapes(found, wanted, str(files.folder))


def _write_companions(run: Path, out: Path, config: dict[str, Any]) -> str:
    """Tokenizer and generation config, as far as they are known; returns what to say about the tokenizer."""
    for name in COMPANIONS:
        if (run / COMPANION_FOLDER / name).is_file():
            shutil.copyfile(run / COMPANION_FOLDER / name, out / name)
    generation = out / "generation_config.json"
    if not generation.exists():
        ids = {key: value for key, value in config.items() if key.endswith("_token_id") and value is not None}
        generation.write_text(json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n")
    if (out / "tokenizer.json").exists() or (out / "tokenizer.model").exists():
        return "tokenizer copied"
    if not (run / RUN_FILE).is_file():
        return "its tokenizer is not known"
    job = JobConfig.of_run(run)
    if job.data.tokenizer != BYTES:
        tokenizer = Path(job.data.tokenizer)
        if not tokenizer.is_file():
            return f"the tokenizer {tokenizer} is not there any more and was not copied"
        shutil.copyfile(tokenizer, out / "tokenizer.json")
        said = "tokenizer copied"
    elif job.data.source == "indexed" and job.model.vocab_size > ByteEncoder.vocab_size:
        return "its tokenizer is not known: the corpus was made of tokens, and data.tokenizer was left at bytes"
    else:
        byte_tokenizer().save(str(out / "tokenizer.json"))
        said = "a tokenizer whose tokens are the bytes of UTF-8"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"]}
    settings["clean_up_tokenization_spaces"] = False  # transformers 4 would take spaces away before punctuation
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return said


def _size(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return f"{sum(math.prod(shape) for shape in shapes.values()):,} parameters"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    incoming = commands.add_parser("from-hf", help="a downloaded Hugging Face model -> weights for model.init_from")
    incoming.add_argument("folder", type=user_path, help="folder with config.json and *.safetensors")
    incoming.add_argument("out", type=user_path, help="folder to write; must not exist")
    outgoing = commands.add_parser("to-hf", help="a run or a converted model -> a folder for transformers")
    outgoing.add_argument("run", type=user_path, help="run directory, or a folder that from-hf wrote")
    outgoing.add_argument("out", type=user_path, help="folder to write; must not exist")
    outgoing.add_argument("--step", type=int, help="checkpoint to take (default: the newest)")
    outgoing.add_argument("--dtype", choices=list(DTYPES), help="round to this type (default: as stored)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
