"""How the C++ kernels are compiled, for which products, by many processes at once; what is said where they can't be."""

import ctypes
import json
import os
import statistics
import subprocess
import sys

import pytest
from uniad_fast.kernels.cpu import build

ATTEND = (
    "import torch; from uniad_fast import neighbor_masked_attention as f; q = torch.ones(1, 1, 20, 8); "
    "g = lambda **k: f(q, q, q, (4, 5), (3, 3), **k); "
)


def python(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def first_time(tmp_path, monkeypatch):
    """Nothing is compiled yet, and nothing known."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    build._load.cache_clear()
    yield
    build._load.cache_clear()


@pytest.mark.parametrize("gain", [0.5, 2.0])
@pytest.mark.parametrize("features", ["avx512_bf16", "asimd bf16", "avx512f avx2"])
def test_pairs_of_bfloat16_are_multiplied_where_this_was_found_to_pay(gain, features, first_time, monkeypatch):
    """Intel's processors have the instruction, and are twice as fast without."""
    compiled = []

    class Measuring:
        uniad_pairs_gain = staticmethod(lambda: gain)

    monkeypatch.setattr(build, "_processor", lambda: features)
    monkeypatch.setattr(build, "_library", lambda kind, _, flags, *__: compiled.append((kind, flags)) or Measuring)
    for _ in range(2):
        build.load()
        build.load("avx2")  # what is named is what is meant
        build._load.cache_clear()
    has_them = "bf16" in features
    assert [kind for kind, _ in compiled] == [*["pairs"] * has_them, "native", "avx2", "native", "avx2"]
    for kind, flags in compiled:
        assert ("-DUNIAD_SINGLES" in flags) == (kind == "native" and has_them and gain < 1)


@pytest.mark.skipif("avx512_bf16" not in build.paths(), reason="this processor has no pairs of bfloat16")
def test_pairs_of_bfloat16_are_measured(tmp_path, monkeypatch):
    """Again and again alike, which is why it may be asked but once."""
    kernels = build.load()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    pays = build._pairs_pay(build._compiler())
    (found,) = [json.loads(file.read_text()) for file in (build._folder()).glob("pairs-*.json")]
    (library,) = build._folder().glob("pairs-*.so")
    gain = ctypes.CDLL(str(library)).uniad_pairs_gain
    gain.restype = ctypes.c_double
    again = statistics.median(gain() for _ in range(5))
    assert found["gain"] > 0 and found["gain"] == pytest.approx(again, rel=0.3)
    assert pays == (found["gain"] > 1) and bool(kernels.uniad_has_pairs()) == (pays or bool(kernels.uniad_has_tiles()))


def test_two_processes_may_build_at_once(tmp_path):
    environment = dict(TORCH_EXTENSIONS_DIR=str(tmp_path), CXX=str(stand_in_compiler(tmp_path)))
    code = "from uniad_fast.kernels.cpu import build; build.load(); print('loaded')"
    processes = [python(code, **environment) for _ in range(2)]
    outs = [process.communicate() for process in processes]
    assert [out for out, _ in outs] == ["loaded\n"] * 2, outs
    assert any("compiling its CPU kernels" in error for _, error in outs)
    assert len(list((tmp_path / "uniad_fast").glob("native-*.so"))) == 1
    assert not list((tmp_path / "uniad_fast").glob("building-*"))


@pytest.mark.parametrize("damage", ["truncated", "junk", "empty"])
def test_a_damaged_library_is_built_anew(tmp_path, damage):
    """Loading a truncated one is a bus error, in every run."""
    folder = tmp_path / "uniad_fast"
    environment = dict(TORCH_EXTENSIONS_DIR=str(tmp_path), CXX=str(stand_in_compiler(tmp_path)))
    code = "from uniad_fast.kernels.cpu import build; build.load(); print('loaded')"
    assert python(code, **environment).communicate()[0] == "loaded\n"
    (library,) = folder.glob("native-*.so")
    content = library.read_bytes()
    library.write_bytes({"truncated": content[: len(content) // 2], "junk": b"junk" * 999, "empty": b""}[damage])
    (folder / "building-999999999-abc").mkdir()
    out, error = python(code, **environment).communicate()
    assert out == "loaded\n" and "compiling its CPU kernels" in error, error
    assert [path.read_bytes() for path in folder.glob("native-*")] == [content]
    assert not (folder / "building-999999999-abc").exists()
    assert "compiling" not in python(code, **environment).communicate()[1]


def stand_in_compiler(folder):
    """Compiles nothing but an empty library, in no time."""
    compiler = folder / "c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version -o "$1" = -v ] && { echo \'g++ 12\'; exit; }\n'
        'for a in "$@"; do case "$last" in -o) out="$a";; -MF) touch "$a";; esac; last="$a"; done\n'
        'source="double uniad_pairs_gain(void) { return 0.5; }"\n'
        'case "$out" in *.so) echo "$source" | exec gcc -shared -x c - -o "$out";; *) touch "$out";; esac\n'
    )
    compiler.chmod(0o755)
    return compiler


def test_what_calls_another_openmp_is_said(tmp_path):
    """As a library by Clang does beside pip's torch."""
    compiler = stand_in_compiler(tmp_path)
    compiler.write_text(compiler.read_text().replace('source="', 'source="void __kmpc_x(); void f() { __kmpc_x(); } '))
    code = "from uniad_fast.kernels.cpu import build; print(build.problem())"
    environment = dict(TORCH_EXTENSIONS_DIR=str(tmp_path), CXX=str(compiler), LD_BIND_NOW="1")
    out, _ = python(code, **environment).communicate()
    assert "__kmpc_x" in out and "g++ 12 calls another OpenMP than torch's): install a C++ compiler (g++ 11" in out


@pytest.mark.parametrize("says", ["", "\\377\\376", "g++ 12"])
def test_what_a_compiler_says_of_itself(says, tmp_path, monkeypatch):
    compiler = tmp_path / "my c++"
    compiler.write_text(f"#!/bin/sh\nprintf '{says}'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{compiler}' -pipe")  # with an argument, as "ccache g++" has one
    assert build._compiler()


def test_without_a_home_it_says_what_to_set(monkeypatch):
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(build.BuildError, match="TORCH_EXTENSIONS_DIR"):
        build._folder()


def test_without_a_compiler_it_says_so_once_and_goes_on(tmp_path):
    environment = dict(TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="/nonexistent/c++")
    out, error = python(ATTEND + "g(); g(); print(g().shape)", **environment).communicate()
    assert out == "torch.Size([1, 1, 20, 8])\n" and error.count("uniad_fast uses impl='torch'") == 1, error
    out, error = python(ATTEND + "g(impl='cpu')", **environment).communicate()
    assert "ValueError: impl='cpu' can't serve this call: no C++ compiler here" in error and "apt-get install" in error


def test_a_compiler_that_fails_leaves_nothing(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && { echo 'g++ 12'; exit; }\necho broken >&2; exit 1\n")
    compiler.chmod(0o755)
    environment = dict(TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"), CXX=str(compiler))
    _, error = python(ATTEND + "g(impl='cpu')", **environment).communicate()
    assert "the C++ kernels do not compile" in error and "To have them, install" in error, error
    assert not list((tmp_path / "cache/uniad_fast").iterdir())
