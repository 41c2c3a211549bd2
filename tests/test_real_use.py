"""What people met in real use: numbers that can't be, prompts and texts that are too long or no text, lost options."""

from __future__ import annotations

import importlib
import json
import math

import pytest
from mlx_lm.models import cache as caches

import opentq
from opentq.errors import UserError
from opentq.hosts.mlx_lm.generate import encode_prompt
from opentq.hosts.mlx_lm.tokens import SLICE, Encoder, TooLong
from opentq.memory.loaded import check_length

from .architectures import NAMES, build
from .test_habits import COMMANDS, needs, taking
from .tiny_model import write

# ---- numbers


def numbers():
    """(command, option, its limits) of every option that is a number; `--kv-bits` and its like are read by the spec."""
    for words, command in COMMANDS.items():
        for option in command.params:
            kind = getattr(option, "type_descriptor", None)
            if kind and kind.annotation in (int, float) and not option.opts[0].startswith("--kv-"):
                yield " ".join(words), option.opts[0], kind.annotation, kind.parameter_info


def test_every_number_has_a_least_value_and_every_float_is_finite():
    found = list(numbers())
    assert len(found) > 80
    for command, option, kind, limits in found:
        assert limits.min is not None, f"{command} {option}"
        if kind is float:
            for bad in (math.nan, math.inf):
                with pytest.raises(Exception, match="not a finite number"):
                    limits.callback(bad)


SAMPLING = [("--temp", "nan"), ("--temp", "-1"), ("--top-p", "2"), ("--min-p", "inf"), ("--top-k", "-1")]
SAMPLING += [("--seed", "-5"), ("-m", "-1"), ("--prefill-step-size", "0")]


@pytest.mark.parametrize("name", ["generate", "chat", "serve", "cache use"])
def test_generate_chat_and_serve_refuse_the_same_numbers(run, tmp_path, name):
    words = name.split() + ([str(tmp_path / "f.cache")] if name == "cache use" else needs(name, str(tmp_path / "gone")))
    for option, value in SAMPLING:
        if name in taking(option):
            code, _, err = run(*words, option, value)
            assert code == 2 and option in err and err.count("\n") == 1 and "gone" not in err, err


# ---- the system prompt


@pytest.mark.parametrize("name", ["generate", "cache build"])
def test_a_system_prompt_without_a_template_is_refused(run, folder, tmp_path, name):
    extra = ["hello"] if name == "generate" else [str(tmp_path / "f.cache"), "--text", "hello"]
    code, _, err = run(*name.split(), str(folder), *extra, "--system-prompt", "Be brief.", "--ignore-chat-template")
    assert code == 2 and "--system-prompt goes through the chat template" in err and err.count("\n") == 1


# ---- the context


class Counting:
    """A tokenizer that says how many characters it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.seen = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode(self, text, **options):
        self.seen += len(text)
        return self.tokenizer.encode(text, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model that was made for 512 tokens of a character each."""
    return write(tmp_path_factory.mktemp("small"), context=512, layers=1)


def test_generate_and_cache_build_refuse_a_prompt_beyond_the_context(run, small, tmp_path):
    long, file = tmp_path / "long.txt", tmp_path / "f.cache"
    long.write_text("x" * 600)
    for words in (["generate", str(small), "--prompt-file"], ["cache", "build", str(small), str(file), "--text-file"]):
        code, out, err = run(*words, str(long))
        assert code == 2 and "the context is 512 tokens" in err and "--max-context" in err and not out, err
        assert err.count("\n") == 1 and not file.exists()
    code, _, err = run("cache", "build", str(small), str(file), "--text-file", str(long), "--max-context", "700")
    assert code == 0, err
    code, _, err = run("cache", "use", str(file), "-p", "y", "-m", "1")
    assert code == 2 and "the context is 512 tokens" in err, "what was insisted on once must be again"
    code, _, err = run("cache", "use", str(file), "-p", "y", "-m", "1", "--max-context", "700")
    assert code == 0, err


def test_an_answer_ends_where_the_context_does(run, small):
    prompt = "x" * 480
    code, out, err = run("generate", str(small), prompt, "--ignore-chat-template", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["context"] <= 512, err
    code, _, err = run("generate", str(small), prompt, "--ignore-chat-template", "--max-context", "500")
    assert code == 2 and "--max-context 500" in err


def test_a_text_far_too_long_is_not_tokenized_whole(small):
    _, tokenizer = opentq.load(str(small))
    counting = Counting(tokenizer)
    with pytest.raises(UserError, match="1,000,000 characters"):
        encode_prompt(counting, "x" * 1_000_000, limit=512)
    assert counting.seen == 0
    with pytest.raises(TooLong, match="more than 70,000 tokens"):
        Encoder(counting).encode("x" * 10 * SLICE, 70_000)
    assert counting.seen <= 3 * SLICE


@pytest.mark.parametrize(
    "name", ["eval fidelity", "eval needle", "eval generate", "eval layers", "eval use", "calibrate"]
)
def test_nothing_is_measured_beyond_the_context(run, small, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    lengths = {"eval fidelity": "--depths", "eval needle": "--lengths"}
    code, out, err = run(*name.split(), str(small), lengths.get(name, "--context"), "2000")
    assert code == 2 and "the model was made for 512" in err and not out and err.count("\n") == 1, err


def test_a_model_that_says_nothing_of_its_context_is_measured_at_any(small):
    model, _ = opentq.load(str(small))
    model.context_length = 0
    check_length(model, 1 << 30)


# ---- folders


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "MODEL", "--port", "0", "--prompt-cache-dir", "PLACE"],
        ["bench", "report", "r.jsonl", "--export", "PLACE"],
        ["lab", "run", "dev/studies/seeds.toml", "--folder", "PLACE"],
    ],
    ids=lambda words: words[0],
)
def test_where_folders_are_made_is_checked_before_any_work(run, monkeypatch, folder, tmp_path, words):
    from opentq.server import launch

    monkeypatch.setattr(launch, "make_service", lambda _: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "x")
    code, _, err = run(*({"MODEL": str(folder), "PLACE": place}.get(word, word) for word in words))
    assert code == 2 and place in err and "can't be made" in err and err.count("\n") == 1, err


# ---- text


def test_evaluation_reads_no_bytes_that_are_no_text(run, folder, tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Größe ".encode("latin-1") * 100)
    for text in (latin, tmp_path):
        code, _, err = run("eval", "fidelity", str(folder), "--text", str(text))
        assert code == 2 and "latin.txt" in err and "not UTF-8" in err and err.count("\n") == 1, err


# ---- options of mlx-lm


OPEN = [name for name in NAMES if not hasattr(importlib.import_module(f"mlx_lm.models.{name}").Model, "make_cache")]


@pytest.mark.parametrize("name", OPEN)
def test_no_architecture_loses_the_bound_that_mlx_lm_was_asked_for(name):
    """Models that leave the making of caches to mlx-lm refuse a bound once compressed; the others never had one."""
    assert len(OPEN) >= 67
    model = build(name)
    assert all(isinstance(c, caches.RotatingKVCache) for c in caches.make_prompt_cache(model, max_kv_size=64))
    opentq.compress(model, "int4", self_test=False)
    with pytest.raises(ValueError, match="max_kv_size=64 can't be used"):
        caches.make_prompt_cache(model, max_kv_size=64)
