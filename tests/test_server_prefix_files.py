"""Prefixes on disk are kept, counted and used, and no fault of their files reaches a request."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from opentq.errors import UserError
from opentq.server.prefix import PrefixStore
from opentq.server.prefix_files import NOTE, Identity, PrefixFiles, kept_chunk

BLOCK = 64


def opened(folder):
    return PrefixFiles(folder, Identity("m", "r", "off"), BLOCK, 1 << 30, 1 << 30, lambda: [KVCache()])


def kept(folder, tokens=range(200)):
    """A store with one prefix on disk, and the names of its blocks."""
    cache = KVCache()
    x = mx.arange(192 * 4, dtype=mx.float32).reshape(1, 1, 192, 4)
    cache.update_and_fetch(x, -x)
    files = opened(folder)
    names = PrefixStore(BLOCK, 1 << 30).names(list(tokens))
    files.save(names, list(tokens)[:192], [cache])
    if files.waiting:
        files.write_one()
    return files, names


def held(files, names):
    """What is given back for a prompt: None, or the number of tokens, after a look at the values."""
    found = files.find(names)
    caches = files.load(names[:found]) if found else None
    if caches is None:
        return None
    keys = caches[0].state[0][0, 0, : caches[0].offset, 0]
    assert keys.tolist() == [4.0 * i for i in range(caches[0].offset)]
    return caches[0].offset


def damage(path, kind):
    data = path.read_bytes()
    path.unlink()
    made = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "garbage": b"\xff\xfe\x00garbage",
        "a bit": data[:-20] + bytes([data[-20] ^ 4]) + data[-19:],
        "deep": b"[" * 100_000,
        "other types": (2).to_bytes(8, "little") + b"[]",
    }
    if kind == "a folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(made[kind])


KINDS = ["gone", "a folder", "empty", "cut", "garbage", "a bit", "deep", "other types"]


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_to_a_prefix_file_reaches_a_request(tmp_path, kind, started):
    """Neither to one that is known nor to one that is there at the start."""
    files, names = kept(tmp_path)
    assert held(files, names) == 192 and held(files, names[:2]) == 128
    damage(next(tmp_path.iterdir()), kind)
    for again in [files] * (not started) + [opened(tmp_path), opened(tmp_path)]:
        assert held(again, names) is None and again.nbytes == 0
    if kind != "a folder":
        assert not list(tmp_path.iterdir()), "nothing is left of what can't be used"
    kept(tmp_path)


def test_a_prefix_under_the_name_of_another_is_dropped(tmp_path):
    _, names = kept(tmp_path)
    (tmp_path / f"{names[-1]}.safetensors").rename(tmp_path / f"{'a' * 40}.safetensors")
    assert held(opened(tmp_path), names) is None and not list(tmp_path.iterdir())


def test_a_disk_that_takes_nothing_costs_nothing_else(tmp_path, monkeypatch, caplog):
    files, names = kept(tmp_path)

    def fail(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("utime", "replace", "unlink", "mkdir"):
        monkeypatch.setattr(os, name, fail)
    monkeypatch.setattr(Path, "unlink", fail)
    for _ in range(3):
        assert held(files, names) == 192
        files.save(names[:1], list(range(64)), [KVCache()])
        kept(tmp_path, range(1, 201))
    again = opened(tmp_path)
    assert held(again, names) == 192
    again.max_bytes = 0
    again._remove(next(iter(again.files.values())))
    assert again.nbytes == 0 and again.find(names) == 0
    assert sum("could not be noted" in r.message for r in caplog.records if r.levelname == "WARNING") == 2


def test_the_same_prefix_twice_is_one(tmp_path):
    files, names = kept(tmp_path)
    for _ in range(2):
        kept(tmp_path)
    files._add(files.files[names[-1]])
    files._remove(files.files[names[-1]])
    assert files.find(names) == 0 and files.nbytes == 0 and not files._by_name


@pytest.mark.parametrize("note", [b"\xff\xfe", b"0", "²".encode(), b"", b"17", b"-64", b"9" * 5000, b"64.0"])
def test_a_damaged_note_of_the_chunk_size_is_written_anew(tmp_path, note):
    (tmp_path / NOTE).write_bytes(note)
    assert kept_chunk(tmp_path, lambda: 128, None) == 128
    assert kept_chunk(tmp_path, lambda: 256, None) == 128


def test_a_full_disk_at_the_start(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert kept_chunk(tmp_path, lambda: 128, None) == 128
    files = opened(tmp_path)
    names = PrefixStore(BLOCK, 1 << 30).names(list(range(200)))
    cache = KVCache()
    cache.update_and_fetch(mx.zeros((1, 1, 192, 4)), mx.zeros((1, 1, 192, 4)))
    files.save(names, list(range(192)), [cache])
    files.write_one()
    assert files.find(names) == 0 and not files.waiting and not list(tmp_path.iterdir())
    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(UserError, match="No space left"):
        Identity("m", "r", "off").folder(tmp_path)
