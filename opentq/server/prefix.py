"""What was read is remembered: packed prefixes of prompts, found by content, kept within a byte budget.

A prompt is always read in the same chunks, whatever else is going on. So what a cache holds after a whole number of
chunks is a function of those tokens alone, and an answer on a remembered prefix equals a fresh one. Whole blocks of
`block` tokens are remembered, a chunk or several (and at least the 64 that are packed together). A block is named by
the hash of all tokens up to its end, and of the images among them; disk uses the same names.

A cache that can be trimmed serves all shorter prefixes of itself. One that can't (a sliding window, recurrent state)
serves only its full length, so such models also keep a snapshot where two prompts were seen to part.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..caches.single import OpenTQCache
from ..hosts.mlx_lm.public import KVCache

if TYPE_CHECKING:
    from .prefix_files import PrefixFiles

DIGEST = 20


def block_names(tokens: Sequence[int], block: int, marks: Sequence[tuple[int, bytes]] = ()) -> list[str]:
    """The names of the whole blocks of `tokens`: each the hash of all tokens up to the block's end, and of the images
    that begin there: `marks` has the place and the content of each.
    """
    ids = np.asarray(tokens, dtype="<u4")
    digest = hashlib.blake2b(f"{block}:".encode(), digest_size=DIGEST)
    found = []
    for end in range(block, len(ids) + 1, block):
        for place, content in marks:
            if end - block <= place < end:
                digest.update(b"\xff\xff\xff\xff" + f"{place}:{len(content)}:".encode() + content)  # no token's id
        digest.update(ids[end - block : end].tobytes())
        found.append(digest.hexdigest())
    return found


@dataclass(eq=False)
class MemoryPrefix:
    """One remembered prefix: the names of its blocks, and its caches."""

    names: tuple[str, ...]
    caches: list[Any]
    nbytes: int
    trimmable: bool


@dataclass(frozen=True)
class Hit:
    """What is known of a prompt: caches that hold its first `tokens`, and how far any known prompt agrees with it."""

    caches: list[Any] | None
    tokens: int
    shared: int


class PrefixStore:
    """Prefixes in memory, least recently used first out; `files`, if any, keeps them on disk as well."""

    def __init__(self, block: int, max_bytes: int, files: PrefixFiles | None = None):
        self.block = block
        self.max_bytes = max_bytes
        self.room = max_bytes  # what running requests leave of it
        self.files = files
        self.nbytes = 0
        self._entries: OrderedDict[MemoryPrefix, None] = OrderedDict()
        self._by_name: dict[str, list[MemoryPrefix]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def names(self, tokens: Sequence[int], marks: Sequence[tuple[int, bytes]] = ()) -> list[str]:
        """The names of the whole blocks of a prompt. The last token is never remembered: it makes the first answer."""
        return block_names(tokens[:-1], self.block, marks)

    def fetch(self, names: Sequence[str]) -> Hit:
        """The longest usable prefix. Its caches are a copy that shares memory until it is written to."""
        shared = 0
        while shared < len(names) and names[shared] in self._by_name:
            shared += 1
        best, length = None, 0
        for n in range(shared, 0, -1):
            usable = [e for e in self._by_name[names[n - 1]] if e.trimmable or len(e.names) == n]
            if usable:
                best, length = usable[-1], n
                break
        if self.files and (stored := self.files.find(names)) > length:
            caches = self.files.load(names[:stored])
            if caches is not None:
                self.insert(names[:stored], copy.deepcopy(caches))
                return Hit(caches, stored * self.block, max(shared, stored) * self.block)
        if best is None:
            return Hit(None, 0, shared * self.block)
        self._entries.move_to_end(best)
        caches = copy.deepcopy(best.caches)
        for c in caches if len(best.names) > length else ():
            c.trim((len(best.names) - length) * self.block)
        return Hit(caches, length * self.block, shared * self.block)

    def take(self, names: Sequence[str], own: bool) -> list[Any] | None:
        """Caches of exactly this prefix, to be gone on with and given back longer; None when they are not here.

        What is taken as one's own is no longer here, and so needs no copy; a prefix of something longer stays.
        """
        for entry in self._by_name.get(names[-1], ()):
            if own and len(entry.names) == len(names):
                self._drop(entry)
                return copy.deepcopy(entry.caches) if self.files else entry.caches  # files may yet have to write it
        hit = self.fetch(names)
        return hit.caches if hit.tokens == len(names) * self.block else None

    def knows(self, names: Sequence[str]) -> bool:
        """Whether a prefix is here whole."""
        return any(e.trimmable or len(e.names) == len(names) for e in self._by_name.get(names[-1], ()))

    def insert(self, names: Sequence[str], caches: list[Any]) -> None:
        """Remember caches that hold exactly the tokens of `names`. The store owns them from now on."""
        if not names or self._covered(names):
            return
        nbytes = sum(c.nbytes for c in caches)
        if nbytes > self.room:
            return
        entry = MemoryPrefix(tuple(names), caches, nbytes, exact_trim(caches))
        if entry.trimmable:
            for shorter in {e for name in names[:-1] for e in self._by_name.get(name, ()) if e.names[-1] == name}:
                self._drop(shorter)
        self._entries[entry] = None
        self.nbytes += nbytes
        for name in names:
            self._by_name.setdefault(name, []).append(entry)
        self.shrink(self.room)

    def remember(self, names: Sequence[str], tokens: Sequence[int], caches: list[Any]) -> None:
        """`insert`, and on the disk too: caches that hold the blocks `names` of the prompt `tokens`."""
        if self.files and names:
            self.files.save(names, tokens[: len(names) * self.block], caches)
        self.insert(names, caches)

    def give_way(self, room: int) -> None:
        """Keep within `room` bytes from now on: running requests may come to need the rest."""
        self.room = min(room, self.max_bytes)
        self.shrink(self.room)

    def shrink(self, nbytes: int) -> None:
        """Forget the least recently used until at most `nbytes` are held."""
        while self._entries and self.nbytes > nbytes:
            self._drop(next(iter(self._entries)))

    def _covered(self, names: Sequence[str]) -> bool:
        """Whether an entry already serves this prefix; it counts as used."""
        for entry in self._by_name.get(names[-1], ()):
            if entry.trimmable or len(entry.names) == len(names):
                self._entries.move_to_end(entry)
                return True
        return False

    def _drop(self, entry: MemoryPrefix) -> None:
        del self._entries[entry]
        self.nbytes -= entry.nbytes
        for name in entry.names:
            holders = self._by_name[name]
            holders.remove(entry)
            if not holders:
                del self._by_name[name]


def exact_trim(caches: Sequence[Any]) -> bool:
    """Whether trimming these caches to a chunk's end leaves them as they were at that point, bit for bit.

    Compressed caches that keep `recent` tokens in fp16 can be trimmed, but what they have packed since stays packed.
    """
    return all(
        type(c) is KVCache or (isinstance(c, OpenTQCache) and not c.window and not c.spec.recent) for c in caches
    )
