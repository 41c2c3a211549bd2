"""How byte-level BPE vocabularies cut text into words first, by the name in `tokenizer.ggml.pre`.

Each name stands for the regular expressions of the tokenizer.json that models of that name were trained with, applied
one after the other. A wrong one still makes valid tokens, only not those that the model knows, so that a name which is
not in the table is refused.
"""

from __future__ import annotations

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

from .header import GGUFError

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
DIGIT = r"\p{N}"
THREES = r"\p{N}{1,3}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
"""Words that change from capital to small letters at most once."""


def _tiktoken(digits: str) -> str:
    return rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"


def _cased(digits: str, ending: str = "") -> str:
    words = "|".join(word + ending for word in CASED)
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"


DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"
)

EXPRESSIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "dbrx", "smaug-bpe", "chatglm-bpe", "glm4"): (
        _tiktoken(THREES),
    ),
    ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open"): (_tiktoken(DIGIT),),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): (DIGIT, GPT2),
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "mellum", "gigachat", "a.x-4.0"): (GPT2,),
    ("tekken",): (_cased(DIGIT),),
    ("gpt-4o", "llama4", "kanana2"): (_cased(THREES, CONTRACTION + "?"),),
    ("deepseek-v3", "hunyuan-dense"): (THREES, r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK_WORDS),
    ("seed-coder",): (rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{DIGIT}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}",),
}
WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "glm4", "tekken"}
"""Vocabularies whose words are taken whole where they are tokens, whatever the merges say."""
OPENED = WHOLE_WORDS - {"glm4"}
"""Vocabularies that open every text with the first token unless the file says otherwise."""


def find(name: str | None, file: str) -> PreTokenizer:
    """The pre-tokenizer of a name. Raises GGUFError for none and for one that is not known."""
    if name is None:
        raise GGUFError(
            f"{file} does not name its pre-tokenizer (tokenizer.ggml.pre): an old converter made it; convert anew"
        )
    for names, expressions in EXPRESSIONS.items():
        if name in names:
            cuts = [Split(Regex(expression), "isolated") for expression in expressions]
            return Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])
    raise GGUFError(
        f"{file} needs the pre-tokenizer {name!r}, which opentq does not know: its tokens would be wrong; "
        "use the model's safetensors from Hugging Face"
    )
