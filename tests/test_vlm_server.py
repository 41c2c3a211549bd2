"""Images in the server: what they do to prompts, what is remembered of them, and what is refused."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("mlx_vlm")

import mlx.core as mx
import mlx_vlm
from mlx_vlm.prompt_utils import apply_chat_template
from PIL import Image

from opentq.dialogue import pictures
from opentq.dialogue.request import GenerationRequest
from opentq.hosts.mlx_vlm import images
from opentq.server import anthropic, responses
from opentq.spec.kv import KVSpec

from . import vlm_tiny
from .server_support import Running, content, serving, wait_for
from .vlm_tiny import SOURCE

TEXT = "What is the hour of the ship? " * 6


def png(colour=(200, 30, 40), size=(112, 84)) -> str:
    """A picture as base64."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def shown(*pictures: str, text: str = TEXT) -> list[dict]:
    """A question about pictures."""
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{p}"}} for p in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


RED, BLUE = png(), png((0, 90, 200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return vlm_tiny.folder(tmp_path_factory.mktemp("vlm") / "tiny")


@pytest.fixture(scope="module")
def server(folder):
    running = Running(folder, names=("tiny",))
    yield running
    running.stop()


def ask(server, messages, **body):
    return server.openai.chat.completions.create(
        model="tiny", messages=messages, **{"max_tokens": 6, "temperature": 0, **body}
    )


def cached(answer) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens


def test_an_image_is_read_once(server):
    first, second = ask(server, shown(RED)), ask(server, shown(RED))
    assert cached(first) == 0 and cached(second) > 0
    assert first.choices[0].message.content == second.choices[0].message.content
    text = ask(server, [{"role": "user", "content": TEXT}])
    assert first.usage.prompt_tokens > text.usage.prompt_tokens + 12, "an image of 8 x 6 patches is 12 tokens"
    wait_for(server.quiet)


def test_an_image_that_looks_the_same_to_the_tokenizer_shares_nothing(server):
    """Two pictures of one size have the same tokens; what follows them is never taken from the other's."""
    before = [
        {"role": "user", "content": "Ships pass by day and night. " * 20},
        {"role": "assistant", "content": "Yes."},
    ]
    red, blue, again = (ask(server, [*before, *shown(p)], logprobs=True, top_logprobs=4) for p in (RED, BLUE, BLUE))
    assert red.usage.prompt_tokens == blue.usage.prompt_tokens
    text = server.service.prompter.encode(GenerationRequest(messages=tuple(before))).tokens
    assert 64 <= cached(blue) <= len(text) < cached(again)
    fresh = ask(server, [*before, *shown(BLUE, text=TEXT)], logprobs=True, top_logprobs=4)
    assert probabilities(blue) == probabilities(again) == probabilities(fresh) != probabilities(red)
    two, other = (ask(server, shown(*p)) for p in ((RED, BLUE), (BLUE, RED)))
    assert two.usage.prompt_tokens == other.usage.prompt_tokens and cached(other) < 64


def probabilities(answer):
    return [[(t.token, t.logprob) for t in token.top_logprobs] for token in answer.choices[0].logprobs.content]


@pytest.mark.parametrize("kv, tolerance", [("off", 1e-4), ("f16", 0.03)])
def test_answers_are_those_of_mlx_vlm(folder, kv, tolerance):
    """Images over the edges of chunks, in several messages; and the next turn on what is remembered."""
    large = [Image.effect_noise((336, 224), 90).convert("RGB") for _ in range(3)]
    model, processor = mlx_vlm.load(str(folder))
    files = []
    for image in large:
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(base64.b64encode(file.getvalue()).decode())
    turns = shown(*files[:2])
    with serving(folder, names=("tiny",), kv=None if kv == "off" else KVSpec(kv)) as fresh:
        for images, more in ((large[:2], []), (large, shown(files[2], text="And this?"))):
            turns += more
            parts = [m | {"content": plain(m["content"])} for m in turns]
            prompt = apply_chat_template(processor, model.config, parts)
            steps = mlx_vlm.stream_generate(model, processor, prompt, image=images, max_tokens=6, temperature=0)
            want = [float(mx.max(step.logprobs)) for step in steps][:6]
            got = ask(fresh, turns, logprobs=True)
            assert [t.logprob for t in got.choices[0].logprobs.content] == pytest.approx(want, abs=tolerance)
            turns.append({"role": "assistant", "content": got.choices[0].message.content})
        assert cached(got) >= 128


def plain(content):
    return [{"type": "image"} if p["type"] == "image_url" else p for p in content] if type(content) is list else content


def test_prompts_with_and_without_images_share_a_batch(server):
    """Every row's positions are its own: three answers at once are what they are alone."""
    asks = [shown(RED), [{"role": "user", "content": "How many?"}], shown(BLUE, RED, text="Two?")]
    alone = [ask(server, a, max_tokens=24).choices[0].message.content for a in asks]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda a: ask(server, a, max_tokens=24).choices[0].message.content, asks)) == alone
    both = ask(server, shown(RED), max_tokens=24, n=2)
    assert [c.message.content for c in both.choices] == alone[:1] * 2


