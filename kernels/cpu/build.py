"""Compiles the C++ kernels for the machine's own processor, once, and loads them.

A library is named after everything that made it (sources, flags, compiler, torch, processor) and lives in torch's
folder for extensions. It is built in a folder of its own and moved into place whole: processes that start together
build twice at worst, and one that is killed leaves nothing that another waits for. Its name ends in its
own hash: one that was cut off or overwritten would kill the process that loads it, and is built anew instead.
"""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

_PAIR_RATE = Path(__file__).parent / "pair_rate.cpp"  # a library of its own
SOURCES = sorted(set(Path(__file__).parent.glob("*.cpp")) - {_PAIR_RATE})
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-Wno-unknown-pragmas"]
_AVX512 = ["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c"]
# What the sources choose between, by what the compiler may use. None is what this processor has.
PATHS: dict[str | None, list[str]] = {
    None: ["-march=native"],
    "amx": [f"-m{name}" for name in (*_AVX512, "avx512bf16", "amx-tile", "amx-bf16")],
    "avx512_bf16": [f"-m{name}" for name in (*_AVX512, "avx512bf16")],
    "avx512": [f"-m{name}" for name in _AVX512],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "neon_bf16": ["-march=armv8.2-a+bf16"],
    "neon": ["-march=armv8-a"],
    "portable": [],
}
_SINGLES = "-DUNIAD_SINGLES"  # what tells the sources that products of pairs of bfloat16 do not pay
# What /proc/cpuinfo calls what a path needs. "portable" is what no other path is for: every ARM of 64 bits has NEON.
_NEEDED = {
    "amx": {*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16"},
    "avx512_bf16": {*_AVX512, "avx512_bf16"},
    "avx512": {*_AVX512},
    "avx2": {"avx2", "fma", "f16c"},
    "neon_bf16": {"asimd", "bf16"},
    "neon": {"asimd"},
}
# Whatever reads or writes beside a tensor, or does what C++ leaves undefined, ends the process: for the tests.
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-O1", "-g")
_HOW_TO = "install a C++ compiler (g++ 11 or later; on Debian: apt-get install g++)"
_TORCH = Path(torch.__file__).parent
_OF_TORCH = [
    "-fPIC",
    f"-I{_TORCH / 'include'}",
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
]
_lock = threading.Lock()


class BuildError(RuntimeError):
    """The C++ kernels can't be compiled here. Says why, and what to do."""


def load(path: str | None = None, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of the kernels, compiled if this is the first time, for this processor or a named one of `PATHS`.

    flags: more of the compiler's.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    with _lock:
        return _load(path, flags)


@cache
def problem() -> str | None:
    """Why the kernels can't be had here, or None, which may take a compilation to find out."""
    try:
        load()
    except BuildError as error:
        return str(error)
    return None


def paths() -> list[str]:
    """The named paths that this processor can run."""
    found = [name for name, needed in _NEEDED.items() if needed <= _processor_flags()]
    return found if _is_arm() else [*found, "portable"]


def remembered(name: str, find: Callable[[], dict[str, float]]) -> dict[str, float] | None:
    """What `find` found on this machine, with this torch and these kernels, when it was first asked.

    Processes that ask together all get what one of them found. None where nothing can be kept.
    """
    return _remembered(f"{name}-{_made_of(SOURCES, [torch.__version__, _processor()])}", find)


def _remembered(name: str, find: Callable[[], dict[str, float]]) -> dict[str, float] | None:
    try:
        path = _folder() / f"{name}.json"
    except BuildError:
        return None
    try:
        if (found := _numbers(path)) is not None:
            return found
        if path.exists() and _numbers(path) is None:
            path.unlink(missing_ok=True)  # it is damaged
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"building-{os.getpid()}-", dir=path.parent) as folder:
            made = Path(folder, path.name)
            made.write_text(json.dumps(find()))
            try:
                os.link(made, path)
            except FileExistsError:  # another process was sooner
                pass
            except OSError:  # a file system without links: the last one to write is right
                os.replace(made, path)
        return _numbers(path)
    except OSError:
        return None


def _numbers(path: Path) -> dict[str, float] | None:
    """{name: number} in a file; None where there is no such file, or something else in it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not found:
        return None
    return found if all(isinstance(n, int | float) and math.isfinite(n) for n in found.values()) else None


@cache
def _load(path: str | None, flags: tuple[str, ...]) -> ctypes.CDLL:
    compiler = _compiler()
    singles = [_SINGLES] if path is None and not _pairs_pay(compiler) else []
    all_flags = [*_FLAGS, *_flags(path, compiler), *flags, *singles]
    return _library(
        path or "native", SOURCES, all_flags, compiler, f"its CPU kernels, once on this machine, into {_folder()}"
    )


def _pairs_pay(compiler: str) -> bool:
    """Whether this processor multiplies pairs of bfloat16, where it does, faster than floats: see pair_rate.cpp."""
    if not _processor_flags() & {"avx512_bf16", "bf16"}:
        return True

    flags = [*_FLAGS, *_flags(None, compiler)]

    def measured() -> dict[str, float]:
        library = _library("pairs", [_PAIR_RATE], flags, compiler)
        library.uniad_pairs_gain.restype = ctypes.c_double
        return {"gain": library.uniad_pairs_gain()}

    name = f"pairs-{_made_of([_PAIR_RATE], _told(flags, compiler))}"
    return (_remembered(name, measured) or measured()).get("gain", 0.0) > 1


def _library(kind: str, sources: list[Path], flags: list[str], compiler: str, what: str = "") -> ctypes.CDLL:
    """The library of these sources, compiled unless it lies there already. what: to be said if it has to be."""
    name = f"{kind}-{_made_of(sources, _told(flags, compiler))}"
    if (library := _find(_folder(), name)) is None:
        if what:
            print(f"uniad_fast: compiling {what}", file=sys.stderr)
        library = _compile(_folder(), name, sources, flags)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        # Clang calls an OpenMP of its own, and torch brings GCC's.
        hint = f" ({compiler} calls another OpenMP than torch's): {_HOW_TO}" if "__kmpc" in str(error) else ""
        raise BuildError(f"the compiled C++ kernels can't be loaded: {error}{hint}") from error


def _told(flags: list[str], compiler: str) -> list[str]:
    """What a library hangs on besides its sources."""
    return [*flags, compiler, torch.__version__, _processor()]


def _made_of(sources: list[Path], told: list[str]) -> str:
    made_of = hashlib.sha256()
    for file in (*sources, *_HEADERS):
        made_of.update(file.read_bytes())
    for text in told:
        made_of.update(text.encode() + b"\0")
    return made_of.hexdigest()[:20]


def _flags(path: str | None, compiler: str) -> list[str]:
    # On ARM, Clang took no -march=native before its version 16, and GCC's -mcpu=native ignores pairs of unknown cores.
    return ["-mcpu=native"] if path is None and _is_arm() and "clang" in compiler else PATHS[path]


def _is_arm() -> bool:
    return platform.machine() == "aarch64"


def _find(folder: Path, name: str) -> Path | None:
    """The library of that name that is what was compiled; one that is not is removed."""
    for library in folder.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError):
            if library.stem == f"{name}-{_hash(library)}":
                return library
            library.unlink()
    return None


def _hash(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:20]


def _compile(into: Path, name: str, sources: list[Path], flags: list[str]) -> Path:
    try:
        into.mkdir(parents=True, exist_ok=True)
        _sweep(into)
        folder = Path(tempfile.mkdtemp(prefix=f"building-{os.getpid()}-", dir=into))
    except OSError as error:
        raise BuildError(f"can't write into {into}: {error}. Set TORCH_EXTENSIONS_DIR to a folder") from error
    objects = [folder / f"{source.stem}.o" for source in sources]
    built = folder / "kernels.so"
    linked = [flag for flag in flags if flag.startswith("-fsanitize")]
    try:
        with ThreadPoolExecutor(len(sources)) as pool:
            for done in [
                pool.submit(_run, [*flags, *_OF_TORCH, "-c", str(source), "-o", str(made)])
                for source, made in zip(sources, objects, strict=True)
            ]:
                done.result()
        # Threads are torch's own: its library brings the one OpenMP of this process.
        _run(["-shared", *map(str, objects), *linked, f"-L{_TORCH / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(built)])
        library = into / f"{name}-{_hash(built)}.so"
        os.replace(built, library)
        return library
    except OSError as error:
        raise BuildError(f"the C++ kernels do not compile: {error}\nTo have them, {_HOW_TO}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(arguments: list[str]) -> None:
    done = subprocess.run([*_command(), *arguments], capture_output=True)
    if done.returncode:
        said = "\n".join(done.stderr.decode(errors="replace").splitlines()[-20:])
        raise BuildError(
            f"the C++ kernels do not compile (exit code {done.returncode}): {said}\nTo have them, {_HOW_TO}"
        )


def _sweep(folder: Path) -> None:
    """Remove what killed builds have left."""
    for left in folder.glob("building-*"):
        pid = left.name.split("-")[1]
        if pid.isdecimal() and Path("/proc/self").exists() and not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)


def _compiler() -> str:
    """What calls itself the compiler that $CXX names, or c++."""
    try:
        said = subprocess.run([*_command(), "--version"], capture_output=True, check=True).stdout
    except (OSError, ValueError, IndexError, subprocess.CalledProcessError) as error:
        raise BuildError(f"no C++ compiler here ({os.environ.get('CXX', 'c++')}: {error}): {_HOW_TO}") from error
    return (said.decode(errors="replace").splitlines() or [_command()[0]])[0]


def _command() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))  # "ccache g++" is two words


def _folder() -> Path:
    """Where torch puts extensions on Linux, without importing what compiles them."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given) / "uniad_fast"
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # no home, and a user that the system does not know
        raise BuildError(
            f"no home folder to keep the compiled kernels in: set TORCH_EXTENSIONS_DIR ({error})"
        ) from error
    return caches / "torch_extensions" / "uniad_fast"


@cache
def _processor() -> str:
    """Its instruction sets, so that a home folder shared by machines keeps a library for each kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "")


def _processor_flags() -> set[str]:
    return set(_processor().split())


PAYS = "avx2" in paths()
"""Whether the kernels are known to be the fastest way here: on x86 with vectors of four, PyTorch's forward pass is
twice as fast, and on ARM nobody has timed either."""
