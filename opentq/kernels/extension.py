"""C++ that takes part in MLX's graph: extensions compiled on first use, against the headers of this very MLX.

They need a C++ compiler and the headers of Python and nanobind. Where one of these is missing, or MLX was bound by
another nanobind, whoever wanted an extension does without: the same results, more slowly.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import shlex
import sysconfig
from pathlib import Path
from types import ModuleType

import mlx.core as mx

from . import build

log = logging.getLogger("opentq")

HERE = Path(__file__).parent
FILES = {"graph": HERE / "cpu" / "graph.cpp", "repeat": HERE / "repeat.cpp"}
"""The extensions, by name."""


def module(name: str) -> ModuleType | None:
    """The extension of this name, or None where it can't be had."""
    return _found(name)[0]


def missing(name: str) -> str:
    """Why it can't be had; empty where it can."""
    return _found(name)[1]


@functools.cache
def _found(name: str) -> tuple[ModuleType | None, str]:
    try:
        import nanobind

        return _load(name, Path(nanobind.__file__).parent), ""
    except (ImportError, OSError, TypeError, build.BuildError) as error:
        log.info("no extension %s of MLX: %s", name, error)
        return None, str(error)


def _load(name: str, nanobind: Path) -> ModuleType:
    mlx = Path(mx.__file__).parent
    folders = sysconfig.get_path("include"), nanobind / "include", nanobind / "ext/robin_map/include", mlx / "include"
    flags = ["-std=c++20", "-O2", "-fno-strict-aliasing", "-DNDEBUG", "-DNB_DOMAIN=mlx", *(f"-I{f}" for f in folders)]
    flags += [f"-DMADE_FOR_{of.upper()}={_number(of)}" for of in ("mlx", "nanobind")]  # another file for each
    sources = [shlex.join([str(file), *flags]) for file in (FILES[name], nanobind / "src/nb_combined.cpp")]
    # Linked to MLX's library, which must not become global: it has functions with the names of llama.cpp's.
    path = build.load(name, sources, links=next(mlx.glob("lib/libmlx.*")))._name
    loader = importlib.machinery.ExtensionFileLoader(f"opentq_{name}", path)
    spec = importlib.util.spec_from_loader(f"opentq_{name}", loader)
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    loader.exec_module(made)
    made.same(mx.array(0))  # a TypeError where nanobind's version is not that of MLX
    return made


def _number(package: str) -> str:
    return importlib.metadata.version(package).replace(".", "_")
