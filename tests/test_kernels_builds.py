"""The CPU kernels without Python, against a scalar twin (cpu/selftest.cpp): under sanitizers and on other machines."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from opentq.kernels import build
from opentq.kernels.cpu import library as cpu

pytestmark = pytest.mark.skipif(
    build.active_dialect() != "cpu" or not cpu.available(), reason="no CPU kernels here: another device, or no compiler"
)

SELFTEST = Path(__file__).parent / "cpu" / "selftest.cpp"


def build_selftest(folder: Path, compiler: str, *flags: str) -> Path:
    """Compile the kernels and tests/cpu/selftest.cpp, each file apart, and link them."""
    command = [compiler, "-std=c++17", "-pthread", "-w", f"-I{build.HERE}", *flags]
    jobs = [[str(build.HERE / source.split()[0]), *source.split()[1:]] for source in cpu.SOURCES] + [[str(SELFTEST)]]

    def one(job: tuple[int, list[str]]) -> str:
        out = str(folder / f"{job[0]}.o")
        subprocess.run([*command, "-c", *job[1], "-o", out], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(one, enumerate(jobs)))
    program = folder / "selftest"
    subprocess.run([*command, *objects, "-o", str(program)], check=True)
    return program


def run_selftest(command: list[str], isa: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.startswith(isa) and done.stdout.rstrip().endswith("0 failed")


@pytest.mark.timeout(600)
def test_sanitizers_find_nothing(tmp_path):
    compiler = build.find_compiler().command[0]
    flags = ["-O1", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    run_selftest([str(build_selftest(tmp_path, compiler, *flags))], cpu.status().isa)


@pytest.mark.timeout(600)
def test_products_without_the_matrix_unit(tmp_path):
    """What CPUs without one take, on a CPU that has one."""
    isa, _, matrix = cpu.status().isa.partition("+")
    if not matrix:
        pytest.skip("no matrix unit here: the run under sanitizers took these products")
    flags = ["-O1", "-march=native", "-DOPENTQ_NO_MATRIX"]
    run_selftest([str(build_selftest(tmp_path, build.find_compiler().command[0], *flags))], f"{isa}:")


@pytest.mark.timeout(600)
def test_portable_vectors(tmp_path):
    program = build_selftest(
        tmp_path, build.find_compiler().command[0], "-O1", "-DOPENTQ_PORTABLE", "-DOPENTQ_NO_AVX512"
    )
    run_selftest([str(program)], "portable")


@pytest.mark.timeout(600)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is x86")
def test_avx2(tmp_path):
    program = build_selftest(tmp_path, build.find_compiler().command[0], "-O1", "-march=haswell")
    if "avx2" not in build.cpu_identity():
        pytest.skip("compiled, but this CPU has no AVX2 to run it")
    run_selftest([str(program)], "avx2")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "isa,march",
    [("neon-dotprod", "armv8.2-a+dotprod"), pytest.param("neon-i8mm", "armv8.6-a", marks=pytest.mark.slow)],
)
def test_neon(tmp_path, isa, march):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None:
        pytest.skip("no aarch64 cross-compiler: install g++-aarch64-linux-gnu")
    program = build_selftest(tmp_path, compiler, "-O1", "-static", f"-march={march}")
    if emulator is None:
        pytest.skip("compiled, but there is no qemu-aarch64 to run it: install qemu-user")
    run_selftest([emulator, str(program), "--no-fork"], isa)
