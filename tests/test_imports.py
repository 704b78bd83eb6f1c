"""Who may import whom, and how little `import uniad_fast` brings along."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "uniad_fast"
# A file may import from its own layer's earlier files and from lower layers, never from a higher one.
LAYERS = [
    {"errors", "printable", "noise", "neighborhood", "progress", "signals"},
    {"files", "images", "metrics", "precision"},
    {"recipes", "initialize", "registered", "kept"},
    {"optimization"},
    {"impls", "reference", "stock", "autograd", "masks", "lazy_weights", "mask_cache"},
    {"state_dicts", "efficientnet", "data", "heatmap", "bundle", "image_batches"},
    {"functional", "linear", "folder_layouts", "metadata"},
    {"datasets"},
    {"submodules", "position"},
    {"reconstruction", "attention", "backbone", "testing"},
    {"transformer", "features"},
    {"model", "replace"},
    {"baselines", "architecture", "scoring", "training", "doctor"},
    {"calibration", "public_config"},
    {"detector", "__init__"},
    {"weights", "evaluation"},
    {"report"},
    {"scan", "demo", "cli_options"},
    {"cli_convert"},
    {"studies/__init__", "studies/extra", "studies/systems", "studies/data"},
    {"studies/textures", "studies/digits", "studies/trial"},
    {"studies/study", "studies/tables"},
    {"studies/figures"},
    {"studies/cli"},
    {"cli"},
]


def module_name(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports(path: Path) -> set[str]:
    """Top-level names of absolute imports, and '.name' for relative ones ('.studies/name'), anywhere in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parent if node.level == 1 else path.parent.parent
            within = "" if folder in (PACKAGE, ROOT / "kernels") else f"{folder.name}/"
            names = [node.module.replace(".", "/")] if node.module else [a.name for a in node.names]
            found |= {f".{within}{name}" for name in names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_the_arrows_of_the_package_point_down():
    layer_of = {name: level for level, names in enumerate(LAYERS) for name in names}
    paths = list(PACKAGE.rglob("*.py"))
    assert set(layer_of) == {module_name(path) for path in paths}, "say in LAYERS where a new file belongs"
    seen = 0
    for path in paths:
        for target in imports(path):
            if target.startswith(".") and target[1:] in layer_of:
                seen += 1
                assert layer_of[target[1:]] <= layer_of[module_name(path)], f"{module_name(path)} imports {target}"
    assert seen > 100


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_torch_and_triton_only(path):
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    assert {name for name in imports(path) if not name.startswith(".")} <= allowed


def test_nothing_imports_the_kernels_under_their_second_name():
    for path in [*PACKAGE.glob("*.py"), *(ROOT / "tests").glob("*.py"), *(ROOT / "bench").glob("*.py")]:
        assert "kernels" not in imports(path), f"{path} must import uniad_fast.kernels"


def test_bench_does_not_import_tests():
    tests = {path.stem for path in (ROOT / "tests").glob("*.py")} - {"conftest"}
    for path in (ROOT / "bench").glob("*.py"):
        assert not imports(path) & (tests | {"tests"}), path


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout


def test_import_is_light():
    heavy = ("triton", "timm", "PIL", "scipy", "typer", "safetensors")
    assert run(f"import uniad_fast, sys; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_import_takes_little_more_than_torch():
    code = (
        "import time; import torch, torch.nn; start = time.perf_counter(); import uniad_fast; "
        "print(time.perf_counter() - start)"
    )
    assert min(float(run(code)) for _ in range(3)) < 0.1


def test_it_works_without_triton():
    code = "import sys; sys.modules['triton'] = None; import uniad_fast, torch; q = torch.randn(1, 2, 20, 8); "
    assert run(code + "print(uniad_fast.neighbor_masked_attention(q, q, q, (4, 5), (3, 3)).shape)").strip()


def test_the_installed_package_has_everything():
    names = run("import uniad_fast as u, uniad_fast.kernels; print(all(hasattr(u, n) for n in u.__all__))")
    assert names.strip() == "True"
