"""A job's configuration: sections, the numbers derived from them, and strict loading.

A field's own rules stand with its type; rules that join keys are in `launch.rules`. Whatever can be known
without a process group or a device is checked, so that a bad job dies on the login node, with all its faults
in one report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from launch import rules
from launch.encoders import BYTES
from launch.parameters import Precision, count_parameters
from launch.stored_model import WeightsError, stored_keys
from launch.violations import ConfigError, Violation, section_violations, unknown_section
from launch.yaml_strict import KeyPath, read_yaml, write_yaml
from model.config import SHAPE_KEYS, ModelConfig
from parallel.mesh import MeshShape


class Section(BaseModel):
    """Strict: no unknown keys, no conversion between types, no infinities, no change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class JobSection(Section):
    """What the run is called and where it runs."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run: letters, digits, dots, dashes and underscores."""
    run_directory: str = Field(default="runs/{name}", min_length=1)
    """Where checkpoints, events and the resolved configuration go, relative to the working directory; {name}
    stands for job.name."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seeds initialisation and the order of the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs when every process of the node can have one, else the CPU."""


class ParallelSection(Section):
    """How the job is spread over processes; the data-parallel size is what remains of the world."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that split each layer's heads, inner projections and vocabulary. Keep it inside one node."""
    sequence_parallel: Literal["auto", True, False] = "auto"
    """Between the layers that tensor parallelism splits, each of its ranks holds and computes its part of the tokens
    (arXiv:2205.05198). auto: yes, where tensor_parallel_size divides a context-parallel rank's tokens."""
    context_parallel_size: int = Field(default=1, ge=1)
    """Ranks that split each sequence (ring attention)."""
    context_parallel_mode: Literal["auto", "heads", "exchange", "ring"] = "auto"
    """exchange: a rank fetches the keys its queries see and attends once. ring: keys travel from rank to rank and
    partial results are merged, which needs memory for one rank's keys only. heads: as many ranks as divide the KV heads
    of a tensor-parallel rank trade tokens for heads (arXiv:2309.14509); the rest exchange keys. auto takes what
    receives the fewest bytes, exchanging keys only while those of a layer fit in 1 GiB."""
    context_parallel_graphs: bool = False
    """Replay attention as CUDA graphs: up to about 4,096 tokens a rank the host takes longer to issue it than the GPUs
    to run it. Costs memory for a copy of each layer's inputs and gradients. GPUs of one host, without documents."""
    zero_stage: int = Field(default=3, ge=0, le=3)
    """What DeepSpeed shards over data x context: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters
    too."""
    gradient_reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients are summed over data x context; bf16 halves that traffic and rounds each sum."""
    overlap_communication: bool = True
    """ZeRO reduces gradients, and at stage 3 fetches parameters, beside computing."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu keeps master weights and moments in host memory and makes the update there (ZeRO-Offload, arXiv:2101.06840);
    needs zero_stage 2 or 3."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """cpu keeps this rank's share of the parameters in host memory while they are not gathered (ZeRO-Infinity,
    arXiv:2104.07857); needs zero_stage 3 and offload_optimizer."""
    secondary_partition_size: int = Field(default=1, ge=1)
    """Neighbours in data x context, such as those of one node, that share a second copy of the parameters, so that the
    backward pass gathers from them alone (hpZ of ZeRO++, arXiv:2306.10209); must divide data x context. 1: none."""


class BlendedCorpus(Section):
    """One corpus of the blend."""

    path: str = Field(min_length=1)
    """Path of its .bin and .idx without either ending, relative to the working directory; a glob joins several shards
    in the order of their names."""
    weight: float = Field(default=1.0, ge=0)
    """Its share of the sequences, relative to the other weights; 0 reads nothing. It may change when a
    run is resumed."""
    name: str | None = Field(default=None, min_length=1)
    """What checkpoints and the audit call it; null takes the last part of the path."""

    @property
    def label(self) -> str:
        """The name, given or taken from the path."""
        return self.name or Path(self.path).name


class DataSection(Section):
    """The corpus and how it becomes tokens (docs/data.md)."""

    source: Literal["python_stdlib", "files", "indexed"]
    """python_stdlib reads the running interpreter's own library; files reads what data.files names; indexed reads the
    token files of data.blend."""
    files: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Glob patterns of the text files, relative to the working directory; only with source: files."""
    blend: Annotated[tuple[BlendedCorpus, ...], Field(strict=False)] = ()
    """Corpora in Megatron's indexed format, with weights; only with source: indexed."""
    tokenizer: str = Field(default=BYTES, min_length=1)
    """bytes, or the path of a Hugging Face tokenizer.json. With source: indexed it serves prompts and samples only."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of each corpus held out for evaluation; whole documents go to one side or the other."""
    validation_paths: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Corpora of their own for evaluation, written like the path of a blend; then nothing is held out. Only with
    source: indexed."""
    packing: Literal["split", "best_fit"] = "split"
    """How documents fill sequences. split: one after the other, cut where a sequence ends. best_fit: rearranged among
    64 sequences at a time, so that few are cut; nothing is padded either way."""
    document_mask: bool = False
    """A token sees only its own document, where several are packed in one sequence."""
    cache_directory: str | None = None
    """Where token files of texts are kept between runs; null is ~/.cache/ringzero."""


class OptimizerSection(Section):
    """AdamW (arXiv:1711.05101) and its learning-rate schedule."""

    learning_rate: float = Field(gt=0)
    """Peak of the schedule."""
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = (0.9, 0.95)
    """Decay of Adam's two running means, each in [0, 1)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second mean."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices; norms are left alone."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after the warmup: cosine to the minimum, constant and a last decay (WSD, arXiv:2404.06395), or
    constant."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise to the peak."""
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """The last step's learning rate as a share of the peak; not used by constant."""
    decay_fraction: float = Field(default=0.1, gt=0, le=1)
    """Share of all steps that wsd spends decaying."""


