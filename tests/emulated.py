"""The C++ kernels compiled for another processor, AArch64, and called in an emulator of it.

What `kernels/cpu/launch.py` calls is the function of a library; here each call is a process of the emulator, which gets
a copy of all memory that the call's pointers lead to, and whose copy is written back. So everything beneath is the
package's own: operators, autograd, launchers.
"""

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor
from uniad_fast.kernels.cpu import build

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PACKAGES = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user"}
# A processor that has what the path needs and, of what the other paths need, nothing.
PROCESSORS = {"neon": "cortex-a57", "neon_bf16": "max"}
HERE = Path(__file__).parent / "arm"


def problem() -> str | None:
    """What to install for it, or None."""
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    return f"apt-get install {' '.join(missing)}" if missing else None


def compile_kernels(path: str, folder: Path) -> Path:
    """The driver with the kernels of a named path in it, unless the folder has it."""
    driver = folder / f"kernels-{path}"
    if driver.exists():
        return driver
    # -O2: what is tested are numbers, and -O3 compiles longer.
    flags = ["-O2", "-std=c++20", "-Wno-psabi", f"-I{HERE}", f"-I{build.SOURCES[0].parent}", *build.PATHS[path]]
    sources = (*build.SOURCES, HERE / "driver.cpp")
    objects = [str(folder / f"{path}-{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda s, o: _run([COMPILER, *flags, "-c", str(s), "-o", o]), sources, objects))
    _run([COMPILER, "-static", *objects, "-o", str(driver)])
    return driver


class Library:
    """What `build.load` gives, with the functions of a driver. folder: where calls are written down.

    Whose memory a pointer leads to is known from `watched(torch.Tensor.data_ptr)`, which has to take that one's place.
    """

    def __init__(self, driver: Path, processor: str, folder: Path) -> None:
        self.command = [EMULATOR, "-cpu", processor, str(driver)]
        self.files = folder / "arguments", folder / "results"
        self.tensors: dict[int, Tensor] = {}  # by address, of the call that is being prepared

    def watched(self, data_ptr: Callable[[Tensor], int]) -> Callable[[Tensor], int]:
        def watching(tensor: Tensor) -> int:
            address = data_ptr(tensor)
            known = self.tensors.get(address)
            if known is None or _extent(known) < _extent(tensor):
                self.tensors[address] = tensor.detach()
            return address

        return watching

    def __getattr__(self, name: str) -> Callable[..., int]:
        return partial(self._call, name)

    def _call(self, name: str, *arguments: object) -> int:
        blocks = {address: _memory(address, _extent(tensor)) for address, tensor in self.tensors.items() if address}
        numbers = {address: number for number, address in enumerate(blocks)}
        contents = [bytes(memory) for memory in blocks.values()]
        pointers, words = [], []
        for argument in arguments:
            if isinstance(argument, ctypes.Array) or hasattr(argument, "_obj"):  # an array, or byref() of a structure
                content = bytes(getattr(argument, "_obj", argument))
                for i, word in enumerate(struct.unpack(f"<{len(content) // 8}Q", content[: len(content) // 8 * 8])):
                    if word in numbers:
                        pointers.append((len(contents), 8 * i, numbers[word]))
                words.append((1, len(contents)))
                contents.append(content)
            else:
                value = int(getattr(argument, "value", argument) or 0)
                words.append((1, numbers[value]) if value in numbers else (0, value))
        result, changed = self._emulate(name, contents, pointers, words)
        for memory, content in zip(blocks.values(), changed, strict=False):
            memory[:] = np.frombuffer(content, np.uint8)
        self.tensors.clear()
        return result

    def _emulate(
        self, name: str, contents: list[bytes], pointers: list[tuple[int, ...]], words: list[tuple[int, ...]]
    ) -> tuple[int, list[bytes]]:
        def pack(*values: int) -> bytes:
            return struct.pack(f"<{len(values)}Q", *(value % 2**64 for value in values))

        into, out_of = self.files
        into.write_bytes(
            pack(len(name)) + name.encode() + pack(len(contents), len(pointers), len(words))
            + b"".join(pack(len(content)) + content for content in contents)
            + b"".join(pack(*numbers) for numbers in (*pointers, *words))
        )  # fmt: skip
        _run([*self.command, str(into), str(out_of)])
        given, place, changed = out_of.read_bytes(), 8, []
        for content in contents:
            changed.append(given[place : place + len(content)])
            place += len(content)
        return struct.unpack_from("<i", given)[0], changed


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _memory(address: int, count: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * count).from_address(address), np.uint8)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}"
