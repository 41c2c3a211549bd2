"""The parts of `opentq serve` that need no model: requests, outputs, admission and the store of prefixes."""

from __future__ import annotations

import json
import random

import pytest

from opentq.dialogue.errors import ApiError
from opentq.dialogue.output import Parser, StopText
from opentq.dialogue.roles import Roles
from opentq.server import anthropic, schema
from opentq.server import openai as wire
from opentq.server.admission import Admission, bucket
from opentq.server.pace import Pace
from opentq.server.prefix import PrefixStore

from .server_support import HI, TOOL


def test_requests_are_read():
    ask = wire.read_chat(
        {
            "model": "m",
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
                {"role": "tool", "tool_call_id": "1", "content": "2"},
            ],
            "stop": "END",
            "max_completion_tokens": 5.0,
            "max_tokens": 9,
            "logprobs": True,
            "top_logprobs": 2,
            "seed": -1,
            "unheard_of": 1,
        }
    )  # fmt: skip
    assert [m["role"] for m in ask.messages] == ["system", "user", "assistant", "tool"]
    assert ask.messages[1]["content"] == "ab" and ask.messages[2]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert (ask.max_tokens, ask.stop, ask.logprobs, ask.sampling.seed) == (5, ("END",), 2, 2**64 - 1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
         "messages[0].content[0].image_url"),
        ({"messages": HI, "temperature": "hot"}, "temperature"),
        ({"messages": HI, "temperature": 3}, "temperature"),
        ({"messages": HI, "max_tokens": 0}, "max_tokens"),
        ({"messages": HI, "max_tokens": True}, "max_tokens"),
        ({"messages": HI, "n": 9}, "n"),
        ({"messages": HI, "best_of": 2}, "best_of"),
        ({"messages": HI, "audio": {}}, "audio"),
        ({"messages": HI, "modalities": ["audio"]}, "modalities"),
        ({"messages": HI, "prediction": {"type": "content"}}, "prediction"),
        ({"messages": HI, "functions": [{}]}, "functions"),
        ({"messages": HI, "tools": [{"type": "function"}]}, "tools[0].function"),
        ({"messages": HI, "tools": [{"type": "custom"}]}, "tools[0].custom"),
        ({"messages": HI, "web_search_options": {"search_context_size": "low"}}, "web_search_options"),
        ({"messages": HI, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": HI, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HI, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
         "tool_choice"),
        ({"messages": HI, "logit_bias": {"x": 1}}, "logit_bias"),
        ({"messages": HI, "logit_bias": {"1": 1000}}, "logit_bias.1"),
        ({"messages": HI, "response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": HI, "response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"messages": HI, "chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"messages": HI, "stop": [1]}, "stop[0]"),
        ({"messages": HI, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": 1e999}}}]},
         "tools[0].function.parameters"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1e999]"}}]}]},
         "messages[0].tool_calls[0].function.arguments"),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused_by_name(body, param):
    with pytest.raises(ApiError) as caught:
        wire.read_chat(body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_idle_values_of_unsupported_fields_pass():
    idle = {name: values[0] for name, values in wire.IDLE.items() if values}
    wire.read_chat({"messages": HI, **idle, **dict.fromkeys(wire.IDLE)} | idle)


def test_malformed_bodies_never_escape_the_parser():
    """5,000 damaged bodies: read or refused with a 4xx, nothing else."""
    rng = random.Random(1)
    good = json.dumps({"messages": HI, "stop": ["a"], "tools": [TOOL], "seed": 1, "logit_bias": {"3": 1}}).encode()
    refused = 0
    for _ in range(5000):
        body = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(body) or 1)
            what = rng.randrange(4)
            if not body:
                break
            if what == 0:
                body[at] = rng.randrange(256)
            elif what == 1:
                del body[at : at + rng.randrange(9)]
            elif what == 2:
                body[at:at] = rng.choice([b"null", b"[", b"{}", b"1e999", b"NaN", b'"\\ud800"', b"\xff", b"[" * 3000])
            else:
                body = body[: max(at, 1)]
        for read in (wire.read_chat, wire.read_completion, anthropic.read):
            try:
                read(schema.parse(bytes(body)))
            except ApiError as error:
                assert 400 <= error.status < 500 and error.body()["error"]["message"]
                refused += 1
    assert refused > 12000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"nul",
        b'"x"',
        b"[" * 100_000,
        b'{"a": NaN}',
        b'{"a": "\\ud83d"}',
        b"\xff\xfe",
    ],
)
def test_bodies_that_are_no_objects(body):
    with pytest.raises(ApiError, match="body"):
        schema.parse(body)


