"""The house keeps its shape: no file or function grows beyond what one reads at a time, and its map is complete."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for top in ("uniad_fast", "kernels", "tests", "bench", "docs") for p in (ROOT / top).rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 300, 60, 8
# What others' contracts set: nn.MultiheadAttention, its functional form, and the public UniAD with what copies it.
OUTSIDE_CONTRACTS = {
    ("models/attention.py", "__init__"), ("models/attention.py", "forward"), ("models/uniad.py", "__init__"),
    ("interop/replace.py", "forward"), ("ops/neighbor_masked_attention.py", "neighbor_masked_attention"),
    ("testing.py", "__init__"),
}  # fmt: skip
# A launcher's arguments and the implementation's name.
OPERATORS = {("ops/neighbor_masked_attention.py", "attention_backward"), ("ops/jitter_project.py", "jitter_backward")}
COMMANDS = "cli/"  # whose parameters are the options of the command line


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", [p for p in FILES if "kernels" not in p.parts], ids=name_of)
def test_files_and_functions_are_short(path):
    assert path.read_text().count("\n") <= LONGEST_FILE
    for function in functions(path):
        assert function.end_lineno - function.lineno < LONGEST_FUNCTION, function.name


@pytest.mark.parametrize("path", sorted((ROOT / "uniad_fast").rglob("*.py")), ids=name_of)
def test_public_functions_take_few_parameters(path):
    name = path.relative_to(ROOT / "uniad_fast").as_posix()
    for function in functions(path):
        known = (name, function.name) in OUTSIDE_CONTRACTS | OPERATORS or name.startswith(COMMANDS)
        if function.name.startswith("_") and function.name != "__init__" or known:
            continue
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        own = [a.arg for a in arguments if a.arg not in ("self", "cls", "ctx")]
        assert len(own) <= MOST_PARAMETERS, f"{function.name}({', '.join(own)})"


def test_the_map_is_the_tree():
    """CONTRIBUTING names every file of the package and of the kernels."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = "\n".join(re.findall(r"```\n(.*?)```", text, re.S))
    for top in ("uniad_fast", "kernels"):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h") and path.name != "__init__.py":
                assert re.search(rf"\b{re.escape(path.name)}\b", tree), (
                    f"say in CONTRIBUTING.md what {name_of(path)} is"
                )
    # Not below hidden folders: an environment has tens of thousands of files.
    names = {p.name for top in ROOT.iterdir() if not top.name.startswith(".") for p in (top, *top.rglob("*.*"))}
    for name in re.findall(r"\b(\w+\.(?:py|cpp|h))\b", text.replace("STEM.", "dropout.")):
        assert name in names, f"CONTRIBUTING.md names {name}, which is not there"


def test_tests_are_found_by_the_files_name():
    """A test file is called after a file of the tree, or is one of those that go through many of them."""
    across = {
        "choices", "cpu", "house", "imports", "not_finite", "hostile", "op_memory", "op_tracing", "op_differentiation",
        "operators", "extreme_scores", "classes", "readme", "study_data", "triton", "bench", "cli", "fuzz", "torture",
        "arm",
    }  # fmt: skip
    stems = {path.stem for path in FILES if "tests" not in path.parts}
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert path.stem.removeprefix("test_") in stems | across, path.name
