"""Loading a job: what is accepted, and that every fault is reported, all at once, with place, key, value and remedy."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.check import layout_report
from launch.config import SECTIONS, ConfigError, JobConfig, load_job
from launch.rules import RULES, Rule
from launch.schema_docs import reference
from launch.stored_model import stored_model, write_model
from launch.yaml_strict import read_yaml, write_yaml
from model.config import ModelConfig

ROOT = Path(__file__).resolve().parents[2]

JOB = """\
job:
  name: test
model:
  vocab_size: 256
  hidden_size: 64
  intermediate_size: 96
  num_hidden_layers: 2
  num_attention_heads: 8
  num_key_value_heads: 4
data:
  source: python_stdlib
optimizer:
  learning_rate: 1e-3
training:
  sequence_length: 64
  global_batch_size: 8
  max_steps: 10
"""


def load(tmp_path: Path, *overrides: str, text: str = JOB, world_size: int | None = None) -> JobConfig:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return load_job(path, overrides, world_size)


def report(tmp_path: Path, *overrides: str, text: str = JOB, world_size: int | None = None) -> str:
    """The error report, with the file's name in place of its path."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides, text=text, world_size=world_size)
    return str(caught.value).replace(str(tmp_path / "job.yaml"), "job.yaml")


def converted(tmp_path: Path) -> Path:
    """A folder as `launch/convert.py from-hf` leaves it, without its weights."""
    folder = tmp_path / "converted"
    folder.mkdir()
    model = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "qk_norm": True, "rope_theta": 5e5}
    write_model(folder, ModelConfig.model_validate(model | heads))
    return folder


BARE = re.sub(r"model:\n(  .*\n)+", "model:\n  init_from: FOLDER\n", JOB)


def test_keys_left_out_come_from_the_initial_weights(tmp_path: Path) -> None:
    folder = converted(tmp_path)
    text = BARE.replace("FOLDER", str(folder))
    job = load(tmp_path, text=text)
    assert job.model == stored_model(folder).model_copy(update={"init_from": str(folder)})
    stretched = load(tmp_path, "model.rope_scaling={kind: yarn, factor: 4.0}", "model.sliding_window=9", text=text)
    assert stretched.model.sliding_window == 9 and stretched.model.rope_scaling is not None
    assert f"initial weights  {folder}" in layout_report(job, 1)
    (folder / "model.yaml").unlink()
    assert JobConfig.from_yaml(job.to_yaml()) == job, "the resolved job needs no other file"


def test_weights_of_another_model_are_refused_with_the_keys(tmp_path: Path) -> None:
    text = BARE.replace("FOLDER", str(converted(tmp_path)))
    said = report(tmp_path, "model.hidden_size=128", "model.num_hidden_layers=3", "model.qk_norm=false", text=text)
    assert "1 error" in said and "job.yaml:4: model.init_from" in said
    assert "of another model: hidden_size (128 here, 64 there), qk_norm (False here, True there); leave" in said


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        (None, "is neither a run (config.yaml) nor a converted model (model.yaml); check the path"),
        ("config.json", "is a Hugging Face folder; convert it once: python launch/convert.py from-hf"),
        ("model.yaml", "has no model section"),
    ],
)
def test_initial_weights_that_are_none(tmp_path: Path, file: str | None, complaint: str) -> None:
    if file:
        (tmp_path / file).write_text("{}")
    said = report(tmp_path, "training.max_steps=0", text=BARE.replace("FOLDER", str(tmp_path)))
    assert "2 errors" in said and complaint in said and "missing" not in said


def test_defaults_and_derived_numbers(tmp_path: Path) -> None:
    job = load(tmp_path, "parallel.tensor_parallel_size=2", "training.micro_batch_size=2", world_size=4)
    assert (job.data_parallel_size(4), job.accumulation_steps(4)) == (2, 2)
    assert job.run_path == Path("runs/test")
    assert (job.tokens_per_step, job.total_steps) == (512, 10)
    assert job.optimizer.betas == (0.9, 0.95)
    assert job.model.head_dim == 8
    assert load(tmp_path, "job.run_directory=/data/{name}-a").run_path == Path("/data/test-a")


def test_the_first_limit_counts(tmp_path: Path) -> None:
    assert load(tmp_path, "training.max_tokens=513").total_steps == 2  # 512 tokens a step, the last one begun counts
    assert load(tmp_path, "training.max_tokens=1_000_000").total_steps == 10
    assert load(tmp_path, "training.max_steps=null", "training.max_tokens=1024").total_steps == 2


