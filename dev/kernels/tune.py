"""Time the decode kernel alone in other geometries than the one that `Geometry.choose` takes.

    python dev/kernels/tune.py [--out FILE]     needs a GPU, MLX and torch; prints a line per geometry

A launch is replayed from a CUDA graph of 20, over sets of random records that together exceed the L2 cache; a figure is
the median of 5 replays divided by 20. So this is the kernel with its launch gap and without MLX's overhead per call.
Each launch has 64 dense columns beside its packed tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "dev")]

from gpu import graph  # noqa: E402

from opentq.codecs.affine import Affine  # noqa: E402
from opentq.codecs.turbo import Turbo  # noqa: E402
from opentq.kernels.cuda import launch as cuda  # noqa: E402

N = 131072
SHAPES = [graph.Shape(N, codec, codec) for codec in (Turbo(4), Turbo(3), Turbo(2), Affine(2), Affine(4))]
SHAPES += [graph.Shape(N, Affine(4), Affine(4), dim=64)]
GEOMETRIES = [(8, 2), (8, 4), (12, 2), (16, 2)]  # warps, stages
SPLITS = (12, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="append a JSON row per geometry to this file")
    options = parser.parse_args()
    import torch

    read = graph.read_bandwidth(torch)
    print(f"{torch.cuda.get_device_name()}, read-only {read / 1e9:.0f} GB/s", flush=True)
    for shape in SHAPES:
        for warps, stages in GEOMETRIES:
            geometry = replace(shape.geometry(), warps=warps, stages=stages)
            times = {splits: graph.kernel_seconds(torch, shape, geometry, splits) for splits in SPLITS}
            best = min(times, key=lambda s: times[s])
            rate = shape.bytes / times[best]
            row = {"what": "geometry", **shape.row(), "warps": warps, "stages": stages, "splits": best}
            row |= {
                "us": round(times[best] * 1e6, 1),
                "gb_per_s": round(rate / 1e9),
                "share_of_read": round(rate / read, 3),
            }
            row |= {"all": {s: round(t * 1e6, 1) for s, t in times.items()}, "kernels": cuda.source_hash()}
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row | {"device": torch.cuda.get_device_name()}) + "\n")
            print(
                f"{shape.k} {shape.v}, {warps} warps, {stages} stages: {row['all']}, {rate / read:.0%} of read",
                flush=True,
            )


if __name__ == "__main__":
    main()
