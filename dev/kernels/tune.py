"""Time the decode kernel alone, in any geometry, on a machine that has torch but not MLX.

    python dev/kernels/tune.py build FOLDER     here: nvcc compiles the variants below into FOLDER (no GPU needed)
    python dev/kernels/tune.py run FOLDER       there: needs a GPU and torch; prints a table, writes FOLDER/tune.jsonl

A launch is replayed from a CUDA graph of 20, over sets of random records that together exceed the L2 cache; a figure is
the median of 5 replays divided by 20. So this is the kernel with its launch gap and without MLX's overhead per call:
`dev/gpu_check.py` measures that. Each launch has 64 dense columns beside its packed tokens.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# (k bits, v bits, head dim, row tiles, warps, stages, resident blocks)
VARIANTS = [
    (4, 4, 128, 1, 8, 2, 2),
    (4, 4, 128, 1, 8, 3, 1),
    (4, 4, 128, 1, 16, 2, 1),
    (4, 4, 128, 1, 4, 2, 4),
    (4, 4, 128, 2, 8, 3, 1),
    (4, 4, 64, 1, 8, 4, 2),
    (4, 4, 256, 1, 8, 2, 1),
    (8, 8, 128, 1, 8, 2, 1),
    (8, 4, 128, 1, 8, 2, 1),
    (2, 2, 128, 1, 8, 3, 2),
]

# (k bits, v bits, head dim, batch, KV heads, query heads per KV head, tokens)
SHAPES = [
    *((4, 4, 128, 1, 8, 8, n) for n in (64, 1024, 4096, 16384, 32768, 131072)),
    *((4, 4, 128, 1, 8, gqa, 131072) for gqa in (1, 16)),
    *((4, 4, 128, batch, 8, 8, 8192) for batch in (8, 32)),
    *((k, v, d, 1, 8, 8, 131072) for k, v, d in ((4, 4, 64), (4, 4, 256), (8, 8, 128), (8, 4, 128), (2, 2, 128))),
]
SPLITS = (1, 2, 4, 8, 12, 16, 24, 32)


def build(folder: Path) -> None:
    """Compile every variant to a cubin and describe it in `manifest.json`."""
    sys.path.insert(0, str(ROOT))
    from dataclasses import replace

    from opentq.kernels import cuda
    from opentq.kernels.cuda_layout import MmaLayout

    folder.mkdir(parents=True, exist_ok=True)
    manifest = []
    for k, v, dim, tiles, warps, stages, resident in VARIANTS:
        sides = MmaLayout("k", k, 32, dim), MmaLayout("v", v, 32, dim)
        geometry = cuda.Geometry(*sides, "__half", tiles, warps, stages)
        source = replace(geometry.source(), resident=resident)
        name = f"{source.name}_{resident}"
        (folder / f"{name}.cu").write_text(source.translation_unit())
        command = ["nvcc", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-Xptxas", "-v", "-cubin"]
        done = subprocess.run(
            [*command, folder / f"{name}.cu", "-o", folder / f"{name}.cubin"],
            capture_output=True,
            text=True,
            check=True,
        )
        registers = int(done.stderr.split("Used ")[1].split()[0])
        words = [side.record_words for side in sides]
        manifest.append(
            {
                "name": name, "function": source.name, "k": k, "v": v, "dim": dim, "tiles": tiles, "warps": warps,
                "stages": stages, "resident": resident, "shared": source.shared, "words": words,
                "groups": sides[0].groups, "registers": registers, "kernels": cuda.source_hash(),
            }
        )  # fmt: skip
        print(f"{name}: {registers} registers", flush=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Shape(ctypes.Structure):
    """MLX passes shapes by value."""

    _fields_ = (("d", ctypes.c_int * 8),)


class Driver:
    """The CUDA driver through ctypes, on torch's current stream."""

    def __init__(self, folder: Path, torch):
        self.library, self.folder, self.torch = ctypes.CDLL("libcuda.so.1"), folder, torch
        self.functions: dict[str, ctypes.c_void_p] = {}

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"the CUDA driver answered error {status}")

    def function(self, variant: dict) -> ctypes.c_void_p:
        name = variant["name"]
        if name not in self.functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            path = str(self.folder / f"{name}.cubin").encode()
            self.check(self.library.cuModuleLoad(ctypes.byref(module), path))
            self.check(self.library.cuModuleGetFunction(ctypes.byref(function), module, variant["function"].encode()))
            self.check(self.library.cuFuncSetAttribute(function, 8, variant["shared"]))  # dynamic shared memory
            self.functions[name] = function
        return self.functions[name]

    def launch(self, variant: dict, grid: tuple[int, int, int], arrays: list) -> None:
        held, pointers = [], []
        for i, array in enumerate(arrays):
            held.append(ctypes.c_void_p(array.data_ptr()))
            pointers.append(ctypes.addressof(held[-1]))
            if i < 4:  # q, k, v, dense_k come with their shapes
                held.append(Shape((ctypes.c_int * 8)(*array.shape)))
                pointers.append(ctypes.addressof(held[-1]))
        table = (ctypes.c_void_p * len(pointers))(*pointers)
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        function, threads = self.function(variant), 32 * variant["warps"]
        self.check(self.library.cuLaunchKernel(function, *grid, threads, 1, 1, variant["shared"], stream, table, None))


