"""Who may import whom, and how little `import uniad_fast` brings along."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "uniad_fast"
KERNELS = ROOT / "kernels"
# Which wings a wing's files may import from, besides itself. The package's own __init__ brings the public names.
MAY_IMPORT = {
    "": set(),
    "ops": {""},
    "models": {"", "ops"},
    "data": {"", "models"},
    "training": {"", "ops", "models"},
    "detect": {"", "models", "data", "training"},
    "interop": {"", "ops", "models", "data", "training", "detect"},
    "deploy": {"", "models", "data", "detect"},
    "studies": {"", "models", "data", "training", "detect"},
    "cli": {"", "ops", "models", "data", "training", "detect", "interop", "deploy", "studies"},
}

# A method that leads from a detector to what is built on detectors imports that when it is called.
ON_CALL = {("detect/scoring", "deploy/export")}

# Which modules need a package that only an extra brings, and which package.
OF_AN_EXTRA = {
    "deploy.service": "fastapi",
    "deploy.service_app": "fastapi",
    "deploy.service_metrics": "prometheus_client",
    "deploy.service_schema": "pydantic",
    "deploy.watch": "watchdog",
}


def wing_of(name: str) -> str:
    """Of a module "wing/name", or "" for one at the top."""
    return name.rpartition("/")[0]


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


def inner_imports() -> dict[str, set[str]]:
    """{module: those of the package that it imports}, the package's own __init__ and __main__ left out."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        if path.parent != PACKAGE or path.name not in ("__init__.py", "__main__.py"):
            name = module_name(path)
            found[name] = {t[2:] for t in imports(path) if t.startswith("./") and (name, t[2:]) not in ON_CALL}
    return found


def test_every_file_may_import_what_it_imports():
    seen = 0
    for name, targets in inner_imports().items():
        allowed = MAY_IMPORT[wing_of(name)] | {wing_of(name)}
        for target in targets:
            if target.startswith("kernels"):
                assert wing_of(name) == "ops", f"{name} imports the kernels: go through ops.dispatch"
            elif target != ".":  # the version
                seen += 1
                assert wing_of(target) in allowed, f"{name} imports {target}"
    assert seen > 150


def test_no_two_files_import_each_other():
    rest = {
        name: {t for t in targets if not t.startswith("kernels") and t != "."}
        for name, targets in inner_imports().items()
    }
    while rest:
        free = {name for name, targets in rest.items() if not targets & rest.keys()}
        assert free, f"a circle among {sorted(rest)}"
        rest = {name: targets for name, targets in rest.items() if name not in free}


def test_a_wing_is_a_docstring_and_nothing_else():
    for wing in MAY_IMPORT.keys() - {""}:
        body = ast.parse((PACKAGE / wing / "__init__.py").read_text()).body
        assert len(body) == 1 and isinstance(body[0].value, ast.Constant), wing


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_torch_and_triton_only(path):
    allowed = set(sys.stdlib_module_names) | {"torch", "triton"}
    assert {name for name in imports(path) if not name.startswith(".")} <= allowed


def test_nothing_imports_the_kernels_under_their_second_name():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        assert "kernels" not in imports(path), f"{path} must import uniad_fast.kernels"


def test_bench_does_not_import_tests():
    tests = {path.stem for path in (ROOT / "tests").glob("*.py")} - {"conftest"}
    for path in (ROOT / "bench").rglob("*.py"):
        assert not imports(path) & (tests | {"tests"}), path


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout


def test_import_is_light():
    heavy = ("triton", "timm", "PIL", "scipy", "typer", "safetensors")
    assert run(f"import uniad_fast, sys; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_import_takes_little_more_than_torch():
    """A share of torch's own import, since machines and releases of Python differ: operators are registered in it."""
    code = (
        "import time; start = time.process_time(); import torch, torch.nn; between = time.process_time(); "
        "import uniad_fast; print((time.process_time() - between) / (between - start))"
    )
    assert min(float(run(code)) for _ in range(3)) < 0.15


def test_kernels_are_imported_by_the_first_call():
    """They are where an installation puts them, which in a tree that is merely on the path is nowhere."""
    loaded = run("import sys, uniad_fast, uniad_fast.models.layers; print(*sys.modules)").split()
    assert "uniad_fast.models.layers" in loaded and not [m for m in loaded if m.startswith("uniad_fast.kernels")]


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
    """But for those that are of an extra alone, where it is not installed: only their own command imports them."""
    names = [path.relative_to(PACKAGE.parent).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")]
    modules = [name.replace("/", ".").removesuffix(".__init__") for name in sorted(names)]
    assert len(modules) > 40 and {f"uniad_fast.{name}" for name in OF_AN_EXTRA} <= set(modules)
    absent = {f"uniad_fast.{name}" for name, package in OF_AN_EXTRA.items() if find_spec(package) is None}
    run(f"import importlib; [importlib.import_module(name) for name in {[m for m in modules if m not in absent]}]")


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
