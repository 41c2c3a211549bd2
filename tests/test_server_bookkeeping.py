"""What guards memory and remembered prefixes, beside plain models of it: no threads, no arrays, random histories."""

from __future__ import annotations

import random

import pytest

from opentq.server import prefix
from opentq.server.admission import FIRST_BUCKET, Admission, bucket
from opentq.server.prefix import Hit, PrefixStore, block_names

# ---- admission


def test_buckets():
    assert FIRST_BUCKET == 4096
    edges = [1, 4096, 4097, 16384, 16385, 65536, 65537, 262144, 262145]
    assert [bucket(n) for n in edges] == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def rectangle(tokens):
    """The bytes of these sequences, batch by batch, each as long as its longest."""
    groups = {}
    for t in tokens:
        groups.setdefault(bucket(t), []).append(t)
    return sum(len(g) * (7 * max(g) + 3) for g in groups.values())


@pytest.mark.parametrize("seed", range(12))
def test_admission_keeps_to_its_budget_slots_and_order(seed):
    rng = random.Random(seed)
    budget, slots, queue = 7 * rng.choice([6000, 30_000, 200_000]), rng.randint(1, 5), rng.randint(0, 3)
    admission = Admission(lambda n: 7 * n + 3, budget, slots, queue)
    sizes, running, waiting, seen = {}, [], [], set()
    for n in range(400):
        if rng.random() < 0.6:
            sizes[n] = rng.choice([1, 50, 4000, 4096, 4097, 9000, 16384, 16385])
            fits = len(running) < slots and rectangle([sizes[j] for j in [*running, n]]) <= budget
            expected = "run" if fits and not waiting else "wait" if len(waiting) < queue else "full"
            assert admission.offer(n, sizes[n]) == expected
            seen.add(expected)
            if expected != "full":
                (running if expected == "run" else waiting).append(n)
        elif running or waiting:
            over = rng.choice([*running, *waiting])
            (running if over in running else waiting).remove(over)
            started = []
            while waiting and len(running) < slots:
                if rectangle([sizes[j] for j in [*running, waiting[0]]]) > budget:
                    break
                started.append(waiting.pop(0))
                running.append(started[-1])
            assert admission.release(over) == started
        assert admission.running == {j: sizes[j] for j in running}
        assert list(admission.waiting) == [(j, sizes[j]) for j in waiting]
        assert admission.committed() == rectangle([sizes[j] for j in running]) <= budget
        assert admission.committed(50) == rectangle([*(sizes[j] for j in running), 50])
    assert "run" in seen and "full" in seen


def test_admission_to_the_byte():
    admission = Admission(lambda n: n, budget=100, slots=2, queue=1)
    assert admission.offer("a", 50) == "run" and admission.fits(50) and not admission.fits(51)
    assert admission.offer("b", 50) == "run" and not admission.fits(1)
    assert admission.largest(1000) == 100 and admission.largest(99) == 99 and admission.largest(100) == 100
    assert [Admission(lambda n: n, bytes, 1, 1).largest(9) for bytes in range(12)] == [*range(10), 9, 9]


# ---- prefixes

BLOCK = 4


class Kept:
    """A cache that knows which tokens it holds."""

    def __init__(self, tokens, trims):
        self.tokens, self.trims = list(tokens), trims

    @property
    def nbytes(self):
        return 10 * len(self.tokens)

    def trim(self, n):
        assert 0 < n < len(self.tokens)
        del self.tokens[len(self.tokens) - n :]


class Plain:
    """A store that is a list of (tokens, whether they can be cut, when they came), least recently used first."""

    def __init__(self, most):
        self.most, self.room, self.held, self.count = most, most, [], 0

    def serving(self, prompt):
        """Those that serve a prefix, in the order in which they came."""
        n = len(prompt)
        found = [h for h in self.held if h[0][:n] == tuple(prompt) and (h[1] or len(h[0]) == n)]
        return sorted(found, key=lambda h: h[2])

    def use(self, found):
        self.held.remove(found)
        self.held.append(found)

    def insert(self, tokens, trims):
        if found := self.serving(tokens):
            self.use(found[0])
        elif 10 * len(tokens) <= self.room:
            if trims:
                self.held = [h for h in self.held if h[0] != tokens[: len(h[0])]]
            self.count += 1
            self.held.append((tokens, trims, self.count))
            self.shrink(self.room)

    def shrink(self, most):
        while sum(10 * len(h[0]) for h in self.held) > most:
            self.held.pop(0)

    def longest(self, prompt):
        """How many first tokens of a prompt are held so that they can be used, and how many at all."""
        ends = range(BLOCK, len(prompt), BLOCK)
        usable = [n for n in ends if self.serving(prompt[:n])]
        shared = [n for n in ends if any(h[0][:n] == tuple(prompt[:n]) for h in self.held)]
        return max(usable, default=0), max(shared, default=0)


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(prefix, "exact_trim", lambda caches: all(c.trims for c in caches))
    return lambda most, files=None: PrefixStore(BLOCK, most, files)


