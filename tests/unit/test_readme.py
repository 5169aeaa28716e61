"""What README and docs name exists, what they tell a reader to type runs, and the errors they quote are real."""

from __future__ import annotations

import ast
import gzip
import importlib
import importlib.util
import json
import re
import shlex
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.config import SECTIONS
from launch.monitoring.tracing import DATA, OPTIMIZER, STEPS
from launch.train import main as train
from tests.unit.commands import run_in

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```([a-z ]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    return [text.strip() for found, text in FENCE.findall(path.read_text()) if found == language]


# -- commands ---------------------------------------------------------------------------------------------------------


def commands() -> list[str]:
    """Every command of the README's shell blocks, without comments."""
    lines = "\n".join(blocks(README, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def python_strings(path: str) -> str:
    """The string constants of a test, in order: a command that it builds from a list reads as one line."""
    constants = [
        node.value for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Constant)
    ]
    return " ".join(value for value in constants if isinstance(value, str))


OF_A_RUN = ("generate", "run_eval", "convert", "audit_data")
"""Commands that need a trained run."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with two steps of the quickstart, by one process; the second one is traced."""
    folder = tmp_path_factory.mktemp("trained")
    less = "training.max_steps=2 optimizer.warmup_steps=1 training.sample_tokens=0 training.evaluation_batches=1"
    alone = "parallel.tensor_parallel_size=1 parallel.context_parallel_size=1 job.device=cpu monitor.histograms=true"
    alone += " profile.steps=[2,2]"
    said = run_in(folder, "train", [*less.split(), *alone.split()])
    assert 'warning: training.sample_prompt = "def " does nothing: sample_tokens (0) writes no sample' in said
    assert "steps 2 to 2, milliseconds a step on this rank:" in said
    return folder


def test_a_job_is_traced_as_its_configuration_says(trained: Path) -> None:
    """What docs/performance.md promises of `profile.steps`; the ranges of the trainer's own parts are in it."""
    traces = trained / "runs" / "quickstart" / "trace"
    with gzip.open(traces / "rank-0.pt.trace.json.gz", "rt") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"]]
    assert [names.count(name) for name in (STEPS, DATA, OPTIMIZER)] == [1, 1, 1] and names.count("aten::mm") > 10
    parts = json.loads((traces / "rank-0.parts.json").read_text())
    assert parts["total"] > parts["computation"] > parts["optimizer"] > 0 <= parts["data"]


@pytest.mark.parametrize("command", commands())
def test_every_command_runs(command: str, request: pytest.FixtureRequest) -> None:
    words = shlex.split(command)
    if words[0] == "python" and Path(words[1]).stem in OF_A_RUN:
        said = run_in(request.getfixturevalue("trained"), Path(words[1]).stem, words[2:])
        assert "Traceback" not in said
        return
    if words[:2] in (["python", "launch/submit.py"], ["python", "launch/status.py"]):
        tested = " ".join(map(python_strings, ("tests/cluster/slurm_run.py", "tests/cluster/test_slurm.py")))
        assert words[1].removeprefix("launch/") in tested
        if words[1] == "launch/submit.py":
            dry = [sys.executable, *words[1:], *(["--dry-run"] if "--dry-run" not in words else [])]
            ended = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, timeout=600)
            assert ended.returncode == 0 and ended.stdout.startswith("#!/bin/bash"), ended.stderr
    elif "--check" in words:  # which the test of all pages runs
        shown = [shlex.split(arguments, comments=True) for arguments in checks()]
        assert words[:2] == ["python", "launch/train.py"] and words[2:] in shown
    elif words[-1] == "--table":
        ended = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0, ended.stderr
        rates = re.findall(r"^\| [^|]+ \| ([\d,]+) \|", README.read_text(), re.MULTILINE)
        assert rates and all(f"| {rate} |" in ended.stdout for rate in rates), "the table above it shows other figures"
    elif words[0] == "make":
        assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words[1]
        in_ci = re.search(rf"\bmake {re.escape(words[1])}\b", (ROOT / ".ci" / "run").read_text())
        # CI runs the one; of the others, which wait for a reader or a GPU, make reads the rules.
        assert in_ci or words[1] in {"board", "parity", "test-gpu", "clean"}
        subprocess.run(["make", "-n", words[1]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "deepspeed":
        recipes = (ROOT / "Makefile").read_text().replace("$(BIN)/", "")
        tested = python_strings("tests/cluster/test_training.py")
        options = command.replace("--hostfile hostfile", "--hostfile")
        assert command in recipes or options in tested, "neither a target of make nor a test runs it"
    else:
        pytest.fail(f"nothing runs {command!r}")


def checks() -> list[str]:
    """The arguments of each `--check` that a page or a job's first lines show."""
    shown = re.compile(r"python launch/train\.py (--config \S+ --check[^`\n]*)")
    pages = [*DOCUMENTS, *(ROOT / "configs").glob("*.yaml")]
    return sorted({arguments for path in pages for arguments in shown.findall(path.read_text())})


