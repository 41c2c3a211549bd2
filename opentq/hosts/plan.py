"""What happens to one layer's cache, in words that hold for every host.

The start-up report, the memory planner and the server's admission check read the same plans, so they can't disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..attention import pages
from ..caches.latent import LatentCodec
from ..codecs import Codec
from ..contracts.rotary import NO_ROTARY, Rotary
from ..errors import UserError
from ..spec.kv import KVSpec

FP16_BITS = 16


class NothingCompressed(UserError):
    """Compression was asked for and no layer can be compressed."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer's KV cache.

    Attributes:
        index: position in the model's cache list; for a `CacheList`, `part` says which member.
        kind: name of the cache class that the host would use.
        spec: the layer's spec, or None when it stays native.
        reason: why it is native ("" when compressed).
        kv_heads, key_dim, value_dim: 0 while unknown (before the first forward step).
        bound: tokens that a native cache holds at most; 0 when it grows with the context.
        constant: bytes that a native layer holds whatever the context (recurrent state).
        window: tokens that a query of a compressed sliding-window layer sees; 0 when it sees all.
        latent: the cache holds latents (MLA): the key is the latent, the value its rotary part.
        whole: why the layer has no pages where they were asked for; "" otherwise.
        rotary: how the layer's keys are turned, once a token has shown it.
        beside: bytes per token that stay as the host made them beside keys and values: those of an indexer.
    """

    index: int
    kind: str
    spec: KVSpec | None
    reason: str = ""
    part: int = 0
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    bound: int = 0
    constant: int = 0
    window: int = 0
    latent: bool = False
    whole: str = ""
    rotary: Rotary = NO_ROTARY
    beside: float = 0.0

    @property
    def compressed(self) -> bool:
        return self.spec is not None

    @property
    def codec(self) -> str:
        """Short name for tables."""
        if self.spec is None:
            return "native"
        apart = self.latent and self.value_dim and self.codecs[0] != self.codecs[1]
        return f"{self.spec}, rotary part f16" if apart else str(self.spec)

    @property
    def codecs(self) -> tuple[Codec, Codec]:
        """Of keys and of values; of a latent and of its rotary part, which is not always large enough to be packed."""
        assert self.spec is not None
        key, value = self.spec.codecs()
        return (key, LatentCodec(key, self.key_dim).rotary(self.value_dim)) if self.latent else (key, value)

    def bytes_per_token(self) -> float:
        """Bytes that one packed token takes in this layer, metadata included."""
        if self.spec is None:
            return self.kv_heads * (self.key_dim + self.value_dim) * FP16_BITS / 8 + self.beside
        key, value = self.codecs
        bits = key.bits_per_value(self.key_dim) * self.key_dim + value.bits_per_value(self.value_dim) * self.value_dim
        sketches = pages.bytes_per_token(self.key_dim) if self.spec.pages else 0
        return self.kv_heads * (bits / 8 + sketches) + self.beside


@dataclass(frozen=True)
class Traits:
    """What is special about a model's attention (`patches.Seams`).

    Attributes:
        arrays: why it reads its growing caches as arrays; "" when it doesn't.
        windows: why its sliding windows can't be compressed; "" when they can.
        latent: its growing caches hold a latent and a rotary part (MLA), not keys and values.
        lends: layers attend to keys and values that another layer's cache has taken.
        indexed: of a model with latents and an indexer, why one of so many caches of a layer stays native
            (`Seams.sparse`).
        unused: what it means when a layer leaves its cache empty.
        kind: the model's own class of caches that hold keys and values as the host's KVCache does; "" without one.
        beside: bytes per token that these hold of an indexer, by which the model chooses tokens; 0 without one.
    """

    arrays: str = ""
    windows: str = ""
    latent: bool = False
    lends: bool = False
    indexed: Callable[[int, int], str] | None = None
    unused: str = "the layer has no attention"
    kind: str = ""
    beside: float = 0.0


PLAIN = Traits()
