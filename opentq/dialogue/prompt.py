"""From messages to tokens: the chat template, and what the end of the prompt says about the answer's first words."""

from __future__ import annotations

import logging
import threading
from typing import Any

from jinja2 import TemplateError

from ..hosts.mlx_lm import tool_form
from .errors import ApiError, bad
from .request import GenerationRequest
from .roles import Roles
from .volatile import without

log = logging.getLogger("opentq.serve")


class Prompter:
    """Encodes prompts with one tokenizer. Called from worker threads; one prompt at a time."""

    def __init__(self, tokenizer: Any, vocab: int, template: dict[str, Any] | None = None, keep_volatile: bool = False):
        """`template`: variables for the chat template; `keep_volatile`: render the lines that `volatile` drops."""
        self.tokenizer = tokenizer
        self.vocab = vocab
        self.template = template or {}
        self.keep_volatile = keep_volatile
        self.roles = Roles(tokenizer, tool_form.lend(tokenizer))
        self._lock = threading.Lock()

    def encode(self, request: GenerationRequest) -> list[int]:
        """Token ids of the prompt. Raises ApiError when the model has no words for what is asked."""
        with self._lock:
            tokens = self._text(request) if request.messages is None else self._chat(request)
        if not tokens:
            raise bad("the prompt is empty: it has no tokens", "prompt" if request.messages is None else "messages")
        return tokens

    def initial_state(self, request: GenerationRequest, tokens: list[int]) -> str:
        """The state in which an answer begins: reasoning when the template itself opened the thought."""
        tokenizer = self.tokenizer
        if request.messages is None:
            return "normal"
        if tokenizer.response_initial_state:
            return tokenizer.response_initial_state
        if tokenizer.has_thinking and tokenizer.rfind_think_start(tokens) > tokenizer.rfind_think_end(tokens):
            return "reasoning"
        return "normal"

    def _text(self, request: GenerationRequest) -> list[int]:
        if isinstance(request.prompt, str):
            return list(self.tokenizer.encode(request.prompt))
        if wrong := next((t for t in request.prompt if t >= self.vocab), None):
            raise bad(f"prompt has the token id {wrong}, but the model's ids end at {self.vocab - 1}", "prompt")
        return list(request.prompt)

    def _chat(self, request: GenerationRequest) -> list[int]:
        tokenizer = self.tokenizer
        if not tokenizer.has_chat_template:
            raise bad("this model has no chat template; use /v1/completions with the bare prompt", "messages")
        messages = [dict(m) for m in request.messages or ()]
        if not self.keep_volatile:
            messages = without(messages)
        tokens = self._render(messages, request)
        if request.clear and request.clear.due(len(tokens), messages):
            tokens = self._render(request.clear.apply(messages), request)
        return tokens

    def _render(self, messages: list[dict[str, Any]], request: GenerationRequest) -> list[int]:
        variables = self.template | request.template
        messages, tools = self.roles.fit(messages, list(request.tools))
        try:
            return list(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools or None, add_generation_prompt=True, tokenize=True, **variables
                )
            )
        except TemplateError as error:
            # The template's own words, as raise_exception gives them, say which order of roles it wants.
            raise bad(f"the model's chat template refuses these messages: {error}", "messages") from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            log.warning("the chat template failed with %s", type(error).__name__)
            raise ApiError(400, "the model's chat template can't render these messages", "messages") from error


def check_choices(request: GenerationRequest, vocab: int) -> None:
    """Raise ApiError for sampling fields that name tokens the model does not have."""
    if wrong := next((t for t, _ in request.sampling.logit_bias if t >= vocab), None):
        raise bad(f"logit_bias has the token id {wrong}, but the model's ids end at {vocab - 1}", "logit_bias")
    if request.sampling.top_k >= vocab:
        raise bad(f"top_k must be below the vocabulary of {vocab}, not {request.sampling.top_k}", "top_k")
