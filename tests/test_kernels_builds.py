"""The CPU kernels without Python, against a scalar twin (cpu/selftest.cpp): under sanitizers and on other machines."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from opentq.kernels import build, kept
from opentq.kernels.cpu import library as cpu

pytestmark = pytest.mark.skipif(
    build.active_dialect() != "cpu" or not cpu.available(), reason="no CPU kernels here: another device, or no compiler"
)

SELFTEST = Path(__file__).parent / "cpu" / "selftest.cpp"
PRODUCTS = '#include "products.cpp"\n#undef OPENTQ_BITS\n#undef OPENTQ_LOOKUP\n'


def build_selftest(compiler: str, *flags: str) -> Path:
    """The kernels and tests/cpu/selftest.cpp as one program, kept by what it is made of.

    Products are two files here, not ten: a machine may have two cores, and headers cost time, too.
    """
    command = [compiler, "-std=c++17", "-pthread", "-w", f"-I{build.HERE}", *flags]
    files = [f for f in cpu.SOURCES if not f.startswith("products.cpp")]
    digest = hashlib.sha256(build._key(build.find_compiler(), cpu.SOURCES).encode() + SELFTEST.read_bytes())
    digest.update(" ".join((*command, str(os.stat(compiler).st_mtime_ns))).encode())
    program = build.cache_folder() / f"selftest-{digest.hexdigest()[:20]}"
    if kept.whole(program):
        return program
    with tempfile.TemporaryDirectory(dir=program.parent, prefix=".build-selftest-") as work:
        sources = [*(build.HERE / file for file in files), SELFTEST]
        for part in range(2):
            kinds = [f"#define OPENTQ_BITS {b}\n#define OPENTQ_LOOKUP {n}\n{PRODUCTS}" for b, n in cpu.KINDS[part::2]]
            sources.append(Path(work, f"products{part}.cpp"))
            sources[-1].write_text("".join(kinds))

        def one(source: Path) -> str:
            out = str(Path(work, source.name).with_suffix(".o"))
            subprocess.run([*command, "-c", str(source), "-o", out], check=True)
            return out

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(one, sources))
        linked = Path(work, "selftest")
        subprocess.run([*command, *objects, "-o", str(linked)], check=True)
        kept.seal(linked, program)
    return program


def run_selftest(command: list[str], isa: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.startswith(isa) and done.stdout.rstrip().endswith("0 failed")


@pytest.mark.timeout(600)
def test_sanitizers_find_nothing():
    compiler = build.find_compiler().command[0]
    flags = ["-Og", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    run_selftest([str(build_selftest(compiler, *flags))], cpu.status().isa)


@pytest.mark.timeout(600)
def test_products_without_the_matrix_unit():
    """What CPUs without one take, on a CPU that has one."""
    isa, _, matrix = cpu.status().isa.partition("+")
    if not matrix:
        pytest.skip("no matrix unit here: the run under sanitizers took these products")
    flags = ["-Og", "-march=native", "-DOPENTQ_NO_MATRIX"]
    run_selftest([str(build_selftest(build.find_compiler().command[0], *flags))], f"{isa}:")


@pytest.mark.timeout(600)
def test_portable_vectors():
    program = build_selftest(build.find_compiler().command[0], "-Og", "-DOPENTQ_PORTABLE", "-DOPENTQ_NO_AVX512")
    run_selftest([str(program)], "portable")


@pytest.mark.timeout(600)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is x86")
def test_avx2():
    program = build_selftest(build.find_compiler().command[0], "-Og", "-march=haswell")
    if "avx2" not in build.cpu_identity():
        pytest.skip("compiled, but this CPU has no AVX2 to run it")
    run_selftest([str(program)], "avx2")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "isa,march",
    [("neon-dotprod", "armv8.2-a+dotprod"), pytest.param("neon-i8mm", "armv8.6-a", marks=pytest.mark.slow)],
)
def test_neon(isa, march):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None:
        pytest.skip("no aarch64 cross-compiler: install g++-aarch64-linux-gnu")
    program = build_selftest(compiler, "-Og", "-static", f"-march={march}")
    if emulator is None:
        pytest.skip("compiled, but there is no qemu-aarch64 to run it: install qemu-user")
    run_selftest([emulator, str(program), "--no-fork"], isa)
