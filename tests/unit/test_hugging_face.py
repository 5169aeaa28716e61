"""Conversion against transformers itself: its logits, what it loads of ours, and what no family can say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from launch.config import JobConfig
from launch.convert import from_hf, to_hf
from launch.inference.model import tokenizer_of
from launch.weights.hugging_face import UnsupportedModel, config_for, model_from
from launch.weights.safetensors_folder import SINGLE, ShardWriter
from launch.weights.stored_model import RUN_FILE, parameter_shapes, write_model
from launch.weights.suitability import notes_on
from model.config import RopeScaling
from tests.unit.transformers_models import (
    CONFIGS,
    LLAMA3,
    downloaded,
    our_logits,
    ours,
    their_logits,
    tiny,
    write_tokenizer,
)


@pytest.mark.parametrize("case", CONFIGS)
def test_logits_agree_both_ways(case: str, tmp_path: Path) -> None:
    theirs = downloaded(CONFIGS[case](), tmp_path / "theirs", max_shard_size="20KB")
    expected = their_logits(theirs)
    assert expected.std() > 0.5, "the comparison is not of zeros"
    from_hf(tmp_path / "theirs", tmp_path / "ours", shard_bytes=15_000)
    shards = list((tmp_path / "ours").glob("*.safetensors"))
    assert len(shards) > 2 and {shard.stat().st_mode & 0o777 for shard in shards} == {0o644}
    torch.testing.assert_close(our_logits(ours(tmp_path / "ours")), expected, atol=1e-4, rtol=0)

    said = to_hf(tmp_path / "ours", tmp_path / "back", shard_bytes=15_000)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert type(back) is type(theirs) and type(back).__name__ in said
    torch.testing.assert_close(their_logits(back), expected, atol=1e-5, rtol=0)
    for key in ("bos_token_id", "eos_token_id", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(back.config, key) == getattr(theirs.config, key), key
    assert back.generation_config.eos_token_id == theirs.generation_config.eos_token_id


def test_numbers_keep_their_type_or_are_rounded(tmp_path: Path) -> None:
    theirs = downloaded(CONFIGS["qwen3"](), tmp_path / "fp32").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "bf16")
    from_hf(tmp_path / "bf16", tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    before, after = load_file(tmp_path / "bf16" / SINGLE), load_file(tmp_path / "back" / SINGLE)
    assert before.keys() - {"lm_head.weight"} == after.keys()
    assert all(torch.equal(before[name], tensor) and tensor.dtype == torch.bfloat16 for name, tensor in after.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").dtype == torch.bfloat16
    to_hf(tmp_path / "ours", tmp_path / "half", dtype=torch.float16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.float16


def test_files_of_tokenizer_and_generation_go_along(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    downloaded(CONFIGS["llama"](), theirs)
    write_tokenizer(theirs / "tokenizer.json")
    (theirs / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (theirs / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true, "eos_token_id": [2, 7]}')
    said = from_hf(theirs, tmp_path / "ours")
    assert said.endswith(f"data.tokenizer={tmp_path}/ours/hugging_face/tokenizer.json")
    assert to_hf(tmp_path / "ours", tmp_path / "back").endswith("tokenizer copied")
    assert AutoTokenizer.from_pretrained(tmp_path / "back").encode("b a") == [1, 0]
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.generation_config.temperature == 0.7 and back.generation_config.eos_token_id == [2, 7]


BYTE_JOB = """
model: {vocab_size: 300, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1,
  num_key_value_heads: 1}