@pytest.mark.parametrize("arguments", checks())
def test_every_check_that_a_page_shows_passes(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert train(shlex.split(arguments, comments=True)) == 0, capsys.readouterr().err
    assert "valid on" in capsys.readouterr().out


def test_the_readme_shows_commands() -> None:
    assert len(checks()) > len([command for command in commands() if "--check" in command]) >= 4
    assert {"make train", "make test"} <= set(commands()) and len(commands()) >= 8


# -- names ------------------------------------------------------------------------------------------------------------


def names(path: Path) -> set[str]:
    """Code spans that look like a path, a module or a configuration key, and the targets of links to files."""
    text = path.read_text()
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    heads = "|".join(["launch", "model", "parallel", "configs", "tests", "benchmarks", "docs", *SECTIONS])
    words = {word.rstrip(".,:;") for span in spans for word in span.split() if re.match(rf"({heads})[./]\w", word)}
    return words | {str((path.parent / target).resolve().relative_to(ROOT)) for target in targets if target}


def exists(name: str) -> bool:
    name = name.split("=")[0]
    if "/" in name or name.endswith((".md", ".yaml")):
        return (ROOT / name).exists() or "NAME" in name
    head, *rest = name.split(".")
    if head in SECTIONS and rest[0] in SECTIONS[head].model_fields:
        return True
    path = ROOT.joinpath(head, *rest)
    if path.is_dir() or path.with_suffix(".py").exists():
        return True
    owner = ROOT.joinpath(head, *rest[:-1])
    files = [owner / "__init__.py", owner.with_suffix(".py")]
    return any(re.search(rf"\b{re.escape(rest[-1])}\b", file.read_text()) for file in files if file.exists())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_name_exists(path: Path) -> None:
    assert not (missing := {name for name in names(path) if not exists(name)}), missing


def test_no_document_is_left_out_of_the_readme() -> None:
    linked = README.read_text()
    assert all(f"(docs/{path.name})" in linked for path in (ROOT / "docs").glob("*.md"))


def test_names_that_do_not_exist_are_noticed() -> None:
    assert not exists("launch/nowhere.py") and not exists("training.max_stepz") and not exists("parallel.nowhere.thing")
    assert exists("training.max_steps") and exists("parallel.tensor.check_head_divisibility")


def test_anchors_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+#[^)\s]+)\)", path.read_text()):
            file, anchor = target.split("#")
            titles = re.findall(r"^#+ (.*)$", (path.parent / file).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}, target


# -- quoted errors ----------------------------------------------------------------------------------------------------

TROUBLE = ROOT / "docs" / "troubleshooting.md"


@cache
def messages() -> list[re.Pattern[str]]:
    """A pattern for every string and f-string of the packages; its groups are the literal parts."""
    found = []
    for package in ("launch", "model", "parallel"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                parts: list[str | None] = []
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    parts = [node.value]
                if parts and parts[-1]:
                    parts[-1] = parts[-1].rstrip()  # what follows may have been left out of the quote
                if sum(len(part) for part in parts if part) >= 12:
                    found.append(
                        re.compile("".join(".*?" if part is None else f"({re.escape(part)})" for part in parts))
                    )
    return found


def longest_gap(quote: str) -> int:
    """Characters in the longest stretch of a quote that no message of the source accounts for."""
    said = [False] * len(quote)
    for pattern in messages():
        match = pattern.search(quote)
        for start, stop in match.regs[1:] if match else ():
            said[start:stop] = [True] * (stop - start)
    return max(len(gap) for gap in "".join("s" if letter else "." for letter in said).split("s"))


LONGEST_VALUE = 45
"""Characters of a value in a quoted message: a path, a list of sizes."""


@pytest.mark.parametrize("quote", blocks(TROUBLE, "text"))
def test_quoted_errors_are_in_the_source(quote: str) -> None:
    assert quote == missing_module() or longest_gap(quote) <= LONGEST_VALUE


@cache
def missing_module() -> str:
    """The last line of what an interpreter without the project says."""
    command = [sys.executable, "-I", "-S", str(ROOT / "launch" / "train.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True).stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("quote", blocks(TROUBLE, "text deepspeed"))
def test_quoted_errors_of_deepspeed_are_its_own(quote: str) -> None:
    found = importlib.util.find_spec("deepspeed")
    assert found is not None and found.origin is not None
    source = (Path(found.origin).parent / "launcher" / "runner.py").read_text()
    literal = re.sub(r'"\s*\n\s*"', "", source)
    if quote.startswith("not enough values"):
        assert "key, val = var.split('=', maxsplit=1)" in source
        with pytest.raises(ValueError, match=re.escape(quote)):
            line = "# a comment"
            _key, _value = line.split("=", maxsplit=1)
    else:
        assert quote in literal or quote.replace("'pdsh'", "'{args.launcher}'") in literal


@pytest.mark.parametrize("quote", blocks(TROUBLE, "text torch"))
def test_quoted_errors_of_torch_appear(quote: str) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(RuntimeError, match=re.escape(quote)):
            dist.TCPStore("127.0.0.1", taken.getsockname()[1], is_master=True, wait_for_workers=False)


def test_a_quote_that_nothing_says_is_noticed() -> None:
    assert longest_gap("the flux capacitor (1) was found to be out of phase with the moon (2)") > LONGEST_VALUE