class TrainingSection(Section):
    """Batches, length, precision and evaluation."""

    sequence_length: int = Field(ge=1)
    """Tokens of one sequence, before it is split over context-parallel ranks."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences of one forward pass of one data-parallel rank."""
    global_batch_size: int = Field(ge=1)
    """Sequences of one optimizer step, all ranks together. Gradient accumulation is derived from it."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Stop at the first step that has seen this many tokens; with max_steps too, whichever comes first."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 on GPUs and fp32 on CPUs; fp16 brings loss scaling."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest norm of the whole model's gradient; 0 leaves gradients alone."""
    activation_checkpointing: Literal["auto", "none", "selective", "attention", "full"] = "none"
    """What a block computes again in the backward pass, to keep less. selective: norms, rotation and activation, but no
    matrix product and no attention. attention: everything but attention (and its messages). full: everything, from the
    block's input. auto: the least that fits in memory, by the estimate of --check: the first blocks may have another
    policy than the rest."""
    memory_budget_gib: float | None = Field(default=None, gt=0)
    """Memory of one rank that auto fills; null is 90 % of the device's memory."""
    offload_activations: Literal["none", "cpu"] = "none"
    """cpu keeps in host memory what blocks keep (their input, and attention's output), and fetches it one block ahead
    in the backward pass; for very long sequences, with activation_checkpointing attention or full."""
    compile: Literal["auto", True, False] = "auto"
    """Compile transformer blocks with torch.compile, around attention. auto: on GPUs, without tensor parallelism (whose
    gradients come out wrong there) and without mlp_tile_tokens."""
    mlp_tile_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one rank that a feed-forward layer computes at a time, again in the backward pass, so that its inner
    tensors never exist whole; for very long sequences. null computes all at once."""
    evaluation_interval: int = Field(default=0, ge=0)
    """Steps between evaluations; 0 evaluates only at the end."""
    evaluation_batches: int = Field(default=8, ge=1)
    """Global batches of one evaluation."""
    deterministic: bool = False
    """Ask torch and the attention kernel for bitwise repeatable results, at some cost in speed."""
    sample_tokens: int = Field(default=0, ge=0)
    """Length of the sample that the trained model writes at the end; 0 writes none."""
    sample_prompt: str = ""
    """What the sample starts from."""


class CheckpointSection(Section):
    """Saving and resuming (docs/checkpoints.md)."""

    directory: str | None = Field(default=None, min_length=1)
    """Where checkpoints go: a directory that all nodes share, or a URL that fsspec reads, such as s3://bucket/{name};
    {name} stands for job.name. null is checkpoints in the run directory."""
    save_interval: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 saves only at the end."""
    keep_last: int = Field(default=3, ge=1)
    """Checkpoints kept; older ones are removed after a new one is complete."""
    keep_every: int = Field(default=0, ge=0)
    """Keep for good, too, those at multiples of so many steps; 0: none."""
    asynchronous: bool = True
    """Write in the background: training waits only for a copy of its state to host memory, 12 bytes for each parameter
    that a rank keeps. false writes from the state itself, and training waits."""
    on_save_error: Literal["warn", "stop"] = "warn"
    """What a failed save does in the middle of a run: warn goes on, stop ends the job, as a failed last
    save always does."""
    resume: Literal["auto", "never", "required"] = "auto"
    """auto continues from the newest checkpoint if there is one, required fails if there is none."""
    accept_changes: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Keys that may differ from the checkpoint's at a resume although they change the run, such as optimizer.betas;
    data accepts other tokens."""


class MonitorSection(Section):
    """What is written while training."""

    log_interval: int = Field(default=10, ge=1)
    """Steps between lines of the log."""
    histograms: bool = False
    """Histograms of parameters in TensorBoard, at each evaluation."""
    progress_bar: Literal["auto", "on", "off"] = "auto"
    """auto shows one on a terminal."""
    tensorboard: bool = True
    """Write TensorBoard events."""


class ProfileSection(Section):
    """A trace of a few steps (docs/performance.md)."""

    steps: Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None, Field(strict=False)] = None
    """First and last step to trace, counted from 1; null traces none. Each rank writes its trace into the run
    directory, and rank 0 says where the time went."""


class HealthSection(Section):
    """Slow nodes, slow ranks and hangs (docs/slurm.md)."""

    probe: bool = True
    """Before the first step, measure each node's devices, links and file system, and hold them against the others'."""
    outlier: float = Field(default=0.7, gt=0, lt=1)
    """Share of its peers' median below which a measured rate is an outlier."""
    exclude: bool = False
    """Under Slurm, queue the job again at once without the nodes that a probe has found outliers or on which a hang's
    missing ranks were."""
    step_limit: float = Field(default=10.0, gt=1)
    """Times the median of the last 20 steps, after which a step counts as hung."""
    minimum_step_seconds: float = Field(default=120.0, gt=0)
    """A step may always take so long."""
    first_step_seconds: float = Field(default=1800.0, gt=0)
    """What the start, each of the first five steps, an evaluation and a checkpoint may take at least."""
    on_hang: Literal["stop", "report"] = "stop"
    """stop ends a run that hangs after telling who is missing, so that it can go on elsewhere; report only tells."""
    hang_grace_seconds: float = Field(default=60.0, ge=0)
    """How long after that a step may still end by itself; the run then saves before it ends."""
    straggler: float = Field(default=1.3, gt=1)
    """Times its peers' median at ten logged steps in a row, from which on a rank is named as slow."""


