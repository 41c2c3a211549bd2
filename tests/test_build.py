"""The C++ dialect: finding a compiler, building once, sharing safely, failing clearly; and the fast float32 product."""

from __future__ import annotations

import ctypes
import os
import pathlib
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from opentq.kernels import build
from opentq.kernels.cpu import blas

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX compilers")

ANSWER = '#include "n.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return N + EXTRA; }\n'


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A source folder and a cache folder of our own, and a compiler that counts its runs."""
    try:
        real = build.find_compiler().command[0]
    except build.BuildError as error:
        pytest.skip(str(error))
    source = tmp_path / "src"
    source.mkdir()
    (source / "a.cpp").write_text(ANSWER)
    (source / "n.h").write_text("#define N 40\n")
    wrapper = program(tmp_path / "cxx", f'echo run >> {tmp_path}/runs\nexec {real} "$@"')
    monkeypatch.setattr(build, "HERE", source)
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    build.cache_folder.cache_clear()


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def runs(home: Path) -> int:
    return len((home / "runs").read_text().split()) if (home / "runs").exists() else 0


def answer(extra: int = 2) -> int:
    return build.load("t", [f"a.cpp -DEXTRA={extra}"]).answer()


def test_builds_once_and_for_every_reason_again(home):
    assert answer() == 42 and runs(home) == 2  # compile and link
    assert answer() == 42 and runs(home) == 2
    assert answer(3) == 43 and runs(home) == 4, "another definition"
    (home / "src" / "n.h").write_text("#define N 50\n")
    assert answer() == 52 and runs(home) == 6, "another header"
    program(home / "cxx", (home / "cxx").read_text().split("\n", 1)[1] + "\n# another version")
    forget()
    assert answer() == 52 and runs(home) == 8, "another compiler"


def test_what_is_kept_is_private_and_whole(home):
    answer()
    folder = build.cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    files = sorted(folder.iterdir())
    assert [f.suffix for f in files] == [".lock", ".so", ".sha256"], "nothing half-made is left"
    assert files[1].stat().st_mode & 0o077 == 0


def test_a_folder_open_to_others_is_closed(home):
    folder = home / "cache" / "opentq" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert build.cache_folder() == folder and folder.stat().st_mode & 0o777 == 0o700


def cut(path):
    """To half its length: a process that maps it dies of SIGBUS."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def folder_in_its_place(path):
    path.unlink()
    path.mkdir()
    (path / "x").write_text("x")


@pytest.mark.parametrize("damage", [cut, folder_in_its_place, lambda path: path.write_bytes(b""), pathlib.Path.touch])
def test_a_damaged_library_is_built_again_and_said(home, damage, caplog):
    answer()
    forget()
    (library,) = build.cache_folder().glob("t-*.so")
    left = build.cache_folder() / f".build-{library.stem}-x1y2"
    left.mkdir()
    damage(library)
    script = "import sys, pathlib; from opentq.kernels import build; build.HERE = pathlib.Path(sys.argv[1]); "
    script += "print(build.load('t', ['a.cpp -DEXTRA=2']).answer())"
    env = {**os.environ, "OPENTQ_BLAS": "off"}
    command = [sys.executable, "-c", script, str(home / "src")]
    done = subprocess.run(command, cwd=Path(build.__file__).parents[2], env=env, capture_output=True, text=True)
    whole = damage is pathlib.Path.touch
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    assert done.stderr.count("is damaged; compiling it again") == (not whole)
    assert left.exists() == whole, "what a killed compiler left goes when its library is compiled"


def test_what_killed_compilers_left_long_ago_is_removed(home):
    folder = build.cache_folder()
    for name, age in ((".build-old-1", 9999), (".build-new-2", 0)):
        (folder / name).mkdir()
        os.utime(folder / name, (time.time() - age,) * 2)
    build.cache_folder.cache_clear()
    build.cache_folder()
    assert sorted(p.name for p in folder.iterdir()) == [".build-new-2"]


