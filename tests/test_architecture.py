"""The house's rules, held by reading the code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "tunesmith"
FILES = sorted(SOURCE.rglob("*.py"))
LEAVES = {"errors", "settings", "types", "json_text", "_version"}
MIDDLE = {"methods", "objectives", "engine", "rollout", "data", "measure", "report"}
MAY_IMPORT = {
    "ops": set(),
    "models": {"ops"},
    "rewards": set(),
    **{room: {room, "models", "ops"} for room in MIDDLE},
    "yaml_text": set(),
    "spec": MIDDLE | {"models", "rewards", "yaml_text"},
    "jobs": MIDDLE | {"models", "ops", "rewards", "spec", "yaml_text"},
}
# What a room of the middle may use of its neighbours besides: numbers that are computed and rows
# that are shown, never what is trained or what is optimised.
NEIGHBOURS = {"report": {"measure"}, "measure": {"rollout"}, "objectives": {"rewards"}}
LAZY = (
    "vllm",
    "peft",
    "trl",
    "bitsandbytes",
    "gguf",
    "sacrebleu",
    "rouge_score",
    "matplotlib",
    "datasets",
)


def imports(path: Path) -> set[str]:
    """The tunesmith rooms that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.startswith("tunesmith.")
        ):
            found.add(str(node.module).split(".")[1])
        if isinstance(node, ast.Import):
            found |= {n.name.split(".")[1] for n in node.names if n.name.startswith("tunesmith.")}
    return found


def body_start(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The first line after the docstring: a long list of arguments is no long function."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return (first.end_lineno or 0) + 1 if documented else function.lineno


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_downward_only(path: Path) -> None:
    if room(path) in {"__init__", "__main__", "cli"}:
        return
    allowed = MAY_IMPORT.get(room(path), set()) | NEIGHBOURS.get(room(path), set()) | LEAVES
    assert imports(path) <= allowed | {room(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_function_is_long(path: Path) -> None:
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {f.name: f.end_lineno - body_start(f) + 1 for f in functions if f.end_lineno}
    assert {name: lines for name, lines in long.items() if lines > 60} == {}


def test_every_method_and_objective_file_is_in_its_union() -> None:
    from tunesmith.methods import MethodUnion
    from tunesmith.objectives import ObjectiveUnion

    for folder, union in (("methods", MethodUnion), ("objectives", ObjectiveUnion)):
        text = (SOURCE / folder / "__init__.py").read_text()
        for path in (SOURCE / folder).glob("*.py"):
            tree = ast.parse(path.read_text())
            for node in tree.body:
                bases = [ast.unparse(base) for base in getattr(node, "bases", [])]
                if {"Method", "Objective"} & set(bases) and node.name not in {
                    "Method",
                    "Objective",
                }:
                    assert node.name in text, (node.name, union)


def test_importing_tunesmith_and_its_help_stay_light() -> None:
    code = (
        "import sys, tunesmith, tunesmith.cli\n"
        "try: tunesmith.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_nothing_runs_code_out_of_a_file() -> None:
    for path in FILES:
        text = path.read_text()
        # AdapterHub's format is a pickle, of which PyTorch reads the tensors and refuses the rest.
        tensors_only = path.name == "adapterhub_files.py" and text.count("weights_only=True") == 1
        assert text.count("torch.load(") == int(tensors_only), path
        assert "import pickle" not in text, path