@pytest.mark.parametrize(
    ("configured", "device", "resolved"),
    [("auto", "cpu", "fp32"), ("auto", "cuda", "bf16"), ("fp16", "cuda", "fp16"), ("fp32", "cuda", "fp32")],
)
def test_precision_follows_the_device_unless_given(tmp_path: Path, configured: str, device: str, resolved: str) -> None:
    assert load(tmp_path, f"training.precision={configured}").resolve_precision(device) == resolved


def test_all_faults_in_one_report(tmp_path: Path) -> None:
    text = JOB.replace("  max_steps: 10\n", "  max_steps: ten\n  sequence_lenght: 64\n")
    text = text.replace("  name: test\n", "  name: test\n  name: again\n").replace("1e-3", "-1.0")
    assert report(tmp_path, "parallel.tensor_parallel_size=3", "monitr.log_interval=5", text=text, world_size=4) == (
        "job.yaml: 7 errors in the job's configuration\n"
        "  job.yaml:3: job.name\n"
        "      duplicate key, first given on line 2; keep one of the two\n"
        "  command line: monitr\n"
        "      unknown section; did you mean monitor? Sections: job, model, parallel, data, optimizer, training, "
        "checkpoint, monitor, profile, health, slurm\n"
        "  job.yaml:14: optimizer.learning_rate = -1.0\n"
        "      must be greater than 0; give number > 0\n"
        "  job.yaml:18: training.max_steps = ten\n"
        "      must be a valid integer, not text; give integer >= 1 or null (default: null)\n"
        "  job.yaml:19: training.sequence_lenght = 64\n"
        "      unknown key; did you mean training.sequence_length?\n"
        "  command line: parallel.tensor_parallel_size = 3\n"
        "      num_attention_heads (8) and num_key_value_heads (4) must both be divisible by tensor_parallel_size (3); "
        "valid sizes here: 1, 2, 4\n"
        "  command line: parallel.tensor_parallel_size = 3\n"
        "      world size (4) must be a multiple of tensor_parallel_size x context_parallel_size (3 x 1 = 3); "
        "start 3 processes or change the sizes"
    )


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


def test_compiled_blocks_split_no_heads(tmp_path: Path) -> None:
    sizes = "parallel.tensor_parallel_size=2", "training.compile=true"
    assert "compile is true with tensor_parallel_size (2) above 1" in report(tmp_path, *sizes)
    assert load(tmp_path, "training.compile=true").compiles("cpu")
    assert load(tmp_path).compiles("cuda") and not load(tmp_path).compiles("cpu")
    assert not load(tmp_path, "parallel.tensor_parallel_size=2").compiles("cuda")


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
    ("override", "place", "message"),
    [
        ("training.max_step=5", "training.max_step = 5", "unknown key; did you mean training.max_steps?"),
        ("data.learning_rate=1.0", "data.learning_rate = 1.0", "belongs in section optimizer: optimizer.learning_rate"),
        ("tensor_parallel.size=2", "tensor_parallel", "unknown section; did you mean"),
        (
            "model.rope_scaling={factor: 8.0, low_freq_factor: 1.0}",
            "model.rope_scaling.low_freq_factor = 1.0",
            "did you mean model.rope_scaling.low_frequency_factor?",
        ),
        ("model.rope_scaling.factor=0.5", "model.rope_scaling.factor = 0.5", "must be greater than 1"),
        (
            "model.rope_scaling={factor: 8.0, beta_fast: 16.0}",
            "model.rope_scaling",
            "beta_fast (16.0) belongs to kind yarn, not llama3",
        ),
        (
            "model.rope_scaling={kind: yarn, factor: 8.0, beta_fast: 0.5}",
            "model.rope_scaling",
            "beta_fast (0.5) must be greater than beta_slow (1.0); YaRN uses 32.0 and 1.0",
        ),
        (
            "model.rope_scaling=8",
            "model.rope_scaling = 8",
            "must be a group of keys: kind, factor, original_sequence_length",
        ),
        ("training.max_steps=5.0", "training.max_steps = 5.0", "must be a valid integer; give integer >= 1"),
        ("training.max_steps='5'", "training.max_steps = 5", "must be a valid integer, not text"),
        ("training.max_steps=true", "training.max_steps = true", "must be a valid integer"),
        ("training.deterministic=yes", "training.deterministic = yes", "must be a valid boolean, not text"),
        (
            "parallel.sequence_parallel=yes",
            "parallel.sequence_parallel = yes",
            "give one of auto, true, false (default: auto)",
        ),
        (
            "training.activation_checkpointing=all",
            "training.activation_checkpointing = all",
            "give one of auto, none, selective",
        ),
        ("training.deterministic=1", "training.deterministic = 1", "must be a valid boolean"),
        ("training.precision=fp8", "training.precision = fp8", "give one of auto, fp32, bf16, fp16 (default: auto)"),
        ("parallel.zero_stage=4", "parallel.zero_stage = 4", "must be less than or equal to 3"),
        ("optimizer.eps=.inf", "optimizer.eps = inf", "must be a finite number"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate = nan", "must be a finite number"),
        ("optimizer.betas=[0.9, 1.5]", "optimizer.betas[1] = 1.5", "must be less than 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas = [0.9]", "too short; give list of 2 x number >= 0 and < 1"),
        ("job.name=a/b", "job.name = a/b", "must match pattern"),
        ("slurm.time=4 hours", "slurm.time = 4 hours", "must match pattern"),
        ("data.tokenizer=", "data.tokenizer = null", "must be a valid string"),
    ],
)
def test_a_fault_names_its_key_value_and_remedy(tmp_path: Path, override: str, place: str, message: str) -> None:
    text = report(tmp_path, override)
    assert f"  command line: {place}" in text
    assert message in text
    assert "1 error in" in text


