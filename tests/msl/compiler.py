"""From kernel text to a shared library: rewrite, Clang to optimised IR, instrument, link. Cached by content.

Clang is needed, not g++: its `address_space` attribute is the one Apple's compiler uses, so a pointer in the wrong
address space fails to compile here as it does there. Any Clang from 18 on will do, `clang++` or the `ziglang` wheel's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import instrument, rewrite

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opentq" / "msl"
OLDEST = 18
FLAGS = [
    "-std=c++17",
    "-O2",
    "-g0",
    "-fPIC",
    "-ffreestanding",
    "-fno-builtin",
    "-nostdinc",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-fno-sanitize=all",
    "-fno-stack-protector",
    "-fno-threadsafe-statics",
    "-ffp-contract=on",
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-fno-strict-aliasing",
    "-Wno-everything",
    "-Werror=uninitialized",
]


class CompileError(RuntimeError):
    """Clang refused the kernel; the text is its diagnosis."""


@functools.cache
def clang() -> tuple[str, ...] | None:
    """The command of a Clang that can build kernels, or None."""
    names = [os.environ["OPENTQ_CLANG"]] if "OPENTQ_CLANG" in os.environ else []
    names += [f"clang++-{v}" for v in range(22, OLDEST - 1, -1)] + ["clang++"]
    for name in names:
        path = shutil.which(name)
        if path and _major((path,)) >= OLDEST:
            return (path,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "c++")
    return None


def _major(command: tuple[str, ...]) -> int:
    text = subprocess.run([*command, "-dumpversion"], capture_output=True, text=True).stdout
    return int(text.split(".")[0]) if text[:1].isdigit() else 0


def _clang(*arguments: str) -> None:
    command = clang()
    if command is None:
        raise RuntimeError(
            f"the Metal emulator needs clang++ {OLDEST} or newer: apt-get install clang-19, or pip install ziglang"
        )
    cpu = "-mcpu=x86_64_v3" if "ziglang" in command else "-march=x86-64-v3"
    done = subprocess.run([*command, cpu, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr.strip()[-6000:] or f"{command} failed with status {done.returncode}")


@functools.cache
def _version() -> str:
    command = clang() or ()
    return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout


def _key(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in (*parts, *FLAGS, _version()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


@functools.cache
def runtime() -> ctypes.CDLL:
    """The run time, built once and loaded so that kernels find its symbols."""
    source = HERE / "runtime.cpp"
    parts = [source.read_text(), *((HERE / name).read_text() for name in ("collectives.h", "memory.h"))]
    target = CACHE / f"runtime-{_key(*parts)}.so"
    if not target.exists():
        with _replacing(target) as out:
            flags = ["-std=c++17", "-O2", "-g0", "-fPIC", "-shared", "-fno-sanitize=all", "-w"]
            _clang(*flags, str(source), "-o", out)
    return ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)


class _replacing:
    """A temporary path that becomes `target` when the block ends well, so that two processes may build at once."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> str:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mktemp(dir=self.target.parent, suffix=self.target.suffix))
        return str(self.temporary)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.temporary.replace(self.target)
        else:
            self.temporary.unlink(missing_ok=True)


class Library:
    """One compiled kernel: `entry`, the block counters and what the compiler left in memory.

    `allocas` lists the arrays that did not become registers: on a GPU they would be spilled to memory, and the usual
    reason is an index that is not known at compile time.
    """

    def __init__(self, path: Path, blocks: list[list[int]], allocas: list[str], slots: tuple[int, ...]) -> None:
        runtime()
        self.handle = ctypes.CDLL(str(path))
        self.entry = ctypes.cast(self.handle.msl_entry, ctypes.c_void_p)
        self.counters = (ctypes.c_uint64 * max(1, len(blocks))).in_dll(self.handle, "msl_blocks")
        self.blocks, self.allocas, self.slots = blocks, allocas, slots


@functools.lru_cache(maxsize=512)
def build(text: str, instance: str, constants: tuple[tuple[str, int], ...] = ()) -> Library:
    """Compile the kernel `instance` (`name` or `name<arguments>`) of MSL `text`."""
    kernels = rewrite.kernels(text)
    name = instance.split("<")[0].strip()
    if name not in kernels:
        raise KeyError(f"no kernel {name} in the text; it has {', '.join(kernels) or 'none'}")
    slots = kernels[name].slots
    body = rewrite.rewrite(text, dict(constants))
    source = (
        f'#include "{HERE / "metal.h"}"\n#line 1 "{name}.metal"\n{body}\n'
        f'extern "C" __attribute__((visibility("default"))) void msl_entry(void** b) {{\n'
        f"  static constexpr int slots[] = {{{', '.join(map(str, slots))}}};\n"
        f"  msl_launch(&{instance}, b, slots);\n}}\n"
    )
    parts = [(HERE / f).read_text() for f in ("metal.h", "instrument.py")]
    stem = CACHE / _key(source, *parts)
    raw, shared = stem.with_suffix(".ll"), stem.with_suffix(".so")
    if not raw.exists():
        with tempfile.TemporaryDirectory() as folder, _replacing(raw) as out:
            path = Path(folder) / "kernel.cpp"
            path.write_text(source)
            _clang(*FLAGS, "-S", "-emit-llvm", "-x", "c++", str(path), "-o", out)
    module = instrument.instrument(raw.read_text())
    if not shared.exists():
        with tempfile.TemporaryDirectory() as folder, _replacing(shared) as out:
            path = Path(folder) / "kernel.ll"
            path.write_text(module.text)
            # Optimised already; checks dominate what runs, so quick code generation is what pays.
            _clang("-O0", "-g0", "-fPIC", "-shared", "-nostdlib", "-fno-sanitize=all", "-w", str(path), "-o", out)
    return Library(shared, module.blocks, module.allocas, slots)
