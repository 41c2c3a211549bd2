"""Tasks of EleutherAI's lm-evaluation-harness, answered with a compressed cache.

mlx-lm's own bridge reads a whole prompt in one step, in which every token sees the others in fp16: with a compressed
cache nothing would be tested. Here prompts are fed in steps of `prefill` tokens and what is scored in steps of `step`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..memory.loaded import check_length
from ..records import Record
from . import metrics
from .contenders import Contender
from .corpus import opening
from .evaluation import Evaluation
from .forward import forced, greedy, prefill


def need() -> Any:
    """The module lm_eval. Raises UserError when it is not installed."""
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.tasks
    except ModuleNotFoundError as error:
        raise UserError("opentq eval harness needs lm-evaluation-harness: pip install 'opentq[eval]'") from error
    return lm_eval


def run(on: Evaluation, tasks: Sequence[str], limit: int = 0, include: Path | None = None) -> list[Record]:
    """One record per contender and task: the harness's metrics; old ones where the file has them.

    Raises UserError for a task that the harness does not know.
    """
    lm_eval = need()
    manager = lm_eval.tasks.TaskManager(include_path=str(include) if include else None)
    if unknown := [t for t in tasks if t not in manager.all_subtasks]:
        raise UserError(
            f"lm-evaluation-harness {lm_eval.__version__} has no task {', '.join(unknown)}; of a group "
            "name the tasks; --include FOLDER adds those of your own"
        )
    own = {"include": _digest(include)} if include else {}
    found: list[Record] = []
    for task in tasks:
        asked = {"name": task, "limit": limit, "lm_eval": lm_eval.__version__, **own}
        settings = {"kind": "harness", "model": on.model_id, "task": asked}

        def measure(contender: Contender, task: str = task) -> Record:
            done = lm_eval.evaluator.simple_evaluate(
                bridge(on, contender), tasks=[task], limit=limit or None, task_manager=manager, log_samples=False
            )
            named = {k: v for k, v in done["results"][task].items() if "," in k and isinstance(v, (int, float))}
            return {"metrics": {k.removesuffix(",none"): float(v) for k, v in named.items()}}

        found += on.each(settings, on.names, measure, 1)
    return found


def _digest(folder: Path) -> str:
    """Of the files of tasks of one's own: what is measured is known again only where they are the same."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def bridge(on: Evaluation, contender: Contender, prefill_step: int = 128, step: int = 16) -> Any:
    """The harness's model of one contender."""
    from lm_eval.api.model import TemplateLM

    class Bridge(TemplateLM):
        tokenizer = on.tokenizer
        eot_token_id = next(iter(on.tokenizer.eos_token_ids))
        prefix_token_id = next(iter(opening(on.tokenizer)), eot_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return on.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)

        def _read(self, tokens: list[int], more: int) -> list[Any]:
            """Fresh caches that hold all of a prompt but its last token."""
            check_length(on.model, len(tokens) + more)
            caches = contender.caches()
            if len(tokens) > 1:
                prefill(on.model, mx.array([tokens[:-1]]), caches, prefill_step)
            return caches

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            scores: list[tuple[float, bool]] = []
            last, held = None, list[Any]()
            for _texts, context, wanted in requests:
                if context != last:  # the choices of a question share its text
                    last, held = context, self._read(context, max(len(r[2]) for r in requests if r[1] == context))
                fed = mx.array([[context[-1], *wanted[:-1]]])
                steps = [metrics.log_probs(y) for _, y in forced(on.model, fed, copy.deepcopy(held), step)]
                logs, targets = mx.concatenate(steps, axis=1)[0], mx.array(wanted)
                best = bool((mx.argmax(logs, axis=-1) == targets).all())
                scores.append((float(mx.take_along_axis(logs, targets[:, None], axis=-1).sum()), best))
            return scores

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            texts = [self.tok_encode(r.args[0], add_special_tokens=False) for r in requests]
            return [self._loglikelihood_tokens([(None, [self.prefix_token_id], t)])[0][0] for t in texts]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            answers = []
            for context, options in (r.args for r in requests):
                if options.get("do_sample") and options.get("temperature", 1):
                    raise UserError("eval harness answers greedily: leave out tasks that sample")
                stops, left = options.get("until") or [], int(options.get("max_gen_toks", 256))
                stops = [stops] if isinstance(stops, str) else stops
                tokens = self.tok_encode(context)
                caches, text, answer = self._read(tokens, left), "", list[int]()
                while left > 0 and not any(s in text for s in stops):
                    fed = mx.array([(answer or tokens)[-1:]])
                    (row,) = greedy(on.model, fed, caches, min(step, left), set(on.tokenizer.eos_token_ids))
                    answer, left = answer + row, left - step
                    text = on.tokenizer.decode(answer)
                    if len(row) < step:
                        break
                answers.append(text[: min([text.find(s) for s in stops if s in text], default=len(text))])
            return answers

    return Bridge()
