"""What a client asks for and what it gets, whichever API it speaks: the records between the routes and the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .clearing import ClearTools


@dataclass(frozen=True)
class Draw:
    """How a token is drawn from the model's probabilities. `seed` None takes a fresh one."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken; float32 can't tell temperatures below 1e-5 from 0."""
        return self.temperature < 1e-5


@dataclass(frozen=True)
class SamplingParams(Draw):
    """How the tokens of a request are chosen: what is done to the logits, and the draw."""

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context: int | None = None  # latest tokens that it looks at; None for all
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class GenerationRequest:
    """One request for tokens.

    Attributes:
        messages: chat messages in OpenAI's form with text contents (those of a user may have images, see `pictures`),
            or None for a bare prompt.
        prompt: text or token ids, when `messages` is None.
        prompts: all of several bare prompts, the first of them `prompt`.
        n: answers to each prompt.
        echo: whether an answer to a bare prompt begins with the prompt.
        max_tokens: most tokens to generate; None leaves it to the server.
        stop: texts that end the answer.
        logprobs: None for none, else how many alternatives to report per token (0: the chosen one alone).
        tools: OpenAI tool definitions that the model may call.
        tool_choice: "none", "auto" or "required".
        tool_names: those that may be called; empty for any.
        custom: names of tools whose one argument, `input`, is text for the client.
        parallel_calls: False ends the answer after the first tool call.
        schema: JSON Schema that the answer must fit, or None.
        template: extra variables for the chat template.
        continue_last: whether the answer goes on with the last message, the assistant's own, in place of a new one.
        clear: which old tool results to leave out of a long conversation.
    """

    model: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | tuple[int, ...] = ""
    prompts: tuple[str | tuple[int, ...], ...] = ()
    n: int = 1
    echo: bool = False
    max_tokens: int | None = None
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str = "auto"
    tool_names: frozenset[str] = frozenset()
    custom: frozenset[str] = frozenset()
    parallel_calls: bool = True
    schema: dict[str, Any] | None = None
    template: dict[str, Any] = field(default_factory=dict)
    continue_last: bool = False
    clear: ClearTools | None = None
    stream: bool = False
    include_usage: bool = False


@dataclass(frozen=True)
class ToolCall:
    """A tool call that the model made; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Delta:
    """A part of the answer: `kind` is content, reasoning or call."""

    kind: str
    text: str = ""
    call: ToolCall | None = None


@dataclass(frozen=True)
class Chosen:
    """A generated token with its log probability and the likeliest alternatives, as (text, logprob)."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens read (of which `cached` were not read again) and written; seconds that it took."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    queue_seconds: float = 0.0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0


@dataclass(frozen=True)
class Progress:
    """Prompt tokens read so far; sent after every chunk of the prompt."""

    done: int
    total: int


@dataclass(frozen=True)
class Generated:
    """What one or more generated tokens added: parts of the answer, and the tokens themselves when asked for."""

    deltas: tuple[Delta, ...]
    tokens: tuple[Chosen, ...] = ()
    choice: int = 0


@dataclass(frozen=True)
class Done:
    """The end of an answer: `reason` is stop, length or tool_calls; `matched` is the stop text that ended it.

    Where one request gets several answers, `choice` says which ends, and `last` whether it is the last to; `usage` is
    of all that have ended.
    """

    reason: str
    usage: Usage
    matched: str = ""
    choice: int = 0
    last: bool = True