@pytest.mark.parametrize("override", ["training", "training=3", "max_steps=3", ".max_steps=3", "training..x=1", "=1"])
def test_an_override_that_is_none(tmp_path: Path, override: str) -> None:
    assert f"{override!r} is not of the form section.key=value" in report(tmp_path, override)


def test_override_of_a_value_as_if_a_group(tmp_path: Path) -> None:
    assert "training.max_steps is a value, not a group of keys" in report(tmp_path, "training.max_steps.x=1")


def test_overrides_are_yaml_and_the_last_counts(tmp_path: Path) -> None:
    overrides = ["optimizer.betas=[0.8, 0.9]", "job.name=a", "job.name=b", "slurm.time=04:00:00"]
    job = load(tmp_path, *overrides, "model.rope_scaling.factor=8.0", "optimizer.learning_rate=1e-4")
    assert (job.optimizer.betas, job.job.name, job.slurm.time) == ((0.8, 0.9), "b", "04:00:00")
    assert job.model.rope_scaling is not None and job.model.rope_scaling.factor == 8
    assert job.optimizer.learning_rate == 1e-4


def test_an_override_mends_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, "training.max_steps=3", text=JOB.replace("10", "ten")).training.max_steps == 3


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
        (["checkpoint.directory=''"], "must have at least 1 character"),
        (
            ["checkpoint.accept_changes=[data, optimizer.learning_rate]"],
            "optimizer.learning_rate is no key that a resume refuses; those are data, model.KEY, job.seed",
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
            ["training.memory_budget_gib=70", "training.activation_checkpointing=full"],
            "memory_budget_gib (70) is read by activation_checkpointing auto only (here full)",
        ),
        (["training.max_steps=null"], "max_steps and max_tokens are both missing"),
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
        (["model.num_key_value_heads=3"], "num_attention_heads (8) must be divisible by num_key_value_heads (3)"),
        (["model.hidden_size=63"], "hidden_size (63) must be divisible by num_attention_heads (8)"),
    ],
)
def test_keys_that_do_not_agree(tmp_path: Path, overrides: list[str], message: str) -> None:
    text = report(tmp_path, *overrides)
    assert message in text
    assert "1 error in" in text


def test_checkpoint_rules_let_sound_keys_pass(tmp_path: Path) -> None:
    overrides = ["save_interval=20", "keep_every=60", "accept_changes=[data, model.qk_norm, optimizer.betas]"]
    job = load(tmp_path, *(f"checkpoint.{override}" for override in overrides))
    assert job.checkpoint.keep_every == 60 and job.checkpoint.accept_changes[1] == "model.qk_norm"
    assert job.checkpoint_location == str(job.run_path / "checkpoints")
    for place in ("memory://runs/{name}", "shared/{name}/steps"):
        assert load(tmp_path, f"checkpoint.directory={place}").checkpoint_location == place.replace("{name}", "test")