def test_stop_text_is_found_however_it_is_cut():
    text, rng = "one two END three", random.Random(3)
    for _ in range(200):
        stop, out, at = StopText(("END", "three", "wo E")), "", 0
        while at < len(text) and not stop.matched:
            n = rng.randint(1, 5)
            out += stop.feed(text[at : at + n])
            at += n
        assert (out, stop.matched) == ("one t", "wo E")
    stop = StopText(("abc",))
    assert stop.feed("xab") == "x" and stop.feed("d") == "abd" and stop.flush() == ""


@pytest.fixture(scope="module")
def tokenizer(folder):
    from mlx_lm.tokenizer_utils import load

    return load(folder)


def parse_text(tokenizer, text, **options):
    parser = Parser(tokenizer, tools=(TOOL,), **options)
    pieces = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        pieces += [] if parser.stopped else parser.token(token)
    return parser, pieces + parser.finish()


def joined(pieces):
    text = {"content": "", "reasoning": ""}
    for p in pieces:
        if not p.call:
            text[p.kind] += p.text
    return text["content"], text["reasoning"], [(p.call.name, json.loads(p.call.arguments)) for p in pieces if p.call]


def test_output_is_text_reasoning_and_calls(tokenizer):
    call = '<tool_call>{"name": "look_up", "arguments": {"word": "sun"}}</tool_call>'
    _, pieces = parse_text(tokenizer, f"<think>hm</think>Äh {call} and {call}!")
    assert joined(pieces) == ("Äh  and !", "hm", [("look_up", {"word": "sun"})] * 2)
    _, pieces = parse_text(tokenizer, "so it is</think>Yes", initial="reasoning")
    assert joined(pieces) == ("Yes", "so it is", [])
    parser, pieces = parse_text(tokenizer, f"a{call}b{call}", parallel_calls=False)
    assert parser.stopped and joined(pieces) == ("a", "", [("look_up", {"word": "sun"})])


@pytest.mark.parametrize(
    "markup", ["<tool_call>{broken</tool_call>", '<tool_call>{"name": "look_up"', "<tool_call>[1]</tool_call>"]
)
def test_markup_that_does_not_parse_is_content(tokenizer, markup):
    _, pieces = parse_text(tokenizer, f"x{markup}")
    assert joined(pieces) == (f"x{markup}", "", [])


SUN = '<tool_call>{"name": "look_up", "arguments": {"word": "sun"}}</tool_call>'
AIR = SUN.replace("sun", "air")


def test_a_call_inside_a_thought_leaves_the_thought_open(tokenizer):
    """The thought goes on behind the call, whose end is not the thought's, and its own end marker is no content."""
    found = [("look_up", {"word": "sun"}), ("look_up", {"word": "air"})]
    _, pieces = parse_text(tokenizer, f"<think>a{SUN}b{AIR}c</think>Yes")
    assert joined(pieces) == ("Yes", "abc", found)
    _, pieces = parse_text(tokenizer, f"a{SUN}b", initial="reasoning")
    assert joined(pieces) == ("", "ab", found[:1])
    _, pieces = parse_text(tokenizer, f"<think>a</think>b{SUN}c")
    assert joined(pieces) == ("bc", "a", found[:1])


MARKER = "</tool_call>"


@pytest.mark.parametrize(
    "word", [f"a {MARKER} b", MARKER, f"{MARKER}{MARKER}", f'\\"{MARKER}\n<think>', f"<tool_call>{MARKER}"]
)
def test_a_call_whose_argument_holds_the_end_marker(tokenizer, word):
    call = f"<tool_call>{json.dumps({'name': 'look_up', 'arguments': {'word': word}})}{MARKER}"
    _, pieces = parse_text(tokenizer, f"x{call}y{SUN}")
    assert joined(pieces) == ("xy", "", [("look_up", {"word": word}), ("look_up", {"word": "sun"})])


def test_a_call_in_tags_whose_argument_holds_the_end_marker(tokenizer, monkeypatch):
    from mlx_lm.tool_parsers import qwen3_coder

    monkeypatch.setattr(tokenizer, "_tool_parser", qwen3_coder.parse_tool_call)
    call = f"<tool_call>\n<function=look_up>\n<parameter=word>\na {MARKER} b\n</parameter>\n</function>\n{MARKER}"
    _, pieces = parse_text(tokenizer, f"x{call}y")
    assert joined(pieces) == ("xy", "", [("look_up", {"word": f"a {MARKER} b"})])


def test_a_call_cut_inside_an_argument_hides_nothing_behind_it(tokenizer):
    """It seems to go on after its end marker and never ends: it is content, and the next call is a call."""
    cut = '<tool_call>{"name": "look_up", "arguments": {"word": "su</tool_call>'
    _, pieces = parse_text(tokenizer, f"x{cut}y{SUN}z")
    assert joined(pieces) == (f"x{cut}yz", "", [("look_up", {"word": "sun"})])
    _, pieces = parse_text(tokenizer, f"<think>x{cut}y</think>z")
    assert joined(pieces) == (f"{cut}z", "xy", [])


