"""The direction of imports, read from the source: launch -> parallel -> model.kernels, launch -> model."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [f for top in ("launch", "model", "parallel") for f in sorted((ROOT / top).rglob("*.py"))]
DEEPSPEED_HOMES = {"parallel/zero.py", "parallel/zero_stage3.py", "parallel/zero_inference.py"}
OURS = {"launch", "model", "parallel", "configs", "tests", "benchmarks"}


def imports(path: Path) -> set[str]:
    """Full dotted names that one file imports, at whatever depth; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            names |= {".".join([*package, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return names


def allowed(importer: str, name: str) -> bool:
    package, top = importer.split("/")[0], name.split(".")[0]
    if top == "deepspeed":
        return importer in DEEPSPEED_HOMES
    if top.startswith("flash_attn"):
        return importer.startswith("model/kernels/")
    if top in OURS - {package}:
        return (
            package == "launch"
            and top in {"model", "parallel", "configs"}
            or (package == "parallel" and (name + ".").startswith("model.kernels."))
        )
    return not (importer.startswith("model/kernels/") and top == "model") or name.startswith("model.kernels")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    importer = path.relative_to(ROOT).as_posix()
    assert not (wrong := {name for name in imports(path) if not allowed(importer, name)}), wrong
    if not importer.startswith("launch/"):
        used = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not used & {"os.environ", "os.getenv", "os.putenv"}, "only launch/ reads the environment"
        assert not imports(path) & {"os.environ", "os.getenv", "os.putenv"}


def test_names_in_launch_shadow_nothing() -> None:
    # The deepspeed launcher puts launch/ first on sys.path: a launch/logging.py would hide the real one, and so would a
    # folder of that name. What lies deeper hides nothing.
    mine = {path.stem for path in (ROOT / "launch").iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__"}
    assert "sections" in mine
    assert not mine & (set(sys.stdlib_module_names) | set(packages_distributions()) - OURS)


def test_nobody_waits_for_a_compiler_that_is_not_used() -> None:
    """torch imports its compiler wherever `torch.compile` is called, and takes as long for that as for all else."""
    read = "import sys, launch.submit, launch.train; print('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", read], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert told.split() == ["True", "False"]


def test_the_table_of_files_is_whole() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text()
    files = {path.relative_to(ROOT) for path in FILES if path.name != "__init__.py"}
    missing = {str(path) for path in files if f"`{path}`" not in table and f"`{path.parent}/`" not in table}
    assert not missing, f"docs/architecture.md says nothing of {missing}"
    crammed = [row for row in table.splitlines() if row.startswith("| `") and row.split("|")[1].count("`") > 6]
    assert not crammed, f"at most three files to a row, so that a name leads to its idea: {crammed}"


def test_the_walk_sees_what_it_forbids() -> None:
    assert not allowed("model/gpt.py", "parallel.mesh") and not allowed("model/gpt.py", "launch.config")
    assert not allowed("parallel/ring.py", "model.gpt.GPT") and allowed(
        "parallel/ring.py", "model.kernels.AttentionMask"
    )
    assert not allowed("launch/trainer.py", "deepspeed") and allowed("parallel/zero.py", "deepspeed.zero")
    assert not allowed("model/attention.py", "flash_attn_interface") and len(FILES) > 10
