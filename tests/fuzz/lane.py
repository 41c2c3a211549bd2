"""What one sequence must hold, as a list of tokens: the plain model that a cache's life is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from opentq.caches.extent import SLACK
from opentq.caches.single import dense
from opentq.codecs import Codec

BLOCK = 64

Columns = tuple[mx.array, mx.array]
"""Rotated keys and values `[1, H, T, D]`, in the order of their tokens."""


class Wrong(AssertionError):
    """A cache does not hold what it must, or attends to something else."""


@dataclass
class Lane:
    """Every token that a sequence was given and not told to drop, with how many of them are packed.

    Attributes:
        k, v: keys and values as they were given, float32 `[H, T, D]`.
        packed: tokens that follow the sinks and are packed.
        top: the most tokens there were since the window last forgot some.
    """

    k: np.ndarray
    v: np.ndarray
    packed: int = 0
    top: int = 0

    @classmethod
    def empty(cls, heads: int, dims: tuple[int, int]) -> Lane:
        return cls(*(np.zeros((heads, 0, dim), np.float32) for dim in dims))

    def copy(self) -> Lane:
        return Lane(self.k, self.v, self.packed, self.top)

    def __len__(self) -> int:
        return self.k.shape[1]

    def append(self, k: np.ndarray, v: np.ndarray, sink: int, recent: int) -> None:
        """Tokens come; whole blocks of those that are neither among the first nor the newest are packed."""
        if not k.shape[1]:
            return
        self.k, self.v = np.concatenate([self.k, k], 1), np.concatenate([self.v, v], 1)
        self.packed = max(self.packed, (len(self) - sink - recent) // BLOCK * BLOCK)
        self.top = max(self.top, len(self))

    def trim(self, count: int, sink: int) -> None:
        """The newest tokens go; what is packed stays packed."""
        keep = max(len(self) - count, 0)
        self.k, self.v = self.k[:, :keep], self.v[:, :keep]
        self.packed = min(self.packed, max(keep - sink, 0))

    def may_trim(self, count: int, window: int, base: int) -> bool:
        """Whether a trim leaves all that a query sees: a window forgets what is behind it."""
        return not base or self.top - (len(self) - count) <= min(SLACK, window)


def lengths(lane: Lane, extent: tuple[int, int, int, int], sink: int, window: int) -> None:
    """Raise Wrong unless a cache's (base, sink, packed, tail) are those of the lane."""
    base, first, packed, tail = extent
    total = len(lane)
    if base + first + packed + tail != total:
        raise Wrong(f"{extent} is not {total} tokens")
    if first != min(sink, total):
        raise Wrong(f"{first} of {sink} sinks at {total} tokens")
    if base + packed != lane.packed:
        raise Wrong(f"{base} + {packed} tokens are packed or forgotten, not {lane.packed}")
    if base and (not window or total - first - base < min(window, total) - 1 or base % BLOCK):
        raise Wrong(f"a window of {window} has forgotten {base} of {total}")
    if window and packed + tail > window + SLACK + 256 + 2 * BLOCK + tail:
        raise Wrong(f"a window of {window} holds {packed} + {tail} tokens")


def contents(
    lane: Lane, codecs: tuple[Codec, Codec], held: Columns, split: tuple[int, int, int], center: mx.array | None
) -> None:
    """Raise Wrong unless `held`, cut into (base, sink, packed), is what the codecs make of the lane's tokens.

    fp16 columns are compared as they are. A packed token may round differently on another back end, but it may not be
    further from the truth than the codec itself is.
    """
    base, sink, packed = split
    for name, codec, given, got in zip(("keys", "values"), codecs, (lane.k, lane.v), held):
        chosen = np.concatenate([given[:, :sink], given[:, sink + base : base + got.shape[2]]], 1)
        if not chosen.shape[1] or not chosen.shape[2]:
            continue
        y = dense(codec, mx.array(chosen)[None]).astype(mx.float32)
        shift = center.astype(mx.float32) if center is not None and name == "keys" else mx.zeros_like(y[:, :, :1])
        rest = y - shift
        want = [rest[:, :, :sink], rest[:, :, sink : sink + packed], rest[:, :, sink + packed :]]
        if packed:
            fp16 = want[1].astype(mx.float16)
            want[1] = codec.decode(codec.encode(fp16), mx.float32, given.shape[2])
        got, expected = np.array(got.astype(mx.float32))[0], np.array(mx.concatenate(want, 2))[0]
        true = np.array(rest)[0]
        size = np.linalg.norm(np.array(y)[0], axis=-1) + float(mx.linalg.norm(shift, axis=-1).max())
        error, allowed = np.linalg.norm(got - true, axis=-1), np.linalg.norm(expected - true, axis=-1)
        bad = ~(error <= 1.1 * allowed + 3e-3 * size + 1e-6)
        if bad.any():
            head, token = np.argwhere(bad)[0]
            part = "sink" if token < sink else "packed" if token < sink + packed else "tail"
            raise Wrong(
                f"{name}: token {token} of {got.shape[1]} ({part}, head {head}) is {error[head, token]:.3g} from what "
                f"was given, and the codec itself {allowed[head, token]:.3g}; {int(bad.sum())} of {bad.size} are so"
            )
