"""The dial parses, prints, round-trips, and says which part of a bad spec is wrong."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opentq.codecs import GROUPS, REGISTRY
from opentq.spec.kv import KVSpec, SpecError
from opentq.spec.latent import latent_spec
from opentq.spec.text import AUTO, asked

names = st.sampled_from(sorted(REGISTRY))
value_names = st.sampled_from(sorted(name for name, method in REGISTRY.items() if not method.partner))
ends = st.tuples(st.integers(1, 99), value_names) | st.just((0, ""))
specs = st.builds(
    KVSpec,
    keys=names,
    values=value_names,
    group=st.sampled_from(GROUPS),
    rotate=st.booleans(),
    sink=st.integers(0, 9999),
    recent=st.integers(0, 9999),
    skip=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    window=st.sampled_from(["native", "compress"]),
    first=ends,
    last=ends,
    fit=st.sampled_from(["length", "norm", "unbiased"]),
    sketch=st.sampled_from(["", "orth", "gauss"]),
    out=st.integers(0, 8),
    center=st.booleans(),
).map(KVSpec.tidy)


@given(specs)
def test_every_spec_round_trips(spec):
    assert KVSpec.parse(str(spec)) == spec
    assert str(KVSpec.parse(str(spec))) == str(spec)


@given(st.text(max_size=30))
def test_any_text_parses_or_says_why_not(text):
    try:
        spec = KVSpec.parse(text)
    except SpecError as error:
        assert repr(text) in str(error) and "\n" not in str(error)
    else:
        assert KVSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text, expected",
    [
        ("int4", KVSpec()),
        ("INT4:G64", KVSpec(group=64)),
        ("k8v4", KVSpec("int8", "int4")),
        ("k8int4", KVSpec("int8", "int4")),
        ("int8/int4", KVSpec("int8", "int4")),
        ("int3:norot:sink=4:recent=128:skip=first1,last2", KVSpec("int3", "int3", 32, False, 4, 128, (1, 2))),
        ("int4:skip=last1", KVSpec(skip=(0, 1))),
        ("k8tq4", KVSpec("int8", "tq4")),
        ("tq3p:sketch=orth", KVSpec("tq3p", "tq3", sketch="orth")),
        ("qjl", KVSpec("qjl", "int4")),
        ("tq5/tq3:center", KVSpec("tq5", "tq3", center=True)),
        ("tq2.5:haar:ub", KVSpec("tq2.5", "tq2.5", haar=True, fit="unbiased")),
        ("int4:out=2:first20=qjl:last1=int8", KVSpec(first=(20, "qjl"), last=(1, "int8"), out=2)),
    ],
)
def test_spellings(text, expected):
    assert KVSpec.parse(text) == expected


@pytest.mark.parametrize(
    "text, part",
    [
        ("nonsense", "'nonsense'"),
        ("itn4", "did you mean 'int4'"),
        ("k9v4", "'int9'"),
        ("int4:g48", "'g48'"),
        ("int4:sink=x", "sink='x'"),
        ("int4:skip=middle1", "'middle1'"),
        ("int4:g32:g64", "group is given twice"),
        ("", "''"),
        ("tq7", "'tq7'"),
        ("int4/qjl", "can't hold values; use int4/int4"),
        ("tq3p/tq3p", "use tq3p/tq3"),
        ("f16:g64", "no option 'group'"),
        ("tq4:g64", "no option 'group'"),
        ("tq4:sketch=orth", "no option 'sketch'"),
        ("tq4:norot:haar", "exclude each other"),
        ("int4:out=9", "out='9'"),
        ("int4:first2=foo", "'foo'"),
    ],
)
def test_errors_name_the_part(text, part):
    with pytest.raises(SpecError, match="KV spec") as error:
        KVSpec.parse(text)
    assert part in str(error.value)


@pytest.mark.parametrize("text, bits", [("int4", 5.0), ("int4:g64", 4.5), ("int8:g64", 8.5), ("k8v4:g64", 6.5)])
def test_bits_count_the_metadata(text, bits):
    assert KVSpec.parse(text).bits_per_value(128) == bits


def test_int4_is_3_2_times_smaller_than_fp16():
    assert 16 / KVSpec.parse("int4").bits_per_value(128) == pytest.approx(3.2)


def test_skip_protects_the_ends():
    spec = KVSpec.parse("int4:skip=first1,last2")
    assert [spec.for_layer(i, 5).keys for i in range(5)] == ["f16", "int4", "int4", "f16", "f16"]


def test_the_ends_may_use_other_codecs():
    spec = KVSpec.parse("int4:g64:first2=tq4:last2=k8v4:skip=last1")
    assert [str(spec.for_layer(i, 6)) for i in range(6)] == ["tq4", "tq4", "int4:g64", "int4:g64", "k8v4:g64", "f16"]


def test_qjl_gives_the_first_layers_twice_the_bits():
    spec = KVSpec.parse("qjl")
    assert [spec.for_layer(i, 32).keys for i in (0, 14, 15, 31)] == ["qjl4", "qjl4", "qjl2", "qjl2"]


def test_mlx_lm_flags_are_aliases():
    assert asked(None, 8, 32) == KVSpec.parse("int8:g32")
    assert asked(None, 4, None) == KVSpec.parse("int4:g64")
    assert asked(None) == AUTO and asked("k8v4") == KVSpec.parse("k8v4")
    for bad in (("int4", 4, None), (None, None, 64), (None, 5, 64)):
        with pytest.raises(SpecError):
            asked(*bad)


def random_spec(rng: random.Random) -> KVSpec:
    """Any spec of the grammar: names of both sides, and each option with some chance where a codec takes it."""
    while True:
        keys, values = rng.choice(list(REGISTRY)), rng.choice([n for n in REGISTRY if not REGISTRY[n].partner])
        options = ["g64", "norot", "haar", "nc", "ub", "center", "out=2", "sketch=gauss", "sink=4", "recent=70"]
        options += ["skip=first1,last1", "first2=int8", "last1=tq4p/tq4", "window=compress"]
        text = ":".join([f"{keys}/{values}", *(o for o in options if rng.random() < 0.25)])
        try:
            return KVSpec.parse(text)
        except SpecError:
            continue


@pytest.mark.parametrize("seed", range(40))
def test_every_derived_spec_prints_what_parses(seed):
    """Specs made of specs (a layer's, a latent's, a window's) are written to files and read back."""
    spec = random_spec(random.Random(seed))
    layers = [spec.for_layer(i, 5) for i in range(5)]
    derived = [spec, *layers, *(latent_spec(s) for s in layers), *(replace(s, sink=0) for s in layers)]
    for made in derived:
        assert KVSpec.parse(str(made)) == made, (spec, made)


def test_an_option_that_one_codec_does_not_take_is_said_of_one():
    with pytest.raises(SpecError, match="f16 takes no option 'rot'"):
        KVSpec.parse("f16:norot")
    with pytest.raises(SpecError, match="int4 and int8 take no option 'haar'"):
        KVSpec.parse("k8v4:haar")
