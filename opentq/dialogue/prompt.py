"""From messages to tokens: the chat template, and what the end of the prompt says about the answer's first words."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ..errors import UserError
from ..hosts.mlx_lm import tool_form
from ..hosts.mlx_lm.tokens import Encoder, TooLong
from . import pictures
from .errors import ApiError, bad
from .request import GenerationRequest
from .roles import Roles
from .volatile import without

if TYPE_CHECKING:
    from ..hosts.mlx_vlm.vision import ImagePrompt, Vision

log = logging.getLogger("opentq.serve")


class Abandoned(Exception):
    """Nobody waits for this prompt any more."""


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt, and its images, if it has any."""

    tokens: list[int]
    images: ImagePrompt | None = None


class Prompter:
    """Encodes prompts with one tokenizer. Called from worker threads; one prompt at a time."""

    def __init__(
        self,
        tokenizer: Any,
        vocab: int,
        template: dict[str, Any] | None = None,
        keep_volatile: bool = False,
        vision: Vision | None = None,
    ):
        """`template`: variables for the chat template; `keep_volatile`: render the lines that `volatile` drops;
        `vision`: what makes prompts of images, for a model that takes them.
        """
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)
        self.vocab = vocab
        self.template = template or {}
        self.keep_volatile = keep_volatile
        self.vision = vision
        self.roles = Roles(tokenizer, tool_form.lend(tokenizer))
        self._lock = threading.Lock()

    def encode(
        self,
        request: GenerationRequest,
        limit: int | None = None,
        abandoned: Callable[[], bool] = lambda: False,
    ) -> Prompt:
        """The prompt as tokens.

        Raises ApiError when the model has no words for what is asked, or when the prompt is longer than `limit` tokens
        by far: that is found out without tokenizing all of it. Raises Abandoned soon after `abandoned()` is true.
        """

        def look() -> None:
            if abandoned():
                raise Abandoned

        with self._lock:
            look()
            try:
                self.encoder.bound(_characters(request), limit)
                if request.messages is None:
                    prompt = Prompt(self._text(request, limit, look))
                else:
                    prompt = self._chat(request, limit, look)
            except TooLong as error:
                raise too_long(limit or 0, str(error), _where(request)) from error
        if not prompt.tokens:
            raise bad("the prompt is empty: it has no tokens", _where(request))
        return prompt

    def initial_state(self, request: GenerationRequest, tokens: list[int]) -> str:
        """The state in which an answer begins: reasoning when the template itself opened the thought."""
        tokenizer = self.tokenizer
        if request.messages is None:
            return "normal"
        if tokenizer.response_initial_state and not request.continue_last:
            return tokenizer.response_initial_state
        if tokenizer.has_thinking and tokenizer.rfind_think_start(tokens) > tokenizer.rfind_think_end(tokens):
            return "reasoning"
        return "normal"

    def _text(self, request: GenerationRequest, limit: int | None, look: Callable[[], None]) -> list[int]:
        if isinstance(request.prompt, str):
            return self.encoder.encode(request.prompt, limit, True, look)
        if wrong := next((t for t in request.prompt if t >= self.vocab), None):
            raise bad(f"prompt has the token id {wrong}, but the model's ids end at {self.vocab - 1}", "prompt")
        return list(request.prompt)

    def _chat(self, request: GenerationRequest, limit: int | None, look: Callable[[], None]) -> Prompt:
        messages, found = self._messages(request), pictures.of(request.messages or ())
        images = self._decoded(found, look)

        def read(messages: list[dict[str, Any]], limit: int | None) -> Prompt:
            text = self._render(messages, request)
            if not images or self.vision is None:
                return Prompt(self.encoder.encode(text, limit, False, look))
            try:
                prompt = self.vision.prompt(text, images, [picture.digest for picture in found])
            except UserError as error:
                raise bad(str(error), "messages", "invalid_image") from error
            if limit is not None and len(prompt.tokens) > limit:
                raise too_long(limit, str(len(prompt.tokens)), "messages")
            return Prompt(prompt.tokens, prompt)

        # What will be cleared is not counted against the limit.
        prompt = read(messages, None if request.clear else limit)
        if request.clear and request.clear.due(len(prompt.tokens), messages):
            prompt = read(request.clear.apply(messages), limit)
        return prompt

    def _decoded(self, found: list[pictures.Picture], look: Callable[[], None]) -> list[Any]:
        """Images are decoded before the template: it takes time, and the largest are refused."""
        if not found:
            return []
        if self.vision is None:
            raise bad(f"{found[0].where}: this model takes text only, no images", found[0].where, "no_images")
        if len(found) > pictures.MOST:
            raise bad(f"the prompt has {len(found)} images; {pictures.MOST} at most", "messages")
        from ..hosts.mlx_vlm.images import PIXELS, ImageError, decode

        images, left = [], PIXELS
        for picture in found:
            look()
            try:
                images.append(decode(picture.data, picture.where, left))
            except ImageError as error:
                raise bad(str(error), picture.where, "invalid_image") from error
            left -= images[-1].width * images[-1].height
        return images

    def _messages(self, request: GenerationRequest) -> list[dict[str, Any]]:
        if not self.tokenizer.has_chat_template:
            raise bad("this model has no chat template; use /v1/completions with the bare prompt", "messages")
        messages = [dict(m) for m in request.messages or ()]
        return messages if self.keep_volatile else without(messages)

    def _render(self, messages: list[dict[str, Any]], request: GenerationRequest) -> str:
        variables = self.template | request.template
        if request.continue_last:
            variables |= {"add_generation_prompt": False, "continue_final_message": True}
        else:
            variables |= {"add_generation_prompt": True}
        messages, tools = self.roles.fit(messages, list(request.tools))
        if self.vision is not None:
            messages = [self.vision.message(m) if isinstance(m["content"], list) else m for m in messages]
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, **variables)
        except TemplateError as error:
            # The template's own words, as raise_exception gives them, say which order of roles it wants.
            raise bad(f"the model's chat template refuses these messages: {error}", "messages") from error
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            log.warning("the chat template failed with %s", type(error).__name__)
            raise ApiError(400, "the model's chat template can't render these messages", "messages") from error


def _characters(request: GenerationRequest) -> int:
    """Characters that are sure to be in the prompt, before anything is done for it."""
    if request.messages is None:
        return len(request.prompt) if isinstance(request.prompt, str) else 0
    return 0 if request.clear else sum(pictures.characters(m["content"]) for m in request.messages)


def _where(request: GenerationRequest) -> str:
    return "prompt" if request.messages is None else "messages"


def too_long(limit: int, given: str, where: str) -> ApiError:
    """400: a prompt that the context has no room for, in the words that clients look for, OpenAI's own."""
    return bad(
        f"This model's maximum context length is {limit} tokens; the prompt has {given}, and the answer needs at least "
        "one. Shorten the prompt.",
        where,
        "context_length_exceeded",
    )


def check_choices(request: GenerationRequest, vocab: int) -> None:
    """Raise ApiError for sampling fields that name tokens the model does not have."""
    if wrong := next((t for t, _ in request.sampling.logit_bias if t >= vocab), None):
        raise bad(f"logit_bias has the token id {wrong}, but the model's ids end at {vocab - 1}", "logit_bias")
    if (request.sampling.top_k or 0) >= vocab:
        raise bad(f"top_k must be below the vocabulary of {vocab}, not {request.sampling.top_k}", "top_k")
