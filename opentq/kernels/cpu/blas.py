"""A fast float32 matrix product for MLX on Linux CPUs, without a new dependency.

MLX's CPU wheel ships a reference BLAS of about 5 GFLOP/s. Where `cblas_sgemm` is defined in the global scope before MLX
is loaded, MLX calls that one: a few lines of C++ that forward to the OpenBLAS inside numpy's own wheel, or to a system
OpenBLAS, 40 to 70 times as fast, on as many threads as attention uses (`OPENTQ_THREADS`). It is loaded just before MLX
is, because OpenBLAS starts threads that a command without MLX should not pay for. Everything is correct without it, so
whatever is missing is reported and nothing more. This module must not import MLX.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ...machine import physical_cores, threads
from .. import build

SOURCES = ("blas_shim.cpp", "rows.cpp")
SYSTEM = ("libopenblas.so.0", "libopenblas.so")
ERRORS = {1: "can't be loaded", 2: "has no cblas_sgemm", 3: "computed a wrong product"}


@dataclass(frozen=True)
class Blas:
    """What serves MLX's float32 matrix products: `kind` is "openblas", "reference" or "mlx", its own; and why."""

    kind: str
    detail: str


_status: Blas | None = None


def status() -> Blas:
    """What is in use."""
    return _status or Blas("mlx", "not decided: MLX is not loaded")


class _BeforeMLX:
    """Finds no module: it is asked for `mlx.core` just before that is loaded, and prepares then."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "mlx.core":
            sys.meta_path.remove(self)
            prepare()


def before_mlx() -> None:
    """Prepare when MLX is imported, or now where it is already. Called once, at `import opentq`."""
    if "mlx.core" in sys.modules:
        prepare()
    else:
        sys.meta_path.insert(0, _BeforeMLX())


def prepare() -> Blas:
    """Decide once, before MLX is loaded; never raises. `OPENTQ_BLAS` may be "off" or the path of a library."""
    global _status
    if _status is None:
        _status = _decide()
    return _status


def _decide() -> Blas:
    wanted = os.environ.get("OPENTQ_BLAS", "")
    if not _reference_blas():
        return Blas("mlx", "this MLX doesn't use a reference BLAS")
    if wanted == "off":
        return Blas("reference", "OPENTQ_BLAS=off")
    if "mlx.core" in sys.modules:
        return Blas("reference", "mlx was imported before opentq: import opentq first for faster float32 products")
    libraries = [(Path(wanted), "cblas_sgemm", False)] if wanted else _libraries()
    if not libraries:
        return Blas("reference", "no OpenBLAS found: install numpy from its wheel, or libopenblas0")
    try:
        shim = build.load("blas", SOURCES)
    except build.BuildError as error:
        return Blas("reference", str(error))
    tried = []
    for path, symbol, wide in libraries:
        names = (symbol.replace("cblas_sgemm", f"openblas_{verb}_num_threads").encode() for verb in ("set", "get"))
        row = symbol.replace("sgemm", "sgemv").encode()
        problem = shim.opentq_blas_use(os.fsencode(path), symbol.encode(), row, wide, *names, _threads())
        if not problem:
            # Opening it again puts its symbol in the global scope, where MLX will look first.
            ctypes.CDLL(shim._name, ctypes.RTLD_GLOBAL)
            return Blas("openblas", str(path))
        tried.append(f"{path} {ERRORS[problem]}")
    return Blas("reference", "; ".join(tried))


def _threads() -> int:
    """`OPENTQ_THREADS`; what is wrong with it the kernels say, when they are used."""
    try:
        return threads()
    except ValueError:
        return physical_cores()


def _packages(name: str) -> list[Path]:
    """Folders that hold package `name`, found without importing it."""
    found = importlib.util.find_spec(name)
    return [Path(p).parent for p in (found.submodule_search_locations or [])] if found else []


def _reference_blas() -> list[Path]:
    """The reference BLAS that MLX's CPU wheel for Linux brings, if this is one."""
    if not sys.platform.startswith("linux"):
        return []
    return [path for folder in _packages("mlx") for path in sorted(folder.glob("mlx_cpu.libs/lib*blas*.so*"))]


def _libraries() -> list[tuple[Path, str, bool]]:
    """Candidates: path, symbol, whether its integers have 64 bits. numpy loads its own anyway, so that comes first."""
    found = []
    for folder in _packages("numpy"):
        for path in sorted(folder.glob("numpy.libs/libscipy_openblas*.so*")):
            wide = "64_" in path.name
            found.append((path, "scipy_cblas_sgemm64_" if wide else "scipy_cblas_sgemm", wide))
    for place in ("/usr/lib", "/usr/lib64", "/usr/local/lib", f"/usr/lib/{os.uname().machine}-linux-gnu"):
        found += [(Path(place) / name, "cblas_sgemm", False) for name in SYSTEM if (Path(place) / name).exists()]
    return found