Word = Annotated[str, Field(pattern=r"^\S+$")]
"""What stands on one `#SBATCH` line without blanks."""

Line = Annotated[str, Field(pattern=r"^[^\n]+$")]


class SlurmSection(Section):
    """What to ask Slurm for (docs/slurm.md)."""

    nodes: int = Field(default=1, ge=1)
    """Nodes of the job."""
    gpus_per_node: int = Field(default=8, ge=1)
    """GPUs of each node, one process each; with job.device: cpu, processes."""
    gres: Word | None = "gpu"
    """The generic resource that is a GPU, such as gpu or gpu:h100; null asks for none, as job.device: cpu does."""
    partition: Word | None = None
    """Partition to submit to; null takes the cluster's default."""
    account: Word | None = None
    """Account to charge."""
    qos: Word | None = None
    """Quality of service."""
    reservation: Word | None = None
    """Reservation to run in."""
    time: str | None = Field(default=None, pattern=r"^(\d+-\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2})$")
    """Time limit as sbatch reads it: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    constraint: Word | None = None
    """Node features to require."""
    exclude: Word | None = None
    """Nodes to keep away from, such as node[3,7-9]."""
    exclusive: bool = True
    """Take whole nodes, with all their CPUs and memory."""
    cpus_per_node: int | None = Field(default=None, ge=1)
    """CPUs of each node; null takes all that Slurm gives. Without exclusive that may be one for all processes."""
    memory: Word | None = None
    """Memory of each node, such as 500G; null takes the cluster's default, or all of it with exclusive."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str | int] = Field(
        default_factory=dict
    )
    """Variables that every process gets, such as NCCL_SOCKET_IFNAME: ib0."""
    modules: Annotated[tuple[Word, ...], Field(strict=False)] = ()
    """Loaded by `module load` before anything else."""
    setup: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    """Lines of bash that run on the first node before the job starts."""
    python: str | None = Field(default=None, min_length=1)
    """Interpreter on the nodes; null is the one that submits."""
    container: Line | None = None
    """Words before the command of each node, such as apptainer exec --nv image.sif; what srun itself takes goes into
    srun_options."""
    sbatch_options: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    """More `#SBATCH` lines, such as --mail-type=END."""
    srun_options: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    """More options of srun, one each, such as --container-image=image.sqsh."""
    template: str | None = Field(default=None, min_length=1)
    """File to render in place of the built-in job script; it holds {directives}, {setup} and {command}."""
    stop_seconds: int = Field(default=120, ge=1)
    """How long before the time limit the job is told to save and make room."""
    max_restarts: int = Field(default=20, ge=0)
    """How often a job that was stopped is queued again."""
    max_idle_slices: int = Field(default=2, ge=1)
    """Starts in a row from one and the same step, after which a job is not queued again."""

    @field_validator("time", mode="before")
    @classmethod
    def _minutes(cls, value: object) -> object:
        return str(value) if type(value) is int else value


