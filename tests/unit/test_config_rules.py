"""The rules that join keys of a job, or a job and its world size: what they let pass, and what they say."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from launch.check import layout_report
from launch.config import SECTIONS, JobConfig
from launch.settings.rules import RULES, Rule
from tests.unit.job_files import load, report


def test_rules_are_reported_in_the_order_of_the_sections(tmp_path: Path) -> None:
    overrides = ["profile.steps=[9, 11]", "training.micro_batch_size=3", "model.vocab_size=255", "data.files=[a.txt]"]
    told = re.findall(
        r"command line: (\w+)\.", report(tmp_path, "parallel.zero_stage=0", "training.precision=fp16", *overrides)
    )
    assert told == ["model", "parallel", "data", "profile"]


@pytest.mark.parametrize(("needs", "check"), RULES, ids=[check.__name__ for _, check in RULES])
def test_a_rule_names_every_key_that_it_reads(needs: tuple, check: Rule) -> None:
    """Or its verdict would be about a key that is in error itself."""
    read = set(re.findall(r"job\.(\w+)\.(\w+)", inspect.getsource(check)))
    assert read, "a rule that reads no key"
    assert {(section, key) for section, key in read if key in SECTIONS[section].model_fields} <= set(needs)


@pytest.mark.parametrize(
    ("asked", "length", "tp", "cp", "split"),
    [
        ("auto", 64, 2, 1, True),
        ("auto", 64, 1, 1, False),
        ("auto", 66, 4, 1, False),  # 66 tokens for four ranks
        ("auto", 72, 4, 2, True),
        ("auto", 68, 4, 2, False),  # 34 tokens for four ranks
        ("true", 64, 1, 1, False),
        ("true", 64, 4, 2, True),
        ("false", 64, 2, 1, False),
    ],
)
def test_sequence_parallelism(tmp_path: Path, asked: str, length: int, tp: int, cp: int, split: bool) -> None:
    sizes = [f"parallel.tensor_parallel_size={tp}", f"parallel.context_parallel_size={cp}"]
    job = load(tmp_path, *sizes, f"parallel.sequence_parallel={asked}", f"training.sequence_length={length}")
    assert job.sequence_parallel is split


@pytest.mark.parametrize("steps", ["[5, 4]", "[9, 11]"])
def test_traced_steps_lie_in_the_run(tmp_path: Path, steps: str) -> None:
    message = f"profile.steps ({steps}) must be a first and a last step in order, within the job's steps (10); give"
    assert message in report(tmp_path, f"profile.steps={steps}")
    assert load(tmp_path, "profile.steps=[9, 10]").profile.steps == (9, 10)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("zero_stage=1 offload_optimizer=cpu", "needs zero_stage 2 or 3 (here 1)"),
        ("zero_stage=2 offload_optimizer=cpu offload_parameters=cpu", "needs zero_stage 3 (here 2)"),
        ("zero_stage=3 offload_parameters=cpu", "and offload_optimizer cpu (here none); set both"),
    ],
)
def test_what_can_be_offloaded(tmp_path: Path, keys: str, message: str) -> None:
    assert message in report(tmp_path, *(f"parallel.{key}" for key in keys.split()))
    assert load(tmp_path, "parallel.offload_optimizer=cpu", "parallel.offload_parameters=cpu")


def test_blocks_are_compiled_on_gpus_where_nothing_is_said(tmp_path: Path) -> None:
    assert load(tmp_path, "training.compile=true").compiles("cpu")
    assert not load(tmp_path, "training.compile=false").compiles("cuda")
    assert load(tmp_path).compiles("cuda") and not load(tmp_path).compiles("cpu")
    assert load(tmp_path, "parallel.tensor_parallel_size=2").compiles("cuda")
    assert not load(tmp_path, "training.mlp_tile_tokens=9").compiles("cuda")


def test_the_rule_of_sequence_parallelism_in_full(tmp_path: Path) -> None:
    sizes = ["parallel.tensor_parallel_size=4", "parallel.context_parallel_size=2", "training.sequence_length=68"]
    assert report(tmp_path, *sizes, "parallel.sequence_parallel=true") == (
        "job.yaml: 1 error in the job's configuration\n"
        "  command line: parallel.sequence_parallel = true\n"
        "      sequence_length (68) must be divisible by context_parallel_size x tensor_parallel_size (2 x 4 = 8) for "
        "sequence_parallel; nearest valid lengths: 64, 72; or set parallel.sequence_parallel=false"
    )


def test_the_head_rule_in_full(tmp_path: Path) -> None:
    overrides = ["model.num_attention_heads=32", "model.num_key_value_heads=8", "parallel.tensor_parallel_size=3"]
    assert (
        "num_attention_heads (32) and num_key_value_heads (8) must both be divisible by tensor_parallel_size (3); "
        "valid sizes here: 1, 2, 4, 8\n"
    ) in report(tmp_path, *overrides, "model.hidden_size=128") + "\n"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.sequence_length=65", "parallel.context_parallel_size=2"],
            "sequence_length (65) must be divisible by 2 x context_parallel_size (2 x 2 = 4)",
        ),
        (
            ["training.micro_batch_size=3"],
            "global_batch_size (8) must be divisible by micro_batch_size x data_parallel_size (3 x 1 = 3); "
            "nearest valid sizes: 6, 9",
        ),
        (["model.intermediate_size=97", "parallel.tensor_parallel_size=2"], "nearest valid widths: 96, 98"),
        (["model.vocab_size=255"], "vocab_size (255) must be at least 256 for tokenizer bytes"),
        (["data.source=files"], "files is empty but source is files"),
        (["data.files=[a.txt]"], "files is given but source (python_stdlib) does not read it"),
        (
            ["data.source=indexed"],
            "blend is empty but source is indexed; list corpora, such as [{path: data/web, weight",
        ),
        (["data.blend=[{path: web}]"], "blend is given but source (python_stdlib) does not read it"),
        (
            ["data.source=indexed", "data.blend=[{path: web, weight: 0}]"],
            "all 1 weights are 0, so nothing would be read",
        ),
        (
            ["data.source=indexed", "data.blend=[{path: a/web}, {path: b/web}, {path: web, name: other}]"],
            "3 corpora have 2 names: web comes twice, and a checkpoint tells corpora apart by name; add name: to one",
        ),
        (["data.validation_paths=[held]"], "validation_paths is given but source (python_stdlib) does not read it"),
        (["data.source=indexed", "data.blend=[{path: web, weight: -1}]"], "must be greater than or equal to 0"),
        (
            ["data.source=indexed", "data.blend=[{weight: 1}]"],
            "missing (Path of its .bin and .idx without either ending",
        ),
        (["data.source=indexed", "data.blend=[{path: web, weigth: 1}]"], "did you mean data.blend[0].weight?"),
        (
            ["checkpoint.keep_every=70", "checkpoint.save_interval=20"],
            "keep_every (70) must be a multiple of save_interval (20), or no checkpoint would be at its steps; "
            "nearest valid: 80",
        ),
        (["checkpoint.keep_every=7", "checkpoint.save_interval=20"], "nearest valid: 20"),
        (["checkpoint.keep_every=70"], "a multiple of save_interval (0), or no checkpoint would be at its steps"),
        (["checkpoint.keep_every=-1"], "must be greater than or equal to 0"),
        (["checkpoint.directory=nosuch://a/{name}"], "nothing here reads nosuch://a/{name} (Protocol not known"),
        (["checkpoint.directory=s3:/a/{name}"], "(a URL begins with s3://, with two slashes); give a path"),
        (["checkpoint.directory=''"], "must have at least 1 character"),
        (
            ["checkpoint.accept_changes=[data, optimizer.learning_rate]"],
            "optimizer.learning_rate is no key that a resume refuses; those that can be accepted are "
            "data, model.rms_norm_eps, model.rope_theta, model.rope_scaling, model.sliding_window, ",
        ),
        (["checkpoint.accept_changes=[model.hidden_sise]"], "model.hidden_sise is no key that a resume refuses"),
        (
            ["checkpoint.accept_changes=[data, model.hidden_size, model.rope_theta, model.qk_norm]"],
            "model.hidden_size, model.qk_norm cannot be accepted: the tensors of a checkpoint do not fit another shape",
        ),
        (
            ["training.offload_activations=cpu", "training.activation_checkpointing=selective"],
            "which needs activation_checkpointing attention or full (here selective)",
        ),
        (
            ["parallel.secondary_partition_size=2", "parallel.zero_stage=2"],
            "secondary_partition_size (2) above 1 needs zero_stage 3 (here 2)",
        ),
        (
            [
                "training.offload_activations=cpu",
                "training.activation_checkpointing=full",
                "parallel.context_parallel_graphs=true",
            ],
            "with context_parallel_graphs, whose recordings keep their memory on the device",
        ),
        (
            ["parallel.context_parallel_graphs=true", "parallel.context_parallel_size=2", "job.device=cpu"],
            "context_parallel_graphs is true with context_parallel_size (2) on device cpu, which has no CUDA graphs",
        ),
        (
            ["training.memory_budget_gib=70", "training.activation_checkpointing=full"],
            "memory_budget_gib (70) is read by activation_checkpointing auto only (here full)",
        ),
        (["training.max_steps=null"], "max_steps and max_tokens are both missing"),
        (["training.skip_steps=[[5, 4]]"], "skip_steps has a range [5, 4] that ends before it begins; turn it round"),
        (["training.skip_steps=[[2, 3], [4, 5]]"], "with a step between ranges; join [2, 3] and [4, 5], or sort them"),
        (["training.skip_steps=[[5, 6], [2, 3]]"], "with a step between ranges; join [5, 6] and [2, 3], or sort them"),
        (
            ["training.skip_steps=[[2, 3], [7, 10]]"],
            "skip_steps ends with [7, 10], but the job's last step (10) must be made; leave that range out, or change",
        ),
        (
            ["training.skip_steps=[[2, 3], [7, 8]]", "profile.steps=[3, 7]"],
            "profile.steps ([3, 7]) has steps 3, 7 in it, which training.skip_steps leaves out; trace others",
        ),
        (["training.precision=fp16", "parallel.zero_stage=0"], "zero_stage (0) must be 1 or more with precision fp16"),
        (["optimizer.warmup_steps=11"], "warmup_steps (11) must not exceed the job's steps (10)"),
        (["optimizer.warmup_steps=5", "training.max_tokens=1024"], "must not exceed the job's steps (2)"),
        (
            ["optimizer.warmup_steps=6", "optimizer.schedule=wsd", "optimizer.decay_fraction=0.5"],
            "warmup_steps (6) and wsd's decay (0.5 of 10 steps, 5) exceed the job's steps (10) together; "
            "lower warmup_steps to 5 or less",
        ),
        (
            ["model.attention_backend=flash_attn_2", "training.precision=fp32"],
            "not float32; choose auto or cpu or math",
        ),
        (["model.attention_backend=cpu", "job.device=cuda"], "it runs on cpu tensors, not cuda; choose auto or"),
        (["training.precision=fp16", "job.device=cpu"], "precision is fp16, which DeepSpeed trains on GPUs only"),
        (["model.num_key_value_heads=3"], "num_attention_heads (8) must be divisible by num_key_value_heads (3)"),
        (
            ["model.full_attention_layers=[0, 40]"],
            "full_attention_layers names block 40, but with num_hidden_layers (2) the last is 1",
        ),
        (["model.hidden_size=63"], "hidden_size (63) must be divisible by num_attention_heads (8)"),
    ],
)
def test_keys_that_do_not_agree(tmp_path: Path, overrides: list[str], message: str) -> None:
    text = report(tmp_path, *overrides)
    assert message in text
    assert "1 error in" in text


def test_steps_can_be_skipped(tmp_path: Path) -> None:
    skip = "training.skip_steps=[[1, 1], [3, 9]]"
    assert load(tmp_path, skip).training.skip_steps == ((1, 1), (3, 9))
    assert JobConfig.from_yaml(load(tmp_path, skip).to_yaml()).training.skip_steps == ((1, 1), (3, 9))
    rows = layout_report(load(tmp_path, skip, "profile.steps=[2, 2]"), 1).splitlines()
    assert [row[17:] for row in rows if row.startswith(("length", "skipped"))] == [
        "2 steps, 1,024 tokens",
        "steps 1, 3 to 9 of 10: no rank reads their data",
    ]


def test_checkpoint_rules_let_sound_keys_pass(tmp_path: Path) -> None:
    overrides = ["save_interval=20", "keep_every=60", "accept_changes=[data, model.rope_theta, optimizer.betas]"]
    job = load(tmp_path, *(f"checkpoint.{override}" for override in overrides))
    assert job.checkpoint.keep_every == 60 and job.checkpoint.accept_changes[1] == "model.rope_theta"
    assert job.checkpoint_location == str(job.run_path / "checkpoints")
    for place in ("memory://runs/{name}", "shared/{name}/steps"):
        assert load(tmp_path, f"checkpoint.directory={place}").checkpoint_location == place.replace("{name}", "test")


def test_named_kernels_need_not_be_here(tmp_path: Path) -> None:
    assert load(tmp_path, "model.attention_backend=flash_attn_4").model.attention_backend == "flash_attn_4"


def test_secondary_partitions_divide_the_ranks(tmp_path: Path) -> None:
    overrides = ["parallel.tensor_parallel_size=2", "parallel.secondary_partition_size=4"]
    assert load(tmp_path, *overrides).parallel.secondary_partition_size == 4
    message = "secondary_partition_size (4) must divide dp x cp (6 ranks here); valid: 1, 2, 3, 6"
    assert message in report(tmp_path, *overrides, "training.global_batch_size=12", world_size=12)


@pytest.mark.parametrize(
    ("world_size", "message"),
    [
        (6, "world size (6) must be a multiple of tensor_parallel_size x context_parallel_size (2 x 2 = 4)"),
        (12, "micro_batch_size x data_parallel_size (1 x 3 = 3); nearest valid sizes: 6, 9"),
    ],
)
def test_the_world_must_fit(tmp_path: Path, world_size: int, message: str) -> None:
    overrides = ["parallel.tensor_parallel_size=2", "parallel.context_parallel_size=2"]
    assert load(tmp_path, *overrides).parallel.tensor_parallel_size == 2  # no world size, nothing to check
    assert message in report(tmp_path, *overrides, world_size=world_size)
    with pytest.raises(ValueError, match="world size|global_batch_size"):
        load(tmp_path, *overrides).accumulation_steps(world_size)


def test_a_job_built_in_code_keeps_the_rules(tmp_path: Path) -> None:
    values = load(tmp_path).model_dump()
    values["parallel"]["tensor_parallel_size"] = 3
    with pytest.raises(ValueError, match="must both be divisible by tensor_parallel_size"):
        JobConfig.model_validate(values)