data: {source: python_stdlib}
optimizer: {learning_rate: 0.1}
training: {sequence_length: 8, global_batch_size: 1, max_steps: 1}
"""


def test_bytes_go_to_transformers_and_come_back(tmp_path: Path) -> None:
    """Every byte is the token of its number, for transformers and for a model converted back."""
    job, text = JobConfig.from_yaml(BYTE_JOB), "def f( x ) :\n\t don't \x00\x7f \u00e9\u4e2d\U0001f600 \u00a0  ."
    run = tmp_path / "run"
    run.mkdir()
    writer = ShardWriter(run, 1 << 20)
    for name, shape in parameter_shapes(job.model).items():
        writer.add(name, torch.ones(shape))
    writer.finish()
    write_model(run, job.model)
    (run / RUN_FILE).write_text(job.to_yaml())
    assert to_hf(run, tmp_path / "theirs").endswith("a tokenizer whose tokens are the bytes of UTF-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert theirs.encode(text) == list(text.encode()) and theirs.decode(list(text.encode())) == text
    assert from_hf(tmp_path / "theirs", tmp_path / "ours").endswith("data.tokenizer=bytes")
    tokenizer, halved = tokenizer_of(tmp_path / "ours"), [*text.encode(), 0xE9, 0x20, 0xFF, 299]
    assert tokenizer.prompt(text) == list(text.encode())
    assert tokenizer.decode(halved) == tokenizer_of(run).decode(halved) == f"{text}\ufffd \ufffd"
    assert sorted(theirs.convert_tokens_to_ids(list(theirs.get_vocab()))) == list(range(256))
    assert notes_on(job, tmp_path / "ours") == ""
    indexed = BYTE_JOB.replace("source: python_stdlib", "source: indexed, blend: [{path: unknown}]")
    (run / RUN_FILE).write_text(JobConfig.from_yaml(indexed).to_yaml())
    assert "its tokenizer is not known" in to_hf(run, tmp_path / "guessed")
    assert not (tmp_path / "guessed" / "tokenizer.json").exists(), "nobody said that these tokens are bytes"


V4_LLAMA = {
    "model_type": "llama",
    **tiny(),
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192},
    "torch_dtype": "bfloat16",
}


def test_the_keys_of_transformers_4_are_read() -> None:
    model = model_from(V4_LLAMA)
    assert model.rope_theta == 500_000 and model.rope_scaling == RopeScaling(factor=4.0, original_sequence_length=8192)
    assert model_from(V4_LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}).rope_scaling == RopeScaling(
        kind="linear", factor=2.0
    )
    assert model_from(V4_LLAMA | {"rope_scaling": None}).rope_scaling is None
    qwen = V4_LLAMA | {"model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 28}
    assert model_from(qwen | {"use_sliding_window": False}).sliding_window is None
    assert model_from(qwen | {"use_sliding_window": True}).sliding_window is None, "no layer is that high"
    assert model_from(qwen | {"use_sliding_window": True, "max_window_layers": 0}).windows == [4096, 4096]
    assert model_from(qwen | {"use_sliding_window": True, "max_window_layers": 1}).windows == [None, 4096]
    yarn = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0}
    scaling = model_from(V4_LLAMA | {"rope_scaling": yarn | {"mscale_all_dim": 0.5}}).rope_scaling
    assert scaling is not None and scaling.attention_factor == pytest.approx(1.36888 / 1.18444, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' .* is not supported; supported are llama, mistral, qwen2"),
        ({"model_type": "mixtral"}, "'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* save the model in bf16 with transformers"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "RoPE scaling 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layers"),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"num_key_value_heads": 3}, "must be divisible by num_key_value_heads"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention", "chunked_attention"]},
            "layer_types has 2 entries for num_hidden_layers .2., of kinds .'chunked_attention', 'sliding_attention'",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"]},
            "layer_types has 1 entries for num_hidden_layers .2.",
        ),
        ({"model_type": "qwen3", "layer_types": 2}, "window keys cannot be read .TypeError"),
        (
            {"model_type": "qwen2", "num_hidden_layers": 10**11},
            "num_hidden_layers: Input should be less than or equal to",
        ),
        *(
            ({key: 2**63}, f"{key}: Input should be less than or equal to")
            for key in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")
        ),
    ],
)
def test_what_our_model_has_not_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnsupportedModel, match=complaint):
        model_from(V4_LLAMA | changes)


def test_what_no_family_has_is_refused() -> None:
    model = model_from(V4_LLAMA).model_copy(update={"qk_norm": True, "attention_bias": "qkv"})
    with pytest.raises(UnsupportedModel, match="qk_norm True, attention_bias qkv, sliding_window None and .* together"):
        config_for(model, max_position_embeddings=8, dtype="float32")


def test_a_tokenizer_left_behind_is_said(tmp_path: Path) -> None:
    job = JobConfig.from_yaml(BYTE_JOB)
    write_model(tmp_path, job.model)
    assert notes_on(job, tmp_path) == ""
    (tmp_path / "hugging_face").mkdir()
    write_tokenizer(tmp_path / "hugging_face" / "tokenizer.json")
    assert notes_on(job, tmp_path).endswith("tokenizer.json, but data.tokenizer is bytes")


def test_a_context_longer_than_the_weights_were_made_for_is_said(tmp_path: Path) -> None:
    job = JobConfig.from_yaml(BYTE_JOB)
    length = job.training.sequence_length
    write_model(tmp_path, job.model)
    (tmp_path / "hugging_face").mkdir()
    config = tmp_path / "hugging_face" / "config.json"
    config.write_text(json.dumps({"max_position_embeddings": length}))
    assert notes_on(job, tmp_path) == ""
    config.write_text(json.dumps({"max_position_embeddings": length - 1}))
    assert f"sequence_length ({length}) is beyond the {length - 1} tokens of context" in notes_on(job, tmp_path)
    rotated = job.model_copy(update={"model": job.model.model_copy(update={"rope_theta": 1e6})})
    assert notes_on(rotated, tmp_path) == ", with another rope_theta"
    (tmp_path / RUN_FILE).write_text(job.to_yaml())  # a run that trained on as long a context
    assert notes_on(job, tmp_path) == ""
    (tmp_path / RUN_FILE).write_text("model: {}")  # of another version
    assert notes_on(job, tmp_path) == ""


MEASURED = """
import sys
from pathlib import Path
import launch.weights.reader
from launch.config import JobConfig
from launch.convert import from_hf, to_hf

def megabytes(line):
    return int(Path("/proc/self/status").read_text().split(line + ":")[1].split()[0]) >> 10

source, out, back = map(Path, sys.argv[1:4])
for convert, *folders in ((from_hf, source, out), (to_hf, out, back)):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = megabytes("VmRSS")
    convert(*folders, shard_bytes=16 << 20)
    print(megabytes("VmHWM") - before)
"""


def test_memory_is_that_of_a_shard(tmp_path: Path) -> None:
    shape = tiny(hidden_size=768, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=8)
    config = LlamaConfig(**shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    (tmp_path / "source").mkdir()
    tensors = {name: torch.zeros(p.shape, dtype=torch.bfloat16) for name, p in model.named_parameters()}
    save_file(tensors, tmp_path / "source" / SINGLE)
    (tmp_path / "source" / "config.json").write_text(json.dumps(config.to_dict()))
    megabytes = sum(tensor.nbytes for tensor in tensors.values()) >> 20
    del tensors
    folders = [str(tmp_path / name) for name in ("source", "out", "back")]
    ended = subprocess.run([sys.executable, "-c", MEASURED, *folders], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    peaks = [int(line) for line in ended.stdout.split()]
    assert megabytes > 180 and len(peaks) == 2 and max(peaks) < 80, (peaks, megabytes)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 10