class JobConfig(Section):
    """One job, complete and consistent. Derived numbers are methods and properties, never keys."""

    job: JobSection = Field(default_factory=JobSection)
    model: ModelConfig
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    data: DataSection
    optimizer: OptimizerSection
    training: TrainingSection
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    monitor: MonitorSection = Field(default_factory=MonitorSection)
    profile: ProfileSection = Field(default_factory=ProfileSection)
    health: HealthSection = Field(default_factory=HealthSection)
    slurm: SlurmSection = Field(default_factory=SlurmSection)

    @field_validator("*", mode="before")
    @classmethod
    def _empty_section(cls, value: object) -> object:
        return {} if value is None else value

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        violations = rules.violations(dict(self), broken=frozenset(), world_size=None)
        if violations:
            raise ConfigError("JobConfig", violations)
        return self

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """The inverse of `to_yaml`: every key is there, and no other file is read. Raises ConfigError."""
        return cls.model_validate(_validated(text, "configuration", (), None, resolved=True))

    def to_yaml(self) -> str:
        """Every key with its resolved value; `from_yaml` reads it back equal."""
        return write_yaml(self.model_dump(mode="json"))

    @property
    def run_path(self) -> Path:
        """Run directory, relative to the working directory unless configured absolute."""
        return Path(self.job.run_directory.replace("{name}", self.job.name))

    @property
    def checkpoint_location(self) -> str:
        """Where this run's checkpoints are: a path or a URL."""
        directory = self.checkpoint.directory
        return directory.replace("{name}", self.job.name) if directory else str(self.run_path / "checkpoints")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, all ranks together."""
        return rules.tokens_per_step(self.training)

    @property
    def total_steps(self) -> int:
        """Optimizer steps until max_steps or max_tokens is reached, whichever comes first."""
        return rules.total_steps(self.training)

    @property
    def num_parameters(self) -> int:
        """Elements of the whole model, without vocabulary padding."""
        return count_parameters(self.model)

    @property
    def sequence_parallel(self) -> bool:
        """Whether hidden states are split over tensor-parallel ranks too."""
        return rules.sequence_parallel(self.parallel, self.training)

    def compiles(self, device_type: str) -> bool:
        """Whether transformer blocks are compiled there."""
        if self.training.compile != "auto":
            return self.training.compile
        plain = self.parallel.tensor_parallel_size > 1 or self.training.mlp_tile_tokens is not None
        return device_type == "cuda" and not plain

    def mesh_shape(self, world_size: int) -> MeshShape:
        """Sizes of the three axes. Raises ValueError where tp x cp does not divide `world_size`."""
        return MeshShape.fit(world_size, self.parallel.tensor_parallel_size, self.parallel.context_parallel_size)

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that see different sequences. Raises ValueError where tp x cp does not divide the world."""
        return self.mesh_shape(world_size).data_parallel_size

    def accumulation_steps(self, world_size: int) -> int:
        """Micro batches of one optimizer step. Raises ValueError where they do not come out whole."""
        data_parallel_size = self.data_parallel_size(world_size)
        rules.check_global_batch(self.training.global_batch_size, self.training.micro_batch_size, data_parallel_size)
        return self.training.global_batch_size // (self.training.micro_batch_size * data_parallel_size)

    def resolve_precision(self, device_type: str) -> Precision:
        """The precision that this job uses on "cpu" or "cuda"."""
        if self.training.precision != "auto":
            return self.training.precision
        return "bf16" if device_type == "cuda" else "fp32"