SILENT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% endfor %}{# <tool_call> #}"


def test_calls_in_the_history_are_never_dropped(tokenizer, monkeypatch):
    """A template that takes calls and shows none of them gets them as text; one that shows them is left alone."""
    turns = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "", "tool_calls": [json.loads(CALLED)]},
        {"role": "tool", "tool_call_id": "call_0", "content": "a star"},
    ]
    roles = Roles(tokenizer)
    assert roles.calls and roles.fit(turns, [])[0] == turns
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", SILENT)
    roles = Roles(tokenizer)
    assert not roles.calls
    text = tokenizer.apply_chat_template(roles.fit(turns, [])[0], tokenize=False)
    assert '{"name": "look_up", "arguments": {"word": "sun"}}' in text and "a star" in text


CALLED = '{"id": "call_0", "type": "function", "function": {"name": "look_up", "arguments": {"word": "sun"}}}'


def test_half_a_character_before_a_special_token(tokenizer):
    parser = Parser(tokenizer)
    half = tokenizer.encode("é", add_special_tokens=False)[0]
    pieces = parser.token(half) + parser.token(tokenizer.convert_tokens_to_ids("<|user|>")) + parser.finish()
    assert "�" in joined(pieces)[0]


def test_admission_prices_the_rectangle():
    admission = Admission(price=lambda n: n, budget=10_000, slots=8, queue=2)
    assert [bucket(n) for n in (1, 4096, 4097, 16384, 16385)] == [0, 0, 1, 1, 2]
    assert admission.offer("a", 3000) == "run" and admission.offer("b", 100) == "run"
    assert admission.committed() == 6000
    assert admission.offer("c", 4000) == "wait"  # 3 * 4000
    assert admission.offer("d", 10) == "wait"  # would fit, but nobody overtakes
    assert admission.offer("e", 10) == "full"
    assert admission.release("b") == ["c"] and admission.committed() == 8000
    assert admission.release("d") == [] and not admission.waiting
    assert admission.release("c") == [] and admission.offer("f", 9000) == "wait"
    assert admission.release("a") == ["f"]
    assert admission.largest(20_000) == 10_000


class FakeCache:
    """Bytes in place of keys and values."""

    def __init__(self, nbytes):
        self.nbytes = nbytes


def test_prefixes_are_dropped_least_recently_used_first():
    store = PrefixStore(block=4, max_bytes=100)
    prompts = [list(range(n, n + 9)) for n in (0, 100, 200)]
    names = [store.names(p) for p in prompts]
    assert all(len(n) == 2 for n in names) and len(store.names(range(8))) == 1
    store.insert(names[0], [FakeCache(40)])
    store.insert(names[1], [FakeCache(40)])
    assert store.fetch(names[0]).tokens == 8
    store.insert(names[2], [FakeCache(40)])
    assert store.nbytes == 80 and store.fetch(names[1]).tokens == 0 and store.fetch(names[0]).tokens == 8
    store.insert(names[1], [FakeCache(101)])
    assert store.fetch(names[1]).tokens == 0
    store.give_way(30)
    store.insert(names[1], [FakeCache(40)])
    assert store.nbytes == 0 and not store._by_name
    store.give_way(1000)
    # A cache that can't be trimmed serves its whole length only, but says how far prompts agree.
    store.insert(names[0], [FakeCache(1)])
    hit = store.fetch(store.names([*prompts[0][:6], 77, 78, 79]))
    assert (hit.tokens, hit.shared) == (0, 4)


def test_reading_keeps_to_its_share_of_time():
    """Whatever a piece takes, answers wait for reading twice their own time at most, and mostly not at all."""
    for piece in (1.5, 3.0, 11.0):
        pace, gaps, gap = Pace(), [], 0.0
        for _ in range(20):
            pace.decoded(1.0)
        for _ in range(600):
            gap += 1.0
            pace.decoded(1.0)
            gaps.append(gap)
            gap = 0.0
            if not pace.debt:
                pace.read(piece, running=True)
                gap = piece
        assert sum(gaps) / len(gaps) <= 3.0 and sorted(gaps)[300] <= 3.0 and max(gaps) == 1.0 + piece
        pace.read(piece, running=False)
        assert pace.debt == 0


def test_a_step_that_the_machine_held_up_allows_no_more_reading():
    pace = Pace()
    for seconds in (1.0, 1.0, 1.0, 90.0):
        pace.decoded(seconds)
    assert 1.0 < pace.idle < 1.2
    for _ in range(60):
        pace.decoded(8.0)  # more answers now: that is no accident
    assert pace.idle > 7.0
    pace.owe(5.0, running=True)
    assert pace.debt == 5.0 and pace.chunk == 0.0
