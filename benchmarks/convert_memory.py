"""Peak memory and time of converting a Llama-shaped model both ways: `python benchmarks/convert_memory.py --layers 32`.

The model is made of zeros, in bf16, one layer at a time, so it may be larger than memory.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import launch.weights.reader  # noqa: F401  (imports DeepSpeed: its memory is not conversion's)
from launch.convert import from_hf, to_hf
from launch.weights.hugging_face import config_for, their_name
from launch.weights.safetensors_folder import ShardWriter
from launch.weights.stored_model import parameter_shapes
from model.config import ModelConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--shard-mib", type=int, default=2048)
    options = parser.parse_args()
    model = ModelConfig(
        vocab_size=128_256,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 7 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128,
        num_key_value_heads=8,
    )
    with tempfile.TemporaryDirectory() as folder:
        root, shard_bytes = Path(folder), options.shard_mib << 20
        write_source(root / "source", model)
        size = 2 * sum(math.prod(shape) for shape in parameter_shapes(model).values())
        print(f"model of {size / 2**30:.2f} GiB in bf16, shards of {options.shard_mib} MiB")
        measure("from-hf", lambda: from_hf(root / "source", root / "ours", shard_bytes))
        measure("to-hf", lambda: to_hf(root / "ours", root / "back", shard_bytes=shard_bytes))


def write_source(folder: Path, model: ModelConfig) -> None:
    folder.mkdir()
    writer = ShardWriter(folder, 1 << 30)
    for name, shape in parameter_shapes(model).items():
        writer.add(their_name(name), torch.zeros(shape, dtype=torch.bfloat16))
    writer.finish()
    config = config_for(model, max_position_embeddings=8192, dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config))


def measure(name: str, convert: Callable[[], Any]) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start = megabytes("VmRSS"), time.perf_counter()
    convert()
    grown = megabytes("VmHWM") - before
    print(f"{name:<8} peak memory {grown:,} MiB beyond the program's own, {time.perf_counter() - start:.1f} s")


def megabytes(line: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{line}:")[1].split()[0]) >> 10


if __name__ == "__main__":
    main()