SECTIONS: dict[str, type[BaseModel]] = {
    name: info.annotation
    for name, info in JobConfig.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
}


def load_job(path: Path, overrides: Sequence[str] = (), world_size: int | None = None) -> JobConfig:
    """The job in the YAML file `path`, changed by `section.key=value` overrides, of which the last counts.

    With `world_size` (processes of the job) the rules that need it are checked too. Touches no process group
    and no device. Raises ConfigError with every violation of the file, the overrides and the rules.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); check the path given to --config"
        raise ConfigError(str(path), [Violation((), reason, place=str(path))]) from None
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text (byte {error.start}); save it as UTF-8"
        raise ConfigError(str(path), [Violation((), reason, place=str(path))]) from None
    return JobConfig.model_validate(_validated(text, str(path), overrides, world_size))


def _validated(
    text: str, source: str, overrides: Sequence[str], world_size: int | None, *, resolved: bool = False
) -> dict[str, BaseModel]:
    """The sections, each valid and all in agreement; raises ConfigError with every fault."""
    document = read_yaml(text)
    places: dict[KeyPath, str] = {path: f"{source}:{line}" for path, line in document.lines.items()}
    found = [
        Violation(problem.path, problem.message, place=f"{source}:{problem.line}") for problem in document.problems
    ]
    raw = document.value if document.value is not None else {}
    if not isinstance(raw, dict):
        found.append(Violation((), f"must be sections of keys: {', '.join(SECTIONS)}", place=f"{source}:1"))
        raw = {}
    if any(not problem.path for problem in document.problems):  # half a document would only raise false alarms
        raise ConfigError(source, found)
    found += _apply_overrides(raw, overrides, places)
    for name in [name for name in raw if name not in SECTIONS]:
        found.append(Violation((name,), unknown_section(name, SECTIONS)))

    unreadable = [] if resolved else _take_keys_from_weights(raw.get("model"), found)
    sections: dict[str, BaseModel] = {}
    broken: set[KeyPath] = set()
    for name, section in SECTIONS.items():
        sections[name], faults = _validate_section(name, section, raw.get(name))
        if name == "model" and unreadable:
            faults = unreadable  # keys that would have come from there are not what is missing
            broken.add((name,))
        found += faults
        for fault in faults:
            broken.update(path[:2] for path in (fault.path, *fault.related))
    found += rules.violations(sections, frozenset(broken), world_size)
    if found:
        raise ConfigError(source, [_placed(violation, places, source) for violation in found])
    return sections


def _validate_section(name: str, section: type[BaseModel], raw: object) -> tuple[BaseModel, list[Violation]]:
    """The section, or as much of it as is sound, and its faults."""
    values = {} if raw is None else raw
    try:
        return section.model_validate(values), []
    except ValidationError as error:
        faults = section_violations(name, section, error, SECTIONS)
        wrong = {fault.path[1] for fault in faults if len(fault.path) > 1}
        sound = values if isinstance(values, Mapping) else {}
        return section.model_construct(**{key: value for key, value in sound.items() if key not in wrong}), faults


def _take_keys_from_weights(section: object, found: list[Violation]) -> list[Violation]:
    """Adds to a raw `model` section with init_from the keys that it leaves to those weights, and to `found` the
    section's own keys that do not fit them. Returns the fault where nothing can be read there."""
    if not isinstance(section, dict) or not isinstance(section.get("init_from"), str):
        return []
    path, folder = ("model", "init_from"), section["init_from"]
    try:
        stored = stored_keys(Path(folder))
    except WeightsError as error:
        return [Violation(path, str(error), folder)]
    differing = [key for key in SHAPE_KEYS if key in section and section[key] != stored.get(key)]
    if differing:
        listed = ", ".join(f"{key} ({section[key]} here, {stored.get(key)} there)" for key in differing)
        message = f"these weights are of another model: {listed}; leave these keys out, or correct them"
        found.append(Violation(path, message, folder))
    section |= {key: value for key, value in stored.items() if key not in section}
    return []


