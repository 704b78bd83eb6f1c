"""Who may import whom, and how little `import uniad_fast` brings along."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "uniad_fast"
KERNELS = ROOT / "kernels"
# A file may import from its own layer's earlier files and from lower layers, never from a higher one.
LAYERS = [
    {
        "data/__init__",
        "models/__init__",
        "training/__init__",
        "detect/__init__",
        "interop/__init__",
        "cli/__init__",
        "ops/__init__",
        "errors",
        "printable",
        "ops/noise",
        "ops/geometry",
        "progress",
        "signals",
    },
    {"files", "data/images", "detect/metrics", "models/precision"},
    {"training/recipes", "models/initializers", "ops/registered", "models/parameter_cache"},
    {"training/optimization"},
    {
        "ops/dispatch",
        "ops/reference",
        "ops/torch_impl",
        "ops/autograd",
        "interop/identify_mask",
        "interop/lazy_attention_weights",
        "interop/generated_masks",
    },
    {"state_dicts", "models/efficientnet", "data/samples", "detect/heatmap", "detect/bundle", "data/image_batches"},
    {"ops/functional", "ops/linear", "data/folder_layouts", "data/metadata"},
    {"data/datasets"},
    {"models/submodules", "models/position"},
    {"models/reconstructor", "models/attention", "models/backbone", "testing"},
    {"models/transformer", "data/feature_cache"},
    {"models/uniad", "interop/replace"},
    {"studies/baselines", "models/architecture", "detect/scoring", "training/loop", "cli/doctor"},
    {"detect/calibration", "detect/public_config"},
    {"detect/detector", "__init__"},
    {"interop/checkpoints", "detect/evaluation"},
    {"detect/results"},
    {"detect/score_files", "cli/demo", "cli/options"},
    {"cli/convert"},
    {"studies/__init__", "studies/extra", "studies/systems", "studies/data"},
    {"studies/textures", "studies/digits", "studies/trial"},
    {"studies/study", "studies/tables"},
    {"studies/figures"},
    {"cli/study"},
    {"cli/main"},
]


def module_name(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports(path: Path) -> set[str]:
    """What a file imports anywhere in it: top-level names of absolute imports, './wing/name' for those of the package.

    `from .wing import name` is the module `wing/name` where there is one, else `wing`. Of a kernel: './kernels/name'.
    """
    top = next((root for root in (PACKAGE, KERNELS) if root in path.parents), None)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level and top:
            folder = path.parents[node.level - 1] / (node.module or "").replace(".", "/")
            names = [alias.name for alias in node.names if (folder / alias.name).with_suffix(".py").exists()]
            targets = [folder / name for name in names] or [folder]
            prefix = "./kernels/" if top == KERNELS else "./"
            found |= {prefix + target.relative_to(top).as_posix() for target in targets}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def installed_package() -> Path:
    """Where `import uniad_fast` finds it from another folder: this tree, or what a wheel has put elsewhere."""
    return Path(run("import uniad_fast; print(uniad_fast.__path__[0])").strip())


def test_the_arrows_of_the_package_point_down():
    layer_of = {name: level for level, names in enumerate(LAYERS) for name in names}
    paths = list(PACKAGE.rglob("*.py"))
    assert set(layer_of) == {module_name(path) for path in paths}, "say in LAYERS where a new file belongs"
    seen = 0
    for path in paths:
        for target in imports(path):
            if target.startswith("./") and not target.startswith("./kernels"):
                seen += 1
                name = target[2:] if target != "./." else "__init__"
                assert layer_of[name] <= layer_of[module_name(path)], f"{module_name(path)} imports {target}"
    assert seen > 100


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_torch_and_triton_only(path):
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    assert {name for name in imports(path) if not name.startswith(".")} <= allowed


def test_nothing_imports_the_kernels_under_their_second_name():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
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
        "import time; import torch, torch.nn; start = time.process_time(); import uniad_fast; "
        "print(time.process_time() - start)"
    )
    assert min(float(run(code)) for _ in range(3)) < 0.1


def test_it_works_without_triton():
    code = "import sys; sys.modules['triton'] = None; import uniad_fast, torch; q = torch.randn(1, 2, 20, 8); "
    assert run(code + "print(uniad_fast.neighbor_masked_attention(q, q, q, (4, 5), (3, 3)).shape)").strip()


def test_the_installed_package_has_every_file():
    """From another folder, so that a wheel is seen if one is installed: a forgotten wing would be missing there."""
    installed = installed_package()
    kernels = Path(run("import uniad_fast.kernels as k; print(k.__path__[0])").strip())
    for source, target in ((PACKAGE, installed), (KERNELS, kernels)):
        files = [path for suffix in ("*.py", "*.cpp", "*.h") for path in source.rglob(suffix)]
        assert files
        assert [f for f in files if not (target / f.relative_to(source)).is_file()] == []


def test_every_module_can_be_imported():
    names = [path.relative_to(PACKAGE.parent).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")]
    modules = [name.replace("/", ".").removesuffix(".__init__") for name in sorted(names)]
    assert len(modules) > 40
    run(f"import importlib; [importlib.import_module(name) for name in {modules}]")


def test_the_public_names_work():
    """The README's use of the ops, on small tensors."""
    code = """
import torch, uniad_fast as u
assert all(hasattr(u, name) for name in u.__all__)
q = torch.randn(1, 2, 20, 8, requires_grad=True)
u.neighbor_masked_attention(q, q, q, (4, 5), (3, 3), dropout_p=0.1).sum().backward()
model = u.UniAD(
    inplanes=[8], instrides=[4], feature_size=(4, 5), feature_jitter=None, save_recon=None, hidden_dim=8, nhead=2,
    neighbor_mask={"neighbor_size": (3, 3), "mask": [True] * 3}, pos_embed_type="learned", dim_feedforward=8,
    initializer={"method": "xavier_uniform"}, num_encoder_layers=1, num_decoder_layers=1,
)
print(q.grad.isfinite().all().item(), model.eval()({"feature_align": torch.randn(1, 8, 4, 5)})["pred"].shape)
"""
    assert run(code).startswith("True")