def graph_time(torch, calls: list, inner: int = 20) -> float:
    """Microseconds per call: `inner` calls, taken in turn, captured once and replayed."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(inner):
            calls[i % len(calls)]()
    samples = []
    for i in range(6):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        if i:
            samples.append(start.elapsed_time(stop) * 1e3 / inner)
    return statistics.median(samples)


def random_records(torch, count: int, words: int, groups: int):
    """`count` records with random codes and finite scales and zeros."""
    x = torch.randint(-(2**31), 2**31 - 1, (count, words), dtype=torch.int32, device="cuda")
    numbers = torch.rand(count, 64 * groups, device="cuda").mul_(0.1).half()
    numbers[:, 32 * groups :] -= 0.7
    x[:, words - 32 * groups :] = numbers.view(torch.int32)
    return x


def measure(torch, driver: Driver, variant: dict, shape: tuple) -> dict[int, float]:
    """Microseconds for every number of splits."""
    _, _, dim, batch, heads, gqa, tokens = shape
    size = batch * heads * tokens // 32 * sum(variant["words"]) * 4
    sets = []
    for _ in range(max(2, min(8, int(6e8 / size)))):
        count = batch * heads * tokens // 32
        pair = [random_records(torch, count, words, variant["groups"]) for words in variant["words"]]
        sets.append([x.view(batch, heads, tokens // 64, -1) for x in pair])
    q = torch.randn(batch, heads * gqa, 1, dim, device="cuda").half()
    dense = [torch.randn(batch, heads, 64, dim, device="cuda").half() for _ in "kv"]
    lens = torch.tensor([[tokens, 0, 0]] * batch, dtype=torch.int32, device="cuda")
    params = torch.tensor([dim**-0.5, 0.0, 0.0, 0.0]).view(torch.int32).cuda()
    sinks = torch.full((1,), float("nan"), device="cuda")
    tickets = torch.zeros(65536, dtype=torch.int32, device="cuda")
    tiles = -(-gqa // (8 * variant["tiles"]))
    times = {}
    for splits in SPLITS:
        if splits * 128 > max(tokens, 128) or splits * batch * heads * tiles > 600:
            continue
        out = torch.empty_like(q)
        scratch = torch.empty(batch * heads * tiles, splits, 8 * variant["tiles"], dim + 2, device="cuda")

        def call(pair, splits=splits, out=out, scratch=scratch):
            arrays = [q, *pair, *dense, lens, params, sinks, tickets, out, scratch]
            driver.launch(variant, (splits, heads * tiles, batch), arrays)

        times[splits] = graph_time(torch, [lambda pair=pair: call(pair) for pair in sets])
    return times


def run(folder: Path) -> None:
    """Every variant on every shape that it fits."""
    import torch

    driver, variants = Driver(folder, torch), json.loads((folder / "manifest.json").read_text())
    x = torch.randn(1 << 29, device="cuda").half()
    read = x.nbytes / graph_time(torch, [x.max], 4) / 1e3
    del x
    name = torch.cuda.get_device_name()
    print(f"{name}, read-only {read:.0f} GB/s")
    with (folder / "tune.jsonl").open("w") as file:
        for shape in SHAPES:
            k, v, dim, batch, heads, gqa, tokens = shape
            for variant in variants:
                if (variant["k"], variant["v"], variant["dim"]) != (k, v, dim) or (gqa > 8) != (variant["tiles"] > 1):
                    continue
                times = measure(torch, driver, variant, shape)
                best = min(times, key=lambda s: times[s])
                rate = batch * heads * tokens / 32 * sum(variant["words"]) * 4 / times[best] / 1e3
                row = {"what": "decode kernel", "n": tokens, "batch": batch, "q_heads": heads * gqa, "kv_heads": heads}
                row |= {
                    "us": round(times[best], 1),
                    "splits": best,
                    "gb_per_s": round(rate),
                    "read_gb_per_s": round(read),
                }
                row |= {"all": {s: round(t, 1) for s, t in times.items()}, "device": name, **variant}
                file.write(json.dumps(row) + "\n")
                print(f"k{k}v{v} D{dim} b{batch} {heads * gqa}/{heads} n {tokens}: warps {variant['warps']} stages "
                      f"{variant['stages']} resident {variant['resident']}: {times[best]:.1f} us, {rate:.0f} GB/s, "
                      f"{rate / read:.0%} of read, {best} splits", flush=True)  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("build", "run"):
        sys.exit(__doc__)
    {"build": build, "run": run}[sys.argv[1]](Path(sys.argv[2]))