def test_a_cache_that_cannot_be_written_gives_a_temporary_one(home, monkeypatch, caplog):
    (home / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    with caplog.at_level("WARNING", "opentq"):
        assert answer() == 42
    assert "can't be kept" in caplog.text
    assert build.cache_folder().stat().st_mode & 0o777 == 0o700


def test_processes_that_build_at_once_share_one_build(home):
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from opentq.kernels import build
        build.HERE = Path(sys.argv[1])
        assert build.load("t", ["a.cpp -DEXTRA=2"]).answer() == 42
    """)
    command = [sys.executable, "-c", script, str(home / "src")]
    env = {**os.environ, "OPENTQ_BLAS": "off"}  # which would be built, too
    jobs = [subprocess.Popen(command, cwd=Path(build.__file__).parents[2], env=env) for _ in range(4)]
    assert [job.wait(120) for job in jobs] == [0] * 4
    assert runs(home) == 2


def test_a_failing_compiler_is_reported_in_its_own_words(home, monkeypatch):
    monkeypatch.setenv("CXX", str(program(home / "broken", "echo 'internal error 7' >&2; exit 1")))
    forget()
    with pytest.raises(build.BuildError, match="internal error 7"):
        answer()


def test_compiler_choice(home, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    forget()
    with pytest.raises(build.BuildError, match=r"no-such-compiler.*correct or unset"):
        build.find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(home))
    forget()
    with pytest.raises(build.BuildError, match=r"install g\+\+"):
        build.find_compiler()
    program(home / "clang++", "echo clang 99")
    forget()
    assert build.find_compiler().version() == "clang 99"
    monkeypatch.setenv("CXX", f"{home}/clang++ -flag")
    forget()
    assert build.find_compiler().command == (f"{home}/clang++", "-flag")


@pytest.mark.parametrize("tools", [True, False])
def test_what_asks_whether_to_install_a_compiler_is_none(home, monkeypatch, tools):
    """As macOS has it in a compiler's place."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.sys, "platform", "darwin")
    monkeypatch.setattr(build.shutil, "which", lambda name: "/usr/bin/env")
    monkeypatch.setattr(
        build.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 2 - 2 * tools)
    )
    forget()
    if tools:
        assert build.find_compiler().command == ("/usr/bin/env",)
    else:
        with pytest.raises(build.BuildError, match="xcode-select --install"):
            build.find_compiler()


def python(script: str, **env: str) -> str:
    """Run a script in a fresh interpreter, from the project's folder; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
        cwd=Path(build.__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


ATTEND = """
    import mlx.core as mx
    import numpy as np
    mx.set_default_device(mx.cpu)
    from opentq.attention import dispatch
    from opentq.codecs.affine import Affine
    from opentq.kernels.cpu import library as cpu
    from opentq.kernels.cpu.layout import CpuBlocks
    from tests.cpu_blocks import store_numpy
    codec, layout = Affine(4, 32), CpuBlocks("k", 4, 32, 64)
    packed = codec.encode(mx.random.normal((1, 1, 64, 64), key=mx.random.key(0)))
    loaded = layout.load((mx.array(store_numpy(layout, *map(np.array, packed))),))
    assert all(mx.array_equal(a, b).item() for a, b in zip(loaded, packed))
    print(cpu.available(), cpu.status().error[:22], dispatch.layouts(codec, codec, (64, 64))[0].name)
"""


def test_without_a_compiler_the_portable_path_serves(tmp_path):
    out = python(ATTEND, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert out == "False CXX='no-such-compiler' canonical"


# ---- the float32 product

PRODUCT = """
    import opentq
    from opentq.kernels.cpu import blas
    import numpy as np
    assert blas._status is None, "decided when MLX is loaded, not earlier"
    import mlx.core as mx
    mx.set_default_device(mx.cpu)
    for rows, inner, columns in ((65, 65, 65), (1, 1000, 3001), (1501, 1000, 1), (333, 90, 400), (400, 2000, 37)):
        a = np.random.default_rng(0).standard_normal((rows, inner)).astype(np.float32)
        b = np.random.default_rng(1).standard_normal((inner, columns)).astype(np.float32)
        want = a @ b
        across_a, across_b = (mx.array(x.T.copy()).T for x in (a, b))
        for x, y in ((mx.array(a), mx.array(b)), (across_a, mx.array(b)), (mx.array(a), across_b)):
            got = np.array(x @ y)
            assert np.allclose(got, want, atol=1e-3), (rows, inner, columns)
            assert np.array_equal(got, np.array(x @ y))
    found = blas.status()
    print(found.kind, found.detail)
