"""The tokenizer of a GGUF file, written as the files that mlx-lm and transformers read.

Two kinds exist among language models: byte-level BPE with its merges (`gpt2`), and SentencePiece's BPE (`llama`), whose
merges follow from the scores of its pieces.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from . import pretokenizers
from .header import GGUFError, Header

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""Token types of the format."""
SPACE = "\u2581"
ENDS = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|eot|>",
    "<EOT>",
    "<eos>",
}
"""Control tokens that end an answer: files often name only one of a model's."""


def write(header: Header, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. Raises GGUFError for a kind that is not known here."""
    kind = _entry(header, "model")
    if not _entry(header, "tokens"):
        raise GGUFError(f"{header.path.name} has no tokenizer in it; take one that llama.cpp can run")
    if kind not in ("gpt2", "llama"):
        raise GGUFError(
            f"{header.path.name} has a tokenizer of kind {kind!r}; gpt2 (byte-level BPE) and llama (SentencePiece BPE) "
            "can be read from GGUF: use the model's safetensors from Hugging Face"
        )
    tokenizer = _byte_level(header) if kind == "gpt2" else _sentencepiece(header)
    for token, number in _typed(header):
        if number in (CONTROL, USER_DEFINED):
            added = AddedToken(token, special=number == CONTROL, normalized=False)
            (tokenizer.add_special_tokens if number == CONTROL else tokenizer.add_tokens)([added])
    _frame(tokenizer, header, kind)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{role}_token": _token(header, key) for role, key in ROLES.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": header.get("context_length"),
        "chat_template": header.metadata.get("tokenizer.chat_template"),
        **named,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def eos_ids(header: Header) -> list[int]:
    """All tokens that end an answer."""
    named = [_entry(header, f"{key}_token_id") for key in ("eos", "eot", "eom")]
    tokens = [i for i, (token, number) in enumerate(_typed(header)) if number == CONTROL and token in ENDS]
    return sorted({*tokens, *(i for i in named if i is not None)})


ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _entry(header: Header, key: str, default: Any = None) -> Any:
    return header.metadata.get(f"tokenizer.ggml.{key}", default)


def _typed(header: Header) -> list[tuple[str, int]]:
    tokens = _entry(header, "tokens")
    return list(zip(tokens, _entry(header, "token_type") or [1] * len(tokens)))


def _token(header: Header, role: str) -> str | None:
    number, tokens = _entry(header, f"{role}_token_id"), _entry(header, "tokens")
    return tokens[number] if number is not None and number < len(tokens) else None


def _vocabulary(header: Header) -> dict[str, int]:
    return {token: i for i, token in enumerate(_entry(header, "tokens"))}


def _byte_level(header: Header) -> Tokenizer:
    name = _entry(header, "pre")
    cutter = pretokenizers.find(name, header.path.name)
    merges = [tuple(merge.split(" ", 1)) for merge in _entry(header, "merges") or []]
    model = BPE(_vocabulary(header), merges, ignore_merges=name in pretokenizers.WHOLE_WORDS)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = cutter
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(header: Header) -> Tokenizer:
    vocabulary, types = _vocabulary(header), _typed(header)
    scores = _entry(header, "scores")
    if not scores:
        raise GGUFError(f"{header.path.name} has a SentencePiece vocabulary without scores; convert the model again")
    unknown = next((token for token, number in types if number == UNKNOWN), None)
    model = BPE(vocabulary, _merges(vocabulary, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = _entry(header, "add_space_prefix", True)
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, *ends])
    return tokenizer


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others; the piece with the highest score is made first."""
    ways = []
    for piece, number in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ways.append((-scores[number], number, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(ways)]


def _frame(tokenizer: Tokenizer, header: Header, kind: str) -> None:
    """The tokens that open and close every text, where the file wants them."""
    opened = kind == "llama" or _entry(header, "pre") in pretokenizers.OPENED
    frame = {
        "bos": _entry(header, "add_bos_token", opened),
        "eos": _entry(header, "add_eos_token", False),
    }
    tokens = {role: _token(header, role) for role, wanted in frame.items() if wanted}
    special = [(token, _entry(header, f"{role}_token_id")) for role, token in tokens.items() if token]
    if special:
        sides = [tokens.get("bos"), "{}", tokens.get("eos")]
        single, second = (" ".join(s.format(text) for s in sides if s) for text in ("$A", "$B"))
        tokenizer.post_processor = TemplateProcessing(single=single, pair=f"{single} {second}", special_tokens=special)