def test_anthropics_image_blocks(server):
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": RED}}
    question = {"role": "user", "content": [image, {"type": "text", "text": TEXT}]}
    said = server.post("/v1/messages", model="tiny", max_tokens=6, messages=[question]).json()
    assert said["content"][0]["text"] == ask(server, shown(RED)).choices[0].message.content
    counted = server.post("/v1/messages/count_tokens", model="tiny", messages=[question]).json()
    assert counted["input_tokens"] == said["usage"]["input_tokens"] + said["usage"]["cache_read_input_tokens"]
    shot = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "seen:"}, image]}
    asked = anthropic.read({"max_tokens": 6, "messages": [{"role": "user", "content": [shot, question["content"][1]]}]})
    tool, user = asked.messages
    assert tool["content"] == "seen:" and [p["type"] for p in user["content"]] == ["image", "text"]


def test_images_of_the_responses_api(server):
    url = f"data:image/png;base64,{RED}"
    question = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": TEXT}]
    said = server.openai.responses.create(
        model="tiny", input=[{"role": "user", "content": question}], max_output_tokens=6, temperature=0
    )
    assert said.output_text == ask(server, shown(RED)).choices[0].message.content
    calls = [{"type": "function_call", "name": "look", "arguments": "{}", "call_id": str(i)} for i in range(2)]
    results = [{"type": "function_call_output", "call_id": str(i), "output": question} for i in range(2)]
    messages = responses.read({"input": [*calls, *results]}, []).request.messages
    assert [m["role"] for m in messages] == ["assistant", "tool", "tool", "user"]
    assert messages[1]["content"] == TEXT and [p["type"] for p in messages[3]["content"]] == ["image"] * 2


@pytest.mark.parametrize(
    "url, words",
    [
        ("https://example.com/a.png", "nothing is fetched"),
        ("file:///etc/passwd", "nothing is fetched"),
        ("data:image/png,abc", "must be a data URL in base64"),
        ("data:image/png;base64,####", "is not base64"),
        ("data:image/png;base64,aGVsbG8=", "not an image of a known type"),
        (f"data:image/png;base64,{RED[:120]}", "is broken"),
    ],
)
def test_what_is_no_image_is_refused_in_a_line(server, url, words):
    refused(server, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}], words)


def refused(server, messages, words):
    response = server.post(messages=messages)
    said = response.json()["error"]
    assert response.status_code == 400 and words in said["message"] and "\n" not in said["message"], said
    assert said["param"].startswith("messages")


def test_limits_of_images(server, monkeypatch):
    monkeypatch.setattr(images, "PIXELS", 1000)
    refused(server, shown(RED), "112 x 84 pixels, more than 1,000")
    monkeypatch.setattr(images, "PIXELS", 112 * 84 + 10)
    refused(server, shown(RED, BLUE), "more than the 10 that the images before it leave")
    monkeypatch.setattr(images, "BYTES", 100)
    refused(server, shown(RED), "MB, more than")
    refused(server, shown(*[RED] * (pictures.MOST + 1)), f"{pictures.MOST} at most")
    refused(server, [{"role": "assistant", "content": shown(RED)[0]["content"]}], "images of the user's")


def test_images_that_wait_are_bounded(server, monkeypatch):
    monkeypatch.setattr(server.service, "images_bytes", 1000)
    response = server.post(messages=shown(RED))
    assert response.status_code == 503 and "no room for more images" in response.json()["error"]["message"]


def test_an_image_for_a_text_model_is_refused():
    with serving(SOURCE) as text:
        refused(text, shown(RED), "takes text only")
        assert content(text.chat("hi"))
