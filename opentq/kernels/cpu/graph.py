"""Decode steps as operations of MLX's graph (graph.cpp), so that nobody waits in every layer.

The extension is compiled on first use, against the headers of this very MLX. It needs those of Python and nanobind;
where there are none, steps are evaluated layer by layer, which gives the same bits more slowly.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import sysconfig
from pathlib import Path
from types import ModuleType

import mlx.core as mx

from .. import build

log = logging.getLogger("opentq")


def module() -> ModuleType | None:
    """The extension, or None where there is none."""
    return _found()[0]


def status() -> str:
    """Why there is none; empty where there is one."""
    return _found()[1]


@functools.cache
def _found() -> tuple[ModuleType | None, str]:
    try:
        import nanobind

        return _load(Path(nanobind.__file__).parent), ""
    except (ImportError, OSError, TypeError, build.BuildError) as error:
        log.info("decode steps are evaluated layer by layer: %s", error)
        return None, str(error)


def _load(nanobind: Path) -> ModuleType:
    mlx = Path(mx.__file__).parent
    folders = sysconfig.get_path("include"), nanobind / "include", nanobind / "ext/robin_map/include", mlx / "include"
    flags = ["-std=c++20", "-O2", "-fno-strict-aliasing", "-DNDEBUG", "-DNB_DOMAIN=mlx", *(f"-I{f}" for f in folders)]
    flags += [f"-DMADE_FOR_{name.upper()}={_number(name)}" for name in ("mlx", "nanobind")]  # another file for each
    sources = [" ".join([str(file), *flags]) for file in ("graph.cpp", nanobind / "src/nb_combined.cpp")]
    ctypes.CDLL(str(next(mlx.glob("lib/libmlx.*"))), ctypes.RTLD_GLOBAL)  # where the extension finds MLX's functions
    path = build.load("graph", sources)._name
    loader = importlib.machinery.ExtensionFileLoader("opentq_graph", path)
    spec = importlib.util.spec_from_loader("opentq_graph", loader)
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    loader.exec_module(made)
    made.same(mx.array(0))  # a TypeError where nanobind's version is not that of MLX
    return made


def _number(package: str) -> str:
    return importlib.metadata.version(package).replace(".", "_")
