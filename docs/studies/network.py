"""What the studies on a real network begin with: their options, the device, and the network in float32."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

# isort: off
import opentq  # before MLX, so that its faster matrix product is found on CPUs
import mlx.core as mx

# isort: on
from mlx_lm.utils import dequantize_model

from opentq.attention import tiled
from opentq.hosts.mlx_lm.load import model_folder
from opentq.records import Records, model_name

ROOT = Path(__file__).parents[2]


def options(doc: str) -> argparse.ArgumentParser:
    """What every study takes."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: what MLX uses")
    parser.add_argument("--quick", action="store_true", help="a few hundred tokens of each: a test of this script")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    return parser


def on_gpu(args: argparse.Namespace, cache: int = 4 << 30) -> bool:
    """Take the device that was asked for; whether it is a GPU, which then keeps `cache` bytes of free memory."""
    if args.device:
        mx.set_default_device(mx.Device(getattr(mx, args.device)))
    if mx.default_device() != mx.Device(mx.gpu):
        return False
    mx.set_cache_limit(cache)
    tiled.SCRATCH = 512 << 20  # larger tiles, fewer launches; the numbers are the same
    return True


class Network:
    """One network in float32, decoded, so that what differs between two rows is the codec; and where rows go."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.began = args, time.perf_counter()
        self.model, self.tokenizer = opentq.load(args.model)
        self.model.set_dtype(mx.float32)
        dequantize_model(self.model)
        mx.eval(self.model.parameters())
        self.id = model_name(args.model, model_folder(args.model))

    def file(self, name: str) -> Records:
        """The records of one file."""
        return Records(self.args.results / f"{name}.jsonl")

    def say(self, *words: object) -> None:
        """A line of progress."""
        print(f"{time.perf_counter() - self.began:6.0f} s ", *words, flush=True)