def test_named_kernels_need_not_be_here(tmp_path: Path) -> None:
    assert load(tmp_path, "model.attention_backend=flash_attn_4").model.attention_backend == "flash_attn_4"


def test_secondary_partitions_divide_the_ranks(tmp_path: Path) -> None:
    overrides = ["parallel.tensor_parallel_size=2", "parallel.secondary_partition_size=4"]
    assert load(tmp_path, *overrides).parallel.secondary_partition_size == 4
    message = "secondary_partition_size (4) must divide data x context (6 ranks here); valid: 1, 2, 3, 6"
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("job: [", "job.yaml:1\n      not valid YAML"),
        ("job:\n\tname: x\n", "job.yaml:2\n      not valid YAML"),
        ("job: &a {name: x}\nslurm: *a\n", "job.yaml:2\n      not valid YAML: aliases are not read"),
        ("a: 1\n--- \nb: 2\n", "not valid YAML: expected a single document"),
        ("job: \x01\n", "job.yaml:1\n      not valid YAML"),
        ("- job\n", "job.yaml:1\n      must be sections of keys: job, model"),
        ("job: 3\n", "job.yaml:1: job = 3\n      must be a group of keys: name, run_directory"),
        ("? [a]\n: 1\n", "a key must be a plain word"),
        ("job: {seed: !!int x}\n", "invalid literal for int()"),
        ("job: {seed: !!python/name:os.system x}\n", "could not determine a constructor"),
        ("", "model.vocab_size\n      missing (Rows of the embedding); give integer > 0"),
    ],
)
def test_files_that_are_no_job(tmp_path: Path, text: str, message: str) -> None:
    assert message in report(tmp_path, text=text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_job(tmp_path / "none.yaml", [], None)
    with pytest.raises(ConfigError, match="Is a directory"):
        load_job(tmp_path, [], None)
    (tmp_path / "latin.yaml").write_bytes(b"job: {name: caf\xe9}\n")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 15\)"):
        load_job(tmp_path / "latin.yaml", [], None)


def test_missing_keys_are_all_named(tmp_path: Path) -> None:
    text = report(tmp_path, text="training: {max_steps: 1}\n")
    for key in ("model.hidden_size", "data.source", "optimizer.learning_rate", "training.sequence_length"):
        assert f"{key}\n      missing" in text


def test_a_section_may_be_empty(tmp_path: Path) -> None:
    assert load(tmp_path, text=JOB + "slurm:\n").slurm.nodes == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("1_000", 1000),
        ("-7", -7),
        ("010", "010"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("04:00:00", "04:00:00"),
        ("2024-01-01", "2024-01-01"),
        ("0x1f", "0x1f"),
        ("'1e-4'", "1e-4"),
    ],
)
def test_plain_scalars(text: str, value: object) -> None:
    found = read_yaml(text).value
    assert found == value and type(found) is type(value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=6,
    )
)
def test_what_is_written_reads_back(value: object) -> None:
    document = read_yaml(write_yaml({"key": value}))
    assert document.problems == []
    assert document.value == {"key": value}


@given(st.text())
def test_reading_never_raises(text: str) -> None:
    read_yaml(text)


@pytest.mark.parametrize("prompt", ["1e-4", "no", "", "a: b", "\u00e9\n\t", "null", "#", "'\"", "0x1", "2024-01-01"])
def test_a_resolved_job_loads_back_equal(tmp_path: Path, prompt: str) -> None:
    job = load(tmp_path, "model.rope_scaling.factor=8.0", "training.max_tokens=10_000")
    job = job.model_copy(update={"training": job.training.model_copy(update={"sample_prompt": prompt})})
    assert JobConfig.from_yaml(job.to_yaml()) == job
    assert load(tmp_path, text=job.to_yaml()) == job


def test_a_job_built_in_code_keeps_the_rules(tmp_path: Path) -> None:
    values = load(tmp_path).model_dump()
    values["parallel"]["tensor_parallel_size"] = 3
    with pytest.raises(ValueError, match="must both be divisible by tensor_parallel_size"):
        JobConfig.model_validate(values)


def test_the_reference_is_current() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), (
        "run: python -m launch.schema_docs > docs/configuration.md"
    )
