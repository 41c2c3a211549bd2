"""MLX's own Metal sources, from the macOS wheel of `mlx-metal`: every kernel's preamble, and kernels known to run.

The wheel is fetched once with pip into the user's cache and never becomes part of this project.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

from . import compiler, rewrite

KERNELS = "mlx/include/mlx/backend/metal/kernels"


@functools.cache
def root() -> Path | str:
    """The folder that holds `mlx/backend/metal/kernels`, or the reason why it can't be had."""
    version = importlib.metadata.version("mlx")
    cache = compiler.CACHE.parent / f"mlx-metal-{version}"
    include = cache / "mlx" / "include"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes start together, and one of them fetches
        if not (include / "mlx/backend/metal/kernels/utils.h").exists():
            problem = _fetch(version, cache)
            if problem:
                return problem
    return include


def _fetch(version: str, cache: Path) -> str | None:
    """Download the wheel and unpack its kernels; the reason if that fails."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--platform", "macosx_14_0_arm64"]
    command += ["--only-binary=:all:", f"mlx-metal=={version}", "-d", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(cache.glob("mlx_metal-*.whl"))
    if done.returncode or not wheels:
        return f"mlx-metal {version} can't be fetched from the package index: {done.stderr.strip()[-300:]}"
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(cache, [n for n in wheel.namelist() if n.startswith(KERNELS)])
    wheels[0].unlink()
    return None


def missing() -> str | None:
    """None when the sources are there, else the reason."""
    found = root()
    return found if isinstance(found, str) else None


@functools.cache
def source(*names: str) -> str:
    """MLX kernel headers by name (`sdpa_vector.h`), includes pasted in, each file once."""
    folder = root()
    if isinstance(folder, str):
        raise RuntimeError(folder)
    seen: set[Path] = set()
    return "".join(rewrite.flatten(folder / "mlx/backend/metal/kernels" / name, folder, seen) for name in names)


def preamble() -> str:
    """What MLX puts before every custom kernel: `metal::utils()`."""
    return source("utils.h")