def prompt_of(rng):
    """Prompts that part at all sorts of places."""
    tokens = []
    for _ in range(rng.randint(1, 6)):
        tokens += [rng.randint(0, 1)] * BLOCK
    if rng.random() < 0.5:
        tokens[rng.randrange(len(tokens))] = 7
    return tokens + [9] * rng.randint(0, BLOCK)


@pytest.mark.parametrize("seed", range(20))
def test_the_store_beside_a_plain_one(store, seed):
    rng = random.Random(seed)
    most = rng.choice([100, 400, 2000])
    mine, plain = store(most), Plain(most)
    hits = 0
    for _ in range(400):
        prompt = prompt_of(rng)
        names = mine.names(prompt)
        assert len(names) == (len(prompt) - 1) // BLOCK
        what = rng.random()
        if what < 0.5 and names:
            n, trims = rng.randint(1, len(names)), rng.random() < 0.6
            mine.insert(names[:n], [Kept(prompt[: n * BLOCK], trims)])
            plain.insert(tuple(prompt[: n * BLOCK]), trims)
        elif what < 0.9:
            hit = mine.fetch(names)
            usable, shared = plain.longest(prompt)
            assert (hit.tokens, hit.shared) == (usable, shared)
            if usable:
                hits += 1
                assert [c.tokens for c in hit.caches] == [prompt[:usable]]
                plain.use(plain.serving(prompt[:usable])[-1])
                hit.caches[0].tokens.clear()  # a copy: what is in the store does not change
            else:
                assert hit == Hit(None, 0, shared)
        elif what < 0.95:
            room = rng.choice([0, 80, 300, 10_000])
            mine.give_way(room)
            plain.room = min(room, most)
            plain.shrink(plain.room)
        else:
            part = names[: rng.randint(0, len(names))]
            if part:
                assert mine.knows(part) == bool(plain.serving(prompt[: len(part) * BLOCK]))
        assert [tuple(e.caches[0].tokens) for e in mine._entries] == [h[0] for h in plain.held]
        assert mine.nbytes == sum(10 * len(h[0]) for h in plain.held) <= plain.room and len(mine) == len(plain.held)
        assert set(mine._by_name) == {n for h in plain.held for n in block_names(h[0], BLOCK)}
    assert hits > 20


def test_names_are_of_all_tokens_before(store):
    tokens = list(range(100, 100 + 3 * BLOCK))
    names = block_names(tokens, BLOCK)
    assert len(names) == len(set(names)) == 3 and all(len(n) == 2 * prefix.DIGEST for n in names)
    assert block_names(tokens[: 2 * BLOCK], BLOCK) == names[:2] == block_names([*tokens, 1], BLOCK)[:2]
    other = [1, *tokens[1:]]
    assert not set(block_names(other, BLOCK)) & set(names)
    assert not set(block_names(tokens, 2)) & set(names), "blocks of another size are others"
    assert store(1).names(tokens) == names[:2], "the last token is read anew"
    assert block_names([1 << 31] * BLOCK, BLOCK) != block_names([0] * BLOCK, BLOCK)


