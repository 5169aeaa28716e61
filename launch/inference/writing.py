"""What generate.py does on every rank: prompts to tokens, tokens to texts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from launch.data.encoders import Encoder
from launch.environment import Place
from launch.inference.cache_room import check_cache_fits, free_memory
from launch.inference.generation import generate
from launch.inference.model import attention_on_one_device, end_tokens, load_model, tokenizer_of
from launch.inference.sampling import Sampling
from launch.plurals import counted
from launch.precision import DTYPES, Precision, resolve_precision
from launch.rendezvous import join_world
from parallel.mesh import MeshShape, ParallelMesh


@dataclass(frozen=True)
class Request:
    """What generate.py was asked for."""

    folder: Path
    step: int | None
    prompts: Sequence[str]
    max_tokens: int
    sampling: Sampling
    stops: Sequence[str]
    """Texts that end a text, and are not part of it."""
    precision: Precision | Literal["auto"]
    as_json: bool


def write_texts(request: Request, place: Place, device: torch.device) -> None:
    """Prints what follows each prompt. Collective: all ranks split the model. Raises ValueError, OSError."""
    join_world(device.type, place)
    mesh = ParallelMesh.create(MeshShape.fit(place.world_size, place.world_size, 1))
    dtype = DTYPES[resolve_precision(request.precision, device.type)]
    tokenizer, ends = tokenizer_of(request.folder), end_tokens(request.folder)
    prompts = [tokenizer.prompt(prompt) for prompt in request.prompts]
    model = load_model(request.folder, request.step, mesh, device, dtype)
    _check_prompts(prompts, model.config.vocab_size)
    check_cache_fits(
        model.config,
        prompts,
        request.max_tokens,
        asked="--max_tokens",
        tensor_parallel_size=mesh.tp_size,
        dtype=dtype,
        free=free_memory(device, place.local_size),
    )

    def finished(row: int, tokens: list[int]) -> bool:
        return tokens[-1] in ends or _first_stop(tokenizer.decode(tokens), request.stops) is not None

    start = time.perf_counter()
    written = generate(
        model,
        model,
        attention_on_one_device(model.config, device, dtype),
        prompts,
        request.max_tokens,
        request.sampling,
        device=device,
        finished=finished,
    )
    seconds = time.perf_counter() - start
    if place.rank == 0:
        for number, (prompt, tokens) in enumerate(zip(request.prompts, written, strict=True)):
            _print(request, number, prompt, tokens, tokenizer, ends)
        count = sum(map(len, written))
        print(f"{counted(count, 'token')} in {seconds:.2f} s, {count / seconds:,.1f} tokens/s", file=sys.stderr)
    dist.barrier()
    dist.destroy_process_group()


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} has no tokens; give it at least one character")
        if max(prompt) >= vocab_size:
            raise ValueError(
                f"prompt {number} has token {max(prompt)}, beyond the model's vocab_size ({vocab_size}); the tokenizer "
                "is another model's"
            )


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stops begins in `text`."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def _print(
    request: Request, number: int, prompt: str, tokens: list[int], tokenizer: Encoder, ends: frozenset[int]
) -> None:
    ended = "end token" if tokens[-1] in ends else "length"
    text = tokenizer.decode(tokens[:-1] if tokens[-1] in ends else tokens)
    stop = _first_stop(text, request.stops)
    if stop is not None:
        text, ended = text[:stop], "stop"
    if request.as_json:
        print(json.dumps({"prompt": prompt, "text": text, "tokens": tokens, "ended": ended}, ensure_ascii=False))
        return
    if len(request.prompts) > 1:
        print(f"--- prompt {number}")
    print(prompt + text)