"""

reference_blas = pytest.mark.skipif(not blas._reference_blas(), reason="this MLX doesn't bring a reference BLAS")


@reference_blas
def test_a_fast_product_is_found_and_right():
    kind, detail = python(PRODUCT, OPENTQ_BLAS="").split(" ", 1)
    try:
        build.find_compiler()
    except build.BuildError:
        assert kind == "reference"
    else:
        assert kind == "openblas" and "openblas" in detail


GEMM = """
    import ctypes, itertools
    import numpy as np
    import opentq, mlx.core
    from opentq.kernels.cpu import blas
    from opentq.kernels import build
    shim = build.load("blas", blas.SOURCES)
    library = ctypes.CDLL(blas.status().detail)
    threads = library.scipy_openblas_get_num_threads64_() if "scipy" in library._name else None
    f, i, p = ctypes.c_float, ctypes.c_int, ctypes.c_void_p
    shim.cblas_sgemm.argtypes = [i] * 6 + [f, p, i, p, i, f, p, i]
    rng = np.random.default_rng(0)
    kinds = (101, 102), (111, 112), (111, 112)
    sizes = [(70, 500, 600), (900, 40, 100), (1, 1700, 600), (1500, 1, 700), (1, 1, 40)]  # rows and columns alone, too
    sizes += [(2, 101, 70), (7, 3, 601), (16, 1030, 200), (17, 530, 40), (5, 1, 9)]  # a few rows
    for (m, n, k), order, ta, tb, beta in itertools.product(sizes, *kinds, (-0.5, 0.0)):
        a, b, c = (rng.standard_normal(s).astype(np.float32) for s in ((m, k), (k, n), (m, n)))
        want = 1.5 * (a @ b) + beta * c
        if beta == 0:
            c[:] = np.nan  # fresh memory may hold anything
        def stored(x, transposed):  # with 3 spare numbers a line
            x = x.T if transposed != (order == 102) else x
            padded = np.full((x.shape[0], x.shape[1] + 3), np.nan, np.float32)
            padded[:, :-3] = x
            return padded
        A, B, C = stored(a, ta == 112), stored(b, tb == 112), stored(c, False)
        la, lb, lc = (x.shape[1] for x in (A, B, C))
        shim.cblas_sgemm(order, ta, tb, m, n, k, 1.5, A.ctypes.data, la, B.ctypes.data, lb, beta, C.ctypes.data, lc)
        got = C[:, :-3].T if order == 102 else C[:, :-3]
        assert np.allclose(got, want, atol=1e-3), (m, n, k, order, ta, tb)
        assert np.isnan(C[:, -3:]).all()
    x, w = (mlx.core.array(rng.standard_normal(s).astype(np.float32)) for s in ((16, 601), (1030, 601)))
    alone = mlx.core.concatenate([row @ w.T for row in x.split(16)])
    for rows in range(1, 17):
        assert (x[:rows] @ w.T == alone[:rows]).all().item(), "a row does not depend on the others"
    assert threads is None or library.scipy_openblas_get_num_threads64_() == threads, "numpy keeps its threads"
    print("right")
"""


@reference_blas
@pytest.mark.parametrize("threads", ["1", "3"])
def test_products_in_pieces_are_right(threads):
    if python("import opentq, mlx.core; from opentq.kernels.cpu import blas; print(blas.status().kind)") != "openblas":
        pytest.skip("no fast product here")
    assert python(GEMM, OPENTQ_THREADS=threads) == "right"


@reference_blas
@pytest.mark.parametrize(
    "env,said",
    [
        ({"OPENTQ_BLAS": "off"}, "OPENTQ_BLAS=off"),
        ({"OPENTQ_BLAS": "/no/such/library.so"}, "can't be loaded"),
        ({"OPENTQ_BLAS": "libc.so.6"}, "has no cblas_sgemm"),
        ({"CXX": "no-such-compiler", "OPENTQ_BLAS": ""}, "no-such-compiler"),
    ],
    ids=str,
)
def test_without_it_the_reference_serves_and_is_reported(env, said):
    out = python(PRODUCT, **env)
    assert out.startswith("reference") and said in out


@reference_blas
def test_mlx_imported_first_is_reported():
    out = python("import mlx.core\nfrom opentq.kernels.cpu import blas\nprint(blas.status())")
    assert "import opentq first" in out


def test_the_decision_is_made_once_and_never_raises():
    assert blas.prepare() is blas.prepare()
    assert isinstance(blas.status(), blas.Blas)


def test_shared_libraries_load_through_ctypes(home):
    assert isinstance(build.load("t", ["a.cpp -DEXTRA=0"]), ctypes.CDLL)
