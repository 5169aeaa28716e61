"""Loading a job: what is accepted, and that every fault is reported, all at once, with place, key, value and remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.check import layout_report
from launch.config import ConfigError, JobConfig, load_job
from launch.weights.stored_model import stored_model, write_model
from model.config import ModelConfig
from tests.unit.job_files import JOB, load, report

ROOT = Path(__file__).resolve().parents[2]


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
        ("model.yaml", "model.yaml is not UTF-8 text (byte 7); restore it"),
    ],
)
def test_initial_weights_that_are_none(tmp_path: Path, file: str | None, complaint: str) -> None:
    if file:
        (tmp_path / file).write_text("{}")
        assert "x is neither a run" in report(tmp_path, text=BARE.replace("FOLDER", f"{tmp_path}/{file}/x"))
    if complaint.endswith("restore it"):
        (tmp_path / "model.yaml").write_bytes(b"model: \xff")
    said = report(tmp_path, "training.max_steps=0", text=BARE.replace("FOLDER", str(tmp_path)))
    assert "2 errors" in said and complaint in said and "missing" not in said


def test_defaults_and_derived_numbers(tmp_path: Path) -> None:
    job = load(tmp_path, "parallel.tensor_parallel_size=2", "training.micro_batch_size=2", world_size=4)
    assert (job.mesh_shape(4).data_parallel_size, job.accumulation_steps(4)) == (2, 2)
    assert job.run_path == Path("runs/test")
    assert (job.tokens_per_step, job.total_steps) == (512, 10)
    assert job.optimizer.betas == (0.9, 0.95)
    assert job.model.head_dim == 8
    assert load(tmp_path, "job.run_directory=/data/{name}-a").run_path == Path("/data/test-a")


def test_home_is_written_as_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell sees these paths, and nobody wants a folder called ~, which is easily removed with too much beside."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ["job.run_directory=~/runs/{name}", "data.cache_directory=~/cache", "checkpoint.directory=~/kept/{name}"]
    job = load(tmp_path, *paths)
    assert job.run_path == tmp_path / "runs" / job.job.name
    assert job.data.cache_directory == f"{tmp_path}/cache"
    assert job.checkpoint_location == f"{tmp_path}/kept/{job.job.name}"
    assert load(tmp_path, "checkpoint.directory=memory://~/a").checkpoint_location == "memory://~/a"


def test_home_is_read_from_as_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder, home = converted(tmp_path), str(tmp_path)
    corpora = ["data.source=indexed", "data.blend=[{path: ~/a}, {path: ~/b-*}]", "data.validation_paths=[~/c]"]
    files = ["data.tokenizer=~/tokenizer.json", "slurm.template=~/job.sh"]
    job = load(tmp_path, *corpora, *files, text=BARE.replace("FOLDER", "~/converted"))
    assert job.model == stored_model(folder).model_copy(update={"init_from": str(folder)})
    assert [corpus.path for corpus in job.data.blend] == [f"{home}/a", f"{home}/b-*"]
    assert job.data.validation_paths == (f"{home}/c",)
    assert (job.data.tokenizer, job.slurm.template) == (f"{home}/tokenizer.json", f"{home}/job.sh")
    texts = load(tmp_path, "data.source=files", "data.files=[~/*.txt, here/~]")
    assert texts.data.files == (f"{home}/*.txt", "here/~")


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
        "start 3 or 6 processes or change the sizes"
    )


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
        ("job.name=2026", "job.name = 2026", "must be a valid string; in quotes it is one; give text"),
        ("job.name=a b", "job.name = a b", "(Name of the run: letters, digits, dots, dashes and underscores)"),
        ("data.files=a.txt", "data.files = a.txt", "must be a list; give list of text"),
        ("data.blend=[{path: 3}]", "data.blend[0].path = 3", "must be a valid string"),
        ("data.blend=[{path: x}]", "data.blend = [{path: x}]", "blend is given but source (python_stdlib)"),
        ("slurm.container=apptainer exec 'x", "slurm.container", "no closing quotation; quote words as in a shell"),
        ("slurm.environment=[]", "slurm.environment = []", "must be a group of names, each with text or integer"),
        ("slurm.environment={A: true}", "slurm.environment.A = true", "must be text or integer; in quotes it is text"),
        ("slurm.environment={A-B: 1}", "slurm.environment.A-B\n", "this name must match pattern"),
        ("slurm.gres=gpu:h100:8", "slurm.gres", "already, and gpus_per_node is put after it; give gpu:h100"),
        ("slurm.sbatch_options=[-N 2]", "slurm.sbatch_options = [-N 2]", "set slurm.nodes and slurm.gpus_per_node"),
        ("slurm.sbatch_options=[mail-type=END]", "slurm.sbatch_options[0] = mail-type=END", "must match pattern"),
        ("slurm.srun_options=[--mpi none]", "slurm.srun_options[0] = --mpi none", "must match pattern"),
        ("slurm.srun_options=[label]", "slurm.srun_options[0] = label", "must match pattern"),
        ("training.precision=half", "training.precision = half", "is none of these; give one of auto, fp32, bf16"),
        ("model.rope_theta=.inf", "model.rope_theta = inf", "must be a finite number"),
        ("model.rope_scaling={factor: .inf}", "model.rope_scaling.factor = inf", "must be a finite number"),
        ("model.num_hidden_layers=1000000", "model.num_hidden_layers = 1000000", "less than or equal to 10000"),
        (
            "training.max_steps=9223372036854775808",
            "training.max_steps",
            "an integer of 19 digits; none here is beyond",
        ),
        ('training.sample_prompt="\\ud83d"', "training.sample_prompt", "character 0 is half of a pair (a surrogate)"),
        ('model.init_from="a\\0b"', "model.init_from", "no text: character 1 is NUL, which no path can hold"),
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
    ("text", "message"),
    [
        ("job: [", "job.yaml:1\n      not valid YAML"),
        ("job:\n\tname: x\n", "job.yaml:2\n      not valid YAML"),
        ("job: &a {name: x}\nslurm: *a\n", "job.yaml:2\n      not valid YAML: aliases are not read"),
        ("a: 1\n--- \nb: 2\n", "not valid YAML: expected a single document"),
        ("job: \x01\n", "job.yaml:1\n      not valid YAML"),
        ("job: {name: x}\nslurm: {<<: {nodes: 1}}\n", "job.yaml:2: slurm\n      << (a merge) is not read; write"),
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


def test_files_of_another_kind_are_refused_at_once(tmp_path: Path) -> None:
    """A data set, or its manifest."""
    assert "not valid YAML: nested too deep" in report(tmp_path, text="[" * 9000 + "]" * 9000)
    long = "".join(f"row{i}: {i}\n" for i in range(100_000))
    assert "has more than 1,000,000 characters, which no job has; check the path" in report(tmp_path, text=long)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_job(tmp_path / "none.yaml", [], None)
    with pytest.raises(ConfigError, match="Is a directory"):
        load_job(tmp_path, [], None)
    (tmp_path / "latin.yaml").write_bytes(b"job: {name: caf\xe9}\n")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 15\)"):
        load_job(tmp_path / "latin.yaml", [], None)


@pytest.mark.parametrize(
    ("fault", "others", "message"),
    [
        (
            "data.packing=tight",
            ["data.source=indexed", "data.blend=[{path: a/web}, {path: b/web}]"],
            "2 corpora have 1 names: web comes twice",
        ),
        ("slurm.nodes=0", ["slurm.time=2", "slurm.stop_seconds=300"], "must be less than the time limit (2, 120 s)"),
        ("model.vocab_size=0", ["model.head_dim=null", "data.source=files"], "files is empty but source is files"),
    ],
)
def test_a_fault_hides_no_other_of_its_section(tmp_path: Path, fault: str, others: list[str], message: str) -> None:
    """Rules read the sound keys beside it as of a sound section; a blend there ended the check in a traceback."""
    said = report(tmp_path, fault, *others)
    assert fault.split("=")[0] in said and message in said and "2 errors" in said


def test_huge_numbers_are_refused_at_once(tmp_path: Path) -> None:
    """Remedies list divisors; those of a world, or of heads, that nobody has took hours to find."""
    said = report(tmp_path, "parallel.secondary_partition_size=3", world_size=2**31)
    assert "secondary_partition_size (3) must divide dp x cp (2147483648 ranks here); valid: 1, 2, 4, 8," in said
    heads = ["model.hidden_size=1099511627776", "model.num_attention_heads=1099511627776"]
    assert "must be less than or equal to 1000000" in report(tmp_path, *heads, "model.num_key_value_heads=3")


def test_missing_keys_are_all_named(tmp_path: Path) -> None:
    text = report(tmp_path, text="training: {max_steps: 1}\n")
    for key in ("model.hidden_size", "data.source", "optimizer.learning_rate", "training.sequence_length"):
        assert f"{key}\n      missing" in text


def test_a_section_may_be_empty(tmp_path: Path) -> None:
    assert load(tmp_path, text=JOB + "slurm:\n").slurm.nodes == 1


@pytest.mark.parametrize("prompt", ["1e-4", "no", "", "a: b", "\u00e9\n\t", "null", "#", "'\"", "0x1", "2024-01-01"])
def test_a_resolved_job_loads_back_equal(tmp_path: Path, prompt: str) -> None:
    job = load(tmp_path, "model.rope_scaling.factor=8.0", "training.max_tokens=10_000")
    job = job.model_copy(update={"training": job.training.model_copy(update={"sample_prompt": prompt})})
    assert JobConfig.from_yaml(job.to_yaml()) == job
    assert load(tmp_path, text=job.to_yaml()) == job
