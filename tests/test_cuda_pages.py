"""Pages weighed by their keys on CUDA, every launch in the emulator."""

from __future__ import annotations

import mlx.core as mx
import pytest

from opentq.attention import pages as reference_pages
from opentq.codecs.affine import Affine
from opentq.codecs.qjl import QJL
from opentq.codecs.turbo import Turbo
from opentq.kernels.cuda import launch as cuda
from opentq.kernels.cuda import pages

from .cuda import emulator
from .test_kernels_cuda import packed_args

INT4 = Affine(4)


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Every launch goes to the emulator; the names of the kernels that ran."""
    ran: list[str] = []

    def compiled(source):
        def launch(inputs, outputs, scalars, blocks):
            ran.append(source.name)
            return emulator.run(source, blocks, list(inputs), list(outputs), scalars)[0]

        return launch

    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(cuda, "compiled", compiled)
    monkeypatch.setattr(pages, "THREADS", 64)
    monkeypatch.setattr(pages, "AT_ONCE", 2 * 2 * 320 * 64)  # so that heads are split over launches
    return ran


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("listed", [True, False])
def test_pages_are_weighed_by_keys(launches, listed, softcap):
    mx.random.seed(7)
    lens = [(410, 4, 4), (130, 4, 4), (0, 0, 9)]
    chosen = mx.array([[[0, 2, 4, 5, 6]] * 3, [[0, 1, 2, 0, 0]] * 3, [[0] * 5] * 3], dtype=mx.int32)
    args = packed_args(Turbo(5), INT4, (64, 64), (3, 4), 2, lens, 20, softcap=softcap, pages=chosen if listed else None)
    found, wanted = pages.weigh(args), reference_pages.weigh(args)
    there = wanted > -mx.inf
    assert found.shape == wanted.shape and mx.array_equal(there, found > -mx.inf)
    assert mx.abs(mx.where(there, found - wanted, 0)).max().item() < 4e-3  # scores up to 4 in fp16
    held = tuple(n for n, _, _ in args.picked_lens)
    lists = [top(found, held, 3)[:2].tolist() for top in (pages.top, reference_pages.top)]  # the third reads none
    assert lists[0] == lists[1]
    assert len(launches) == (5 if listed else 7) and launches[-1] == "opentq_pick_pages_64"  # 2 heads in 3, or 1


def test_sketched_keys_are_weighed_by_the_portable_path(launches):
    assert pages.weigh(packed_args(QJL(2), INT4, (64, 64), (1, 4), 1, [(130, 0, 0)], 9)) is None
