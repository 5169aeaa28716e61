"""Folders that must not be converted: what is said, and that nothing is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch.config import load_job
from launch.convert import from_hf, main, to_hf
from launch.data.run_record import RunRecord
from launch.inference.model import tokenizer_of
from launch.settings.violations import ConfigError
from launch.train import quickstart
from launch.weights.hugging_face import UnsupportedModel
from launch.weights.reader import open_weights
from launch.weights.safetensors_folder import INDEX
from launch.weights.stored_model import WeightsError, stored_model, write_model
from tests.unit.transformers_models import CONFIGS, downloaded


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
        (lambda folder: edit_config(folder, model_type=["llama"]), r"model_type \['llama'\]"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": 5}}'), "lacks 1 of 1 shards .* names: 5; "),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": []}'), "cannot be read .AttributeError"),
        (lambda folder: edit_config(folder, rope_parameters=8.0), "RoPE keys cannot be read .*download it again"),
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

    monkeypatch.setattr("launch.weights.safetensors_folder.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        from_hf(sharded, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(sharded: Path, tmp_path: Path) -> None:
    from_hf(sharded, tmp_path / "out")
    with pytest.raises(WeightsError, match="exists already"):
        from_hf(sharded, tmp_path / "out")
    with pytest.raises(WeightsError, match="exists already"):
        to_hf(tmp_path / "out", tmp_path / "out")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("parallel", r"config.yaml:\d+: parallel.gone = 3\n +unknown key; did you mean .*\? {remedy}"),
        ("model", r"model section of .*config.yaml is not valid: model.gone: unknown key; .*\? {remedy}"),
    ],
)
def test_a_key_of_another_version_is_named_with_its_file_and_remedy(section: str, said: str, tmp_path: Path) -> None:
    """In a run's own configuration, whoever reads it."""
    text = load_job(quickstart()).to_yaml()
    (tmp_path / "config.yaml").write_text(text.replace(f"{section}:\n", f"{section}:\n  gone: 3\n", 1))
    said = said.format(remedy="In the file of a run it is a key of another version of this program: remove the line")
    readers: list[Callable[[Path], object]] = [tokenizer_of, open_weights, RunRecord.read]
    for read in readers:
        with pytest.raises(ValueError, match=rf"config.yaml(.|\n)*{section}.gone(.|\n)* remove the line"):
            read(tmp_path)
    with pytest.raises(ConfigError, match=said):  # as run_eval.py does
        load_job(tmp_path / "config.yaml", [f"model.init_from={tmp_path}"])


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
