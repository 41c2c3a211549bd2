"""A recipe: a KV spec for each layer, as `opentq tune` finds it. It is taken wherever a spec is.

Written in one line it is the layers' specs with bars between (`k8v4|int4:g64|int4:g64`); in a file it is TOML, with the
evidence for it. Layers are those that can be compressed, in the model's order. Options behind the name of a file go to
all layers (`r.toml:recent=128`). A recipe that `opentq calibrate` made has tensors beside it (`calibration.py`).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import calibration
from .kv import FILE, KVSpec, SpecError, with_options

BAR = "|"


@dataclass(frozen=True)
class Recipe:
    """One spec per compressible layer.

    Attributes:
        layers: the layers' specs; they agree on `window`.
        source: the file and options that it was read from, where it has a calibration; it prints as that.
        calibration: what was found out about its model, or None.
    """

    layers: tuple[KVSpec, ...]
    source: str = ""
    calibration: calibration.Calibration | None = field(default=None, compare=False)

    @classmethod
    def of(cls, layers: list[str] | tuple[str, ...]) -> Recipe:
        """A recipe of the layers' specs. Raises SpecError."""
        specs = tuple(KVSpec.parse(text) for text in layers)
        if not specs:
            raise SpecError("a recipe needs one KV spec per layer")
        windows = {s.window for s in specs}
        if len(windows) > 1:
            raise SpecError("a recipe's layers must agree on window=native or window=compress")
        return cls(specs)

    @classmethod
    def read(cls, text: str) -> Recipe:
        """A recipe from one line, or from the file of that name. Raises SpecError."""
        file = FILE.fullmatch(text.strip())
        if not file:
            return cls.of(text.split(BAR))
        path = Path(file[1]).expanduser()
        try:
            data = tomllib.loads(path.read_text())
        except OSError as error:
            raise SpecError(f"recipe {file[1]!r} can't be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SpecError(f"recipe {file[1]!r} is not valid TOML: {error}") from error
        layers = data.get("layers")
        if not isinstance(layers, list) or not all(isinstance(x, str) for x in layers):
            raise SpecError(f"recipe {file[1]!r} needs layers = [...], one KV spec per layer")
        options = [option.lower() for option in file[2].split(":") if option]
        recipe = cls.of([str(with_options(KVSpec.parse(layer), options, text)) for layer in layers])
        if "calibration" not in data:
            return recipe
        found = calibration.read(path, data["calibration"], len(layers))
        return replace(recipe, source=":".join([file[1], *options]), calibration=found)

    def __str__(self) -> str:
        return self.source or BAR.join(map(str, self.layers))

    @property
    def window(self) -> str:
        """What sliding-window layers do; see `KVSpec`."""
        return self.layers[0].window

    def for_layer(self, index: int, count: int) -> KVSpec:
        """The spec of layer `index`. Raises UserError when the recipe was made for another number of layers."""
        if count != len(self.layers):
            raise UserError(
                f"this recipe has {len(self.layers)} layers, and the model has {count} that can be compressed: "
                "it was made for another model; run opentq tune for this one"
            )
        chosen = self.calibration.channels[index] if self.calibration else None
        return replace(self.layers[index], channels=chosen)

    def bits_per_value(self, head_dim: int, value_dim: int | None = None) -> float:
        """Bits per value, averaged over layers of equal size."""
        return sum(s.bits_per_value(head_dim, value_dim) for s in self.layers) / len(self.layers)

    @property
    def compresses(self) -> bool:
        return any(s.compresses for s in self.layers)


def text(layers: list[str], comment: str, evidence: dict[str, Any], calibration: dict[str, Any] | None = None) -> str:
    """A recipe file: what `Recipe.read` takes, with a comment, the evidence, and where tensors are."""
    import json

    lines = [f"# {line}" for line in comment.splitlines()]
    lines += ["layers = [", *(f"  {json.dumps(layer)}," for layer in layers), "]"]
    for title, table in (("calibration", calibration), ("evidence", evidence)):
        if table is not None:
            lines += ["", f"[{title}]", *(f"{name} = {json.dumps(value)}" for name, value in table.items())]
    return "\n".join(lines) + "\n"