def test_names_are_of_the_images_that_begin_before():
    """The same tokens stand for other images in other prompts: a name tells them apart from where they begin on."""
    tokens = [7] * (4 * BLOCK)
    plain = block_names(tokens, BLOCK)
    for place in (0, 1, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 3 * BLOCK):
        marked = block_names(tokens, BLOCK, [(place, b"cat")])
        first = place // BLOCK
        assert marked[:first] == plain[:first] and not set(marked[first:]) & set(plain)
        others = [[(place, b"dog")], [(place, b"cat"), (place, b"cat")], [(place + 1, b"cat")], [(place, b"")]]
        for marks in others:
            assert not set(block_names(tokens, BLOCK, marks)[first + 1 :]) & set(marked), marks
            assert len(set(block_names(tokens, BLOCK, marks)) | set(plain)) > len(plain)
    after = [(4 * BLOCK, b"cat")]
    assert block_names(tokens, BLOCK, after) == plain, "an image after the last whole block"
    # What stands in a mark can't be mistaken for two marks.
    one, two = [(0, b"a\xff\xff\xff\xff0:1:b")], [(0, b"a"), (0, b"b")]
    assert block_names(tokens, BLOCK, one) != block_names(tokens, BLOCK, two)


def test_names_stay_what_they_are():
    """Files on disk are found by them: by another name, what was read before an update would be read again."""
    first = "c40f38877773d15048a2f75aaeacd918b6871035"
    assert block_names(range(8), 4) == [first, "58adcc8d0d4ba7c728610fa59c135d249daa72bd"]
    assert block_names(range(8), 4, [(5, b"cat")]) == [first, "feb3d19ccd672047cd86a89a52c2ab0ead21ec6f"]


def test_what_is_taken_as_ones_own_is_gone(store):
    mine = store(1000)
    tokens = list(range(3 * BLOCK))
    names = block_names(tokens, BLOCK)
    cache = Kept(tokens, True)
    mine.insert(names, [cache])
    assert mine.take(names[:2], True)[0].tokens == tokens[: 2 * BLOCK] and len(mine) == 1
    assert mine.take(names, False)[0] is not cache and len(mine) == 1
    assert mine.take(names, True)[0] is cache and len(mine) == 0 and mine.nbytes == 0
    assert mine.take(names, True) is None
    mine.insert(names, [Kept(tokens, False)])
    assert mine.take(names[:2], True) is None and mine.take(names[:2], False) is None and len(mine) == 1
    other = tokens[: 2 * BLOCK] + [9] * BLOCK
    mine.insert(block_names(other, BLOCK), [Kept(other, False)])
    assert mine.take(block_names(other, BLOCK), True)[0].tokens == other, "not what begins as it does"


class FakeFiles:
    """What the disk holds: tokens by the name of their last block."""

    waiting = False

    def __init__(self):
        self.kept, self.broken, self.loads = {}, False, 0

    def find(self, names):
        return max((n for n in range(1, len(names) + 1) if names[n - 1] in self.kept), default=0)

    def load(self, names):
        self.loads += 1
        return None if self.broken else [Kept(self.kept[names[-1]], True)]

    def save(self, names, tokens, caches):
        assert len(tokens) == len(names) * BLOCK
        self.kept[names[-1]] = list(tokens)


def test_the_disk_serves_what_is_longer_there(store):
    files = FakeFiles()
    mine = store(1000, files)
    tokens = list(range(3 * BLOCK + 1))
    names = mine.names(tokens)
    mine.remember(names[:2], tokens, [Kept(tokens[: 2 * BLOCK], True)])
    mine.remember([], tokens, [])
    assert list(files.kept.values()) == [tokens[: 2 * BLOCK]] and len(mine) == 1
    assert mine.fetch(names).tokens == 2 * BLOCK and not files.loads, "memory has as much"
    empty = store(1000, FakeFiles())
    empty.files.kept[names[0]] = tokens[:BLOCK]
    assert empty.fetch(names).tokens == BLOCK
    files.kept[names[-1]] = tokens[: 3 * BLOCK]
    hit = mine.fetch(names)
    assert (hit.tokens, hit.shared, hit.caches[0].tokens) == (3 * BLOCK, 3 * BLOCK, tokens[: 3 * BLOCK])
    hit.caches[0].tokens.clear()
    files.kept.clear()
    hit = mine.fetch(names)
    assert (hit.tokens, hit.caches[0].tokens, len(mine)) == (3 * BLOCK, tokens[: 3 * BLOCK], 1)
    mine.shrink(0)
    files.kept[names[0]] = tokens[:BLOCK]
    files.broken = True
    assert mine.fetch(names) == Hit(None, 0, 0)
    taken = store(1000, files)
    taken.insert(names, [cache := Kept(tokens[: 3 * BLOCK], True)])
    assert taken.take(names, True)[0] is not cache, "the disk may yet have to write it"
