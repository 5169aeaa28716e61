"""The command that writes text: by one process, and by two that split the model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
import torch

from launch.environment import Place
from launch.generate import main
from launch.weights.safetensors_folder import ShardWriter
from launch.weights.stored_model import COMPANION_FOLDER, parameter_shapes, write_model
from model.attention import kernel_attention
from model.config import ModelConfig
from model.gpt import GPT
from model.kernels import KERNELS
from tests.distributed.harness import free_port, run_distributed

ROOT = Path(__file__).resolve().parents[2]
GENERATE = str(ROOT / "launch" / "generate.py")
MODEL = ModelConfig(
    vocab_size=131,  # two processes pad it
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    qk_norm=True,
    attention_bias="qkv",
    sliding_window=9,
)
PROMPTS = ["a", "bcb", "ccba"]
LETTERS = {"a": 0, "b": 1, "c": 2} | {chr(0x4E00 + n): n for n in range(3, 131)}
LETTER = {number: letter for letter, number in LETTERS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model of random weights; each of its tokens is one character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("converted")
    generator = torch.Generator().manual_seed(4)
    writer = ShardWriter(folder, 20_000)
    for name, shape in parameter_shapes(MODEL).items():
        noise = torch.randn(shape, generator=generator)
        writer.add(name, 1 + 0.2 * noise if name.endswith("norm.weight") else 0.3 * noise)
    writer.finish()
    write_model(folder, MODEL)
    (folder / COMPANION_FOLDER).mkdir()
    tokenizer = Tokenizer(models.WordLevel(LETTERS, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / COMPANION_FOLDER / "tokenizer.json"))
    return folder


@torch.no_grad()
def expected(folder: Path, prompt: str, count: int) -> list[int]:
    """The likeliest tokens, the whole sequence computed again for each."""
    from launch.weights.reader import Part, open_weights

    model = GPT(MODEL, kernel_attention(KERNELS["math"], MODEL))
    open_weights(folder).read([Part(name, (0,) * p.dim(), p.data) for name, p in model.named_parameters()])
    tokens = [LETTERS[letter] for letter in prompt]
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0, -1].argmax()))
    return tokens[len(prompt) :]


def run(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in {"RANK", "WORLD_SIZE"}}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, GENERATE, *arguments], capture_output=True, text=True, timeout=600, env=environment
    )


def asked(folder: Path, *more: str) -> list[str]:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return ["--run", str(folder), *prompts, "--device", "cpu", "--max_tokens", "12", "--json", *more]


def answers(ended: subprocess.CompletedProcess[str]) -> list[dict]:
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


def test_one_process_and_two_write_what_the_model_says(folder: Path) -> None:
    written = [expected(folder, prompt, 12) for prompt in PROMPTS]
    end, stop = written[0][8], written[1][3]
    (folder / COMPANION_FOLDER / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    asked = ["--run", str(folder), "--device", "cpu", "--max_tokens", "12", "--temperature", "0", "--json"]
    asked += [word for prompt in PROMPTS for word in ("--prompt", prompt)] + ["--stop", LETTER[stop]]
    alone, split = answers(run([sys.executable], *asked)), answers(run(launcher, *asked))
    assert alone == split
    endings = []
    for prompt, tokens, answer in zip(PROMPTS, written, alone, strict=True):
        cut = next((place for place, token in enumerate(tokens) if token in (end, stop)), None)
        endings.append("length" if cut is None else "stop" if tokens[cut] == stop else "end token")
        text = "".join(LETTER[token] for token in tokens[:cut])
        kept = tokens if cut is None else tokens[: cut + 1]
        assert answer == {"prompt": prompt, "text": text, "tokens": kept, "ended": endings[-1]}
    assert set(endings) == {"length", "stop", "end token"}, endings


def test_what_cannot_be_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.generate.place_in_world", lambda: Place(0, 0, 1, 1))
    assert main(["--run", str(tmp_path / "nowhere"), "--prompt", "a"]) == 1
    assert "is neither a run (config.yaml) nor a converted model (model.yaml)" in capsys.readouterr().err
    write_model(tmp_path, MODEL)
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    assert main(["--run", str(tmp_path), "--prompt_file", str(tmp_path / "prompt.txt")]) == 1
    assert "prompt.txt is not UTF-8 text (at byte 3); save it as UTF-8" in capsys.readouterr().err


def too_many_tokens(folder: Path) -> tuple[int, str]:
    """Exit status, and what was said."""
    said = StringIO()
    with mock.patch("launch.generate.place_in_world", lambda: Place(0, 0, 1, 1)), redirect_stderr(said):
        status = main(["--run", str(folder), "--prompt", "abc", "--max_tokens", str(10**15), "--device", "cpu"])
    return status, said.getvalue()


def test_more_tokens_than_memory_holds_are_refused(folder: Path) -> None:
    """2 x 2 layers x 2 heads x 8 numbers of 4 bytes: 256 for a token."""
    ((status, said),) = run_distributed(too_many_tokens, 1, folder)
    found = re.fullmatch(
        r"error: --max_tokens \(1000000000000000\) and prompts of up to 3 tokens, 1 at a time, take 238,418,579.10 GiB "
        r"of keys and values on each rank, where ([\d.]+) GiB are free; (\d+) fit\n",
        said,
    )
    assert status == 1 and found is not None, said
    assert int(found[2]) == pytest.approx(float(found[1]) * 2**30 / 256, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give --prompt or --prompt_file"),
        (["--prompt", "a", "--max_tokens", "0"], "--max_tokens (0) must be at least 1"),
        (["--prompt", "a", "--top_p", "1.5"], "--top_p (1.5) must be above 0 and at most 1"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature (nan) must be 0 or more"),
        (["--prompt", "a", "--seed", str(2**63)], "must be 0 or more, and below 2^63"),
        (["--prompt", "a", "--stop", ""], "--stop must not be empty"),
    ],
)
def test_a_wrong_command(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--run", "nowhere", *arguments])
    assert ended.value.code == 2 and complaint in capsys.readouterr().err
