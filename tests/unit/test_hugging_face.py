"""Conversion against transformers itself: its logits, and what it loads of ours. And every refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from launch.config import JobConfig
from launch.convert import from_hf, main, to_hf
from launch.hugging_face import UnsupportedModel, config_for, model_from
from launch.initial_weights import _unused_tokenizer
from launch.safetensors_folder import INDEX, SINGLE
from launch.stored_model import WeightsError, parameter_shapes, stored_model, write_model
from launch.weights import Part, open_weights
from model.attention import KernelAttention
from model.config import SHAPE_KEYS, ModelConfig, RopeScaling
from model.gpt import GPT
from model.kernels import KERNELS

B, S, V = 2, 40, 61

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**tiny(), tie_word_embeddings=True),
    "llama, llama3 scaling": lambda: LlamaConfig(
        **tiny(), rope_parameters=LLAMA3 | {"rope_theta": 900.0, "original_max_position_embeddings": 16}
    ),
    "llama, MHA, biases": lambda: LlamaConfig(**tiny(num_key_value_heads=4), attention_bias=True),
    "mistral, window, wide heads": lambda: MistralConfig(**tiny(head_dim=20), sliding_window=7),
    "mistral, no window": lambda: MistralConfig(**tiny(), sliding_window=None),
    "qwen2": lambda: Qwen2Config(**tiny(), use_sliding_window=False),
    "qwen2, yarn": lambda: Qwen2Config(
        **tiny(num_key_value_heads=1),
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen3": lambda: Qwen3Config(**tiny(head_dim=16), tie_word_embeddings=True),
    "qwen3, window on all layers, linear scaling": lambda: Qwen3Config(
        **tiny(head_dim=12),
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=0,
        rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0},
    ),
}


def tiny(**changes: Any) -> dict[str, Any]:
    shape = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return shape | heads | {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2} | changes


def downloaded(config: PreTrainedConfig, folder: Path, **options: Any) -> Any:
    """A model of transformers with weights far from any special value (biases and norms too), saved in `folder`."""
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    theirs.save_pretrained(folder, **options)
    return theirs


def ours(folder: Path) -> GPT:
    """The model that a converted folder holds, in fp32."""
    config, weights = stored_model(folder), open_weights(folder)
    model = GPT(config, KernelAttention(KERNELS["cpu"], config))
    with torch.no_grad():
        weights.read([Part(name, (0,) * p.dim(), p.data) for name, p in model.named_parameters()])
    return model


def tokens() -> Tensor:
    return torch.randint(V, (B, S), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    return model(tokens()).logits


@torch.no_grad()
def our_logits(model: GPT) -> Tensor:
    logits = model(tokens(), torch.arange(S).expand(B, S))
    assert isinstance(logits, Tensor)
    return logits


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


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path))


# -- config.json -------------------------------------------------------------------------------------------------------

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
    assert model_from(qwen | {"use_sliding_window": True, "max_window_layers": 0}).sliding_window == 4096
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
            {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 1},
            "1 of 2 layers have a sliding window",
        ),
    ],
)
def test_what_our_model_has_not_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnsupportedModel, match=complaint):
        model_from(V4_LLAMA | changes)


def test_what_no_family_has_is_refused() -> None:
    model = model_from(V4_LLAMA).model_copy(update={"qk_norm": True, "attention_bias": "qkv"})
    with pytest.raises(UnsupportedModel, match="qk_norm True, attention_bias qkv and sliding_window None together"):
        config_for(model, max_position_embeddings=8, dtype="float32")


# -- folders that must not be converted --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "model"
    downloaded(CONFIGS["llama, llama3 scaling"](), folder, max_shard_size="30KB")
    return folder


def damaged(source: Path, target: Path, damage: Callable[[Path], object]) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    damage(target)
    return target


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the tensors of the shard that holds the first block's q_proj."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.layers.0.self_attn.q_proj.weight" in tensors:
            change(tensors)
            save_file(tensors, file)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: first_shard(folder).unlink(), "lacks 1 of . shards that its index names: model-00001"),
        (lambda folder: first_shard(folder).write_bytes(b"\x10" * 50), "it is cut or damaged, get it again"),
        (lambda folder: rewrite(folder, lambda t: t.update({Q: t[Q][:-1].clone()})), r"q_proj.weight is \[31, 32\]"),
        (lambda folder: rewrite(folder, lambda t: t.pop(Q)), "promises 1 tensors that no shard holds, such as model"),
        (lambda folder: rewrite(folder, lambda t: t.update(x=t[Q].clone())), "1 tensors that the model has not, such"),
        (lambda folder: rewrite(folder, lambda t: t.update({Q: t[Q].char()})), "is I8; only F32, BF16, F16 are read"),
        (lambda folder: edit_config(folder, num_hidden_layers=3), "lacks 9 of 30 tensors"),
        (lambda folder: edit_config(folder, model_type="mamba"), "model_type 'mamba'"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / INDEX).write_text("[]"), "cannot be read"),
        (lambda folder: (folder / INDEX).unlink(), "has neither model.safetensors nor"),
    ],
)  # fmt: skip
def test_a_damaged_folder_leaves_nothing(
    sharded: Path, tmp_path: Path, damage: Callable[[Path], object], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damaged(sharded, tmp_path / "bad", damage)
    with pytest.raises((WeightsError, UnsupportedModel), match=complaint):
        from_hf(folder, tmp_path / "out")
    assert main(["from-hf", str(folder), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not [path for path in tmp_path.iterdir() if path != folder]


def test_pickles_are_refused(sharded: Path, tmp_path: Path) -> None:
    def damage(folder: Path) -> None:
        for file in [*folder.glob("*.safetensors"), folder / INDEX]:
            file.unlink()
        torch.save({}, folder / "pytorch_model.bin")

    with pytest.raises(WeightsError, match=r"pickled weights \(\*.bin\).*save them as safetensors first"):
        from_hf(damaged(sharded, tmp_path / "bad", damage), tmp_path / "out")


def test_a_failing_write_leaves_nothing(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("launch.safetensors_folder.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        from_hf(sharded, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(sharded: Path, tmp_path: Path) -> None:
    from_hf(sharded, tmp_path / "out")
    with pytest.raises(WeightsError, match="exists already"):
        from_hf(sharded, tmp_path / "out")
    with pytest.raises(WeightsError, match="exists already"):
        to_hf(tmp_path / "out", tmp_path / "out")


def test_folders_of_another_kind_are_named(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match="is a Hugging Face folder; convert it once: python launch/convert.py from-hf"
    ):
        open_weights(sharded)
    with pytest.raises(WeightsError, match="is neither a run .* nor a converted model"):
        open_weights(tmp_path)
    from_hf(sharded, tmp_path / "out")
    write_model(tmp_path / "out", stored_model(tmp_path / "out").model_copy(update={"intermediate_size": 52}))
    with pytest.raises(WeightsError, match=r"gate_proj.weight is \[48, 32\], but its description makes it \[52, 32\]"):
        open_weights(tmp_path / "out")


def test_a_tokenizer_left_behind_is_said(tmp_path: Path) -> None:
    job = JobConfig.from_yaml(
        "{model: {vocab_size: 300, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1, "
        "num_key_value_heads: 1}, data: {source: python_stdlib}, optimizer: {learning_rate: 0.1}, "
        "training: {sequence_length: 8, global_batch_size: 1, max_steps: 1}}"
    )
    assert _unused_tokenizer(job, tmp_path) == ""
    (tmp_path / "hugging_face").mkdir()
    write_tokenizer(tmp_path / "hugging_face" / "tokenizer.json")
    assert _unused_tokenizer(job, tmp_path).endswith("tokenizer.json, but data.tokenizer is bytes")


# -- memory ------------------------------------------------------------------------------------------------------------

MEASURED = """
import sys
from pathlib import Path
import launch.weights
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


# -- the shape keys ----------------------------------------------------------------------------------------------------


def test_shape_keys_are_those_that_change_parameters() -> None:
    base: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    others: dict[str, Any] = {
        "head_dim": 16,
        "tie_word_embeddings": True,
        "qk_norm": True,
        "attention_bias": "qkv",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5.0,
        "rope_scaling": {"factor": 2.0},
        "sliding_window": 3,
        "initializer_range": 0.1,
        "init_from": "somewhere",
        "attention_backend": "math",
    }
    changes = {key: value * 2 for key, value in base.items()} | others
    assert changes.keys() == ModelConfig.model_fields.keys(), "every key is tried"
    shapes = parameter_shapes(ModelConfig(**base))
    for key, value in changes.items():
        changed = parameter_shapes(ModelConfig.model_validate(base | {"num_key_value_heads": 2} | {key: value}))
        assert (changed != shapes) == (key in SHAPE_KEYS), key
