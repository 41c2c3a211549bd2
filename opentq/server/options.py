"""What a server is asked for, and what can't be asked for together."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..hosts.mlx_lm.load import check_folder, ranks
from ..records import make_folder
from ..spec.text import AUTO, Asked
from .pace import fits_blocks
from .prefix_files import OPTION

LOOPBACK = ("127.0.0.1", "::1", "localhost")
LOCAL_HOSTS = frozenset({"127.0.0.1", "[::1]", "localhost"})


@dataclass
class ServeOptions:
    """What `opentq serve` was asked for; see its help for the meanings."""

    model: str
    kv: Asked = AUTO
    names: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    insecure: bool = False
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    max_body: int = 32 << 20
    max_context: int | None = None
    max_tokens: int = 4096
    memory: int | None = None
    prompt_cache_bytes: int | None = None
    prompt_cache_dir: Path | None = None
    prompt_cache_dir_bytes: int = 20 << 30
    concurrency: int = 64
    queue: int = 64
    prefill_step: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    adapter: str | None = None
    chat_template: str | None = None
    template: dict[str, Any] = field(default_factory=dict)
    keep_alive: float = 5.0
    drain: float = 30.0
    trust_remote_code: bool = False
    loadable: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    any_model: bool = False
    lookup: bool = True
    draft: str = ""
    drafts: int = 3
    keep_volatile: bool = False

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names that requests may give: the model's own, the path or repository as it was given, and aliases."""
        short = Path(self.model).name
        own = self.names or ((short,) if short == self.model else (short, self.model))
        return (*own, "default_model", *(alias for alias, name in self.aliases if name in own))

    @property
    def shown_names(self) -> tuple[str, ...]:
        """The names that everybody is told: without the folder, and without mlx-lm's name for any model."""
        hidden = {"default_model", *([self.model] if Path(self.model).expanduser().exists() else [])} - set(self.names)
        return tuple(n for n in self.served_names if n not in hidden) or (Path(self.model).resolve().name,)

    @property
    def allowed_hosts(self) -> frozenset[str] | None:
        """Names that the Host header may have; None for any. Keeps web pages from reaching a local server through a
        name of their own (DNS rebinding).
        """
        if self.host in LOOPBACK or self.hosts:
            return LOCAL_HOSTS | {h.lower() for h in self.hosts}
        return None


def aliases(given: list[str], options: ServeOptions) -> tuple[tuple[str, str], ...]:
    """The pairs of (alias, name) of `--alias NAME[=MODEL]`. Raises UserError for a model that is not served."""
    models = [options.served_names, *((Path(folder).name, folder) for folder in options.loadable)]
    own = options.served_names[0]
    pairs = []
    for text in given:
        alias, _, name = (part.strip() for part in text.partition("="))
        if not alias or not any((name or own) in names for names in models):
            served = ", ".join(names[0] for names in models)
            raise UserError(f"--alias {text!r} must be NAME or NAME=MODEL, and MODEL one of {served}")
        pairs.append((alias, name or own))
    return tuple(pairs)


def check(options: ServeOptions) -> None:
    """Raise UserError for options that must not go together, before anything is loaded."""
    if options.host not in LOOPBACK and not options.api_key and not options.insecure:
        raise UserError(
            f"--host {options.host} can be reached from other machines: set --api-key (or OPENTQ_API_KEY), "
            "or say --insecure"
        )
    step = options.prefill_step
    if step is not None and not fits_blocks(step):
        raise UserError(f"--prefill-step-size {step} must divide 64, the tokens packed together, or be a multiple")
    parts = {"--prompt-cache-dir": options.prompt_cache_dir, "--draft-model": options.draft}
    for name, value in (parts | {"--allow-model-loading": options.loadable}).items():
        if value and ranks() > 1:
            raise UserError(f"{name} can't be used where several processes run the model; leave it out")
    if options.prompt_cache_dir:
        make_folder(options.prompt_cache_dir.expanduser(), OPTION, 0o700)
    for folder in options.loadable:
        check_folder(folder)
        if not Path(folder).expanduser().exists():
            raise UserError(f"--allow-model-loading {folder} is neither a folder nor a .gguf file")
