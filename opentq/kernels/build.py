"""The third dialect: C++ kernels, compiled on first use for exactly this machine and kept in the user's cache folder.

A library is named by everything it depends on (sources, headers, flags, compiler, CPU), so nothing stale is ever loaded
and several machines can share one home. It is written under a private name and moved into place, so several
processes can build at once; the folder must belong to the user alone, because what lies there is executed. A machine
without a compiler is served by the portable path, and `opentq doctor` says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import kept

log = logging.getLogger("opentq")

HERE = Path(__file__).parent / "cpu"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-w")
NATIVE = ("-march=native", "-mcpu=native")  # the second for Arm compilers that don't know the first
LINKING = ("-shared", "-pthread", *(("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()))
"""macOS must be told that extensions find Python's functions when they are loaded."""
TIMEOUT = 600  # seconds a compiler may take


class BuildError(RuntimeError):
    """No C++ compiler, or one that fails; the message says which and what to do."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command, and what tells one version from another without running it."""

    command: tuple[str, ...]
    identity: str

    def version(self) -> str:
        """The first line of its `--version`, or why it gave none."""
        try:
            done = subprocess.run([*self.command, "--version"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        return ((done.stdout or done.stderr).splitlines() or ["unknown"])[0]


def active_dialect() -> str | None:
    """Which kernels this process can run: "metal", "cuda", "cpu", or None when the default device is something else."""
    import mlx.core as mx  # here only: the BLAS shim is built before MLX may be loaded

    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    if mx.metal.is_available():
        return "metal"
    if mx.cuda.is_available():
        return "cuda"
    return None


def find_compiler() -> Compiler:
    """`$CXX` where it is set, else c++, g++ or clang++. Raises BuildError."""
    wanted = os.environ.get("CXX", "")
    for name in (wanted,) if wanted else ("c++", "g++", "clang++"):
        command = shlex.split(name)
        found = shutil.which(command[0]) if command else None
        if found and not _opens_a_dialog(found):
            real = Path(found).resolve()
            about = real.stat()
            return Compiler((found, *command[1:]), f"{real} {about.st_size} {about.st_mtime_ns}")
    raise BuildError(
        f"CXX={wanted!r} is not a program: correct or unset it"
        if wanted
        else "no C++ compiler found (c++, g++, clang++): install g++ or clang (xcode-select --install), or set CXX"
    )


def _opens_a_dialog(found: str) -> bool:
    """Whether this is what macOS has in a compiler's place: a program that asks whether to install one."""
    if sys.platform != "darwin" or not found.startswith("/usr/bin/"):
        return False
    return subprocess.run(["xcode-select", "-p"], capture_output=True, timeout=30).returncode != 0


@functools.cache
def cpu_identity() -> str:
    """What `-march=native` looks at: architecture, model and feature flags."""
    parts = [platform.machine()]
    if sys.platform == "darwin":
        query = ["sysctl", "-n", "machdep.cpu.brand_string"]
        parts.append(subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip())
    else:
        with contextlib.suppress(OSError):
            with open("/proc/cpuinfo") as file:
                first = file.read(1 << 14).split("\n\n")[0]
            keys = ("model name", "flags", "Features", "CPU implementer", "CPU part")
            parts += [line for line in first.splitlines() if line.split(":")[0].strip() in keys]
    return "\n".join(parts)


def load(name: str, sources: Sequence[str], mode: int = ctypes.DEFAULT_MODE, links: Path | None = None) -> ctypes.CDLL:
    """The library `name` made of these files of `kernels/cpu`, compiled if this machine hasn't done so before.

    `links`: a library whose functions it calls. Raises BuildError.
    """
    compiler = find_compiler()
    key = _key(compiler, sources, str(links or ""))
    path = cache_folder() / f"{name}-{key}.so"
    if not kept.whole(path):
        with _lock(path.with_suffix(".lock")):
            if not kept.whole(path):
                for left in path.parent.glob(f"{_work(path)}*"):  # of a compiler that was killed
                    kept.remove(left)
                _say(f"opentq: compiling {name} for this machine, once -> {path}")
                compile_library(compiler, sources, path, links=links)
    try:
        return ctypes.CDLL(str(path), mode)
    except OSError as error:
        raise BuildError(f"compiled kernels can't be loaded: {error}; delete {path.parent} and try again") from error


def compile_library(
    compiler: Compiler, sources: Sequence[str], target: Path, extra: Sequence[str] = (), links: Path | None = None
) -> None:
    """Compile `sources` in parallel and link them to `target`, which appears in one step.

    A source is a file of `kernels/cpu`, with definitions behind it if it has any: "products.cpp -DOPENTQ_BITS=4".
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_work(target)) as work:

        def one(source: str) -> str:
            file, *defines = shlex.split(source)
            out = str(Path(work) / f"{sources.index(source)}.o")
            for native in NATIVE:
                error = _run([*compiler.command, *FLAGS, native, *extra, *defines, "-c", str(HERE / file), "-o", out])
                if error is None:
                    return out
                if native not in error:
                    break
            raise BuildError(f"{shlex.join(compiler.command)} could not compile {source}: {error}")

        with ThreadPoolExecutor(min(len(sources), os.cpu_count() or 1)) as pool:
            objects = list(pool.map(one, sources))
        linked = str(Path(work) / target.name)
        found = [str(links), f"-Wl,-rpath,{links.parent}"] if links else []
        error = _run([*compiler.command, *LINKING, *extra, *objects, *found, "-o", linked])
        if error is not None:
            raise BuildError(f"{shlex.join(compiler.command)} could not link {target.name}: {error}")
        os.chmod(linked, 0o600 | stat.S_IXUSR)
        kept.seal(Path(linked), target)


def _work(target: Path) -> str:
    """How the names of folders begin in which `target` is compiled."""
    return f".build-{target.stem}-"


@functools.cache
def cache_folder() -> Path:
    """Where libraries are kept, private to the user; a temporary folder, and a warning, where none can be written."""
    import platformdirs  # here only: most commands compile nothing

    folder = platformdirs.user_cache_path("opentq") / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        if hasattr(os, "getuid") and found.st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user")
        if found.st_mode & 0o077:
            folder.chmod(0o700)
        with tempfile.TemporaryFile(dir=folder):
            kept.sweep(folder, 2 * TIMEOUT)
            return folder
    except OSError as error:
        private = Path(tempfile.mkdtemp(prefix="opentq-kernels-"))
        _say(f"opentq: compiled kernels can't be kept ({error}); this process uses {private}")
        log.warning("compiled kernels can't be kept in %s: %s", folder, error)
        return private


def _key(compiler: Compiler, sources: Sequence[str], links: str = "") -> str:
    digest = hashlib.sha256()
    for part in (*compiler.command, compiler.identity, *FLAGS, *LINKING, links, cpu_identity(), *sources):
        digest.update(part.encode() + b"\0")
    for file in sorted({HERE / shlex.split(s)[0] for s in sources} | set(HERE.glob("*.h"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:20]


def _run(command: list[str]) -> str | None:
    """None, or what went wrong: the first lines of the compiler's own words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    return "\n".join((done.stderr or done.stdout).splitlines()[:12]) or f"exit status {done.returncode}"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One builder at a time where the file system can lock; elsewhere both build and the last move wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(message: str) -> None:
    if sys.stderr.isatty():
        print(message, file=sys.stderr)