def _apply_overrides(raw: dict, overrides: Sequence[str], places: dict[KeyPath, str]) -> list[Violation]:
    """Writes each `section.key=value` into `raw` and notes its place; returns the faults of form."""
    faults = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path: KeyPath = tuple(key.split("."))
        if not equals or len(path) < 2 or not all(path):
            message = f"{override!r} is not of the form section.key=value, such as training.max_steps=100"
            faults.append(Violation((), message, place="command line"))
            continue
        document = read_yaml(text)
        faults += [Violation(path, problem.message, text, "command line") for problem in document.problems]
        if document.problems:
            continue
        group = raw
        for depth, part in enumerate(path[:-1]):
            if group.get(part) is None:
                group[part] = {}
            group = group[part]
            if not isinstance(group, dict):
                above = ".".join(map(str, path[: depth + 1]))
                faults.append(Violation(path, f"{above} is a value, not a group of keys", text, "command line"))
                break
        else:
            group[path[-1]] = document.value
            for known in [known for known in places if known[: len(path)] == path]:
                del places[known]
            places[path] = "command line"
    return faults


def _placed(violation: Violation, places: Mapping[KeyPath, str], source: str) -> Violation:
    """The violation with the place of its key, else of a key in it, else of the nearest group around it."""
    if violation.place:
        return violation
    path = violation.path
    around = [path[:depth] for depth in range(len(path), 0, -1) if path[:depth] in places]
    inside = [known for known in places if path and known[: len(path)] == path]
    exact = around[:1] if around[:1] == [path] else []
    known = next(iter([*exact, *inside, *around]), None)
    return replace(violation, place=places[known] if known is not None else source)
