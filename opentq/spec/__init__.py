"""The dial: what the KV cache of a model is made of. `kv.py` is one spec, `recipe.py` one per layer, `text.py` reads
both, `recommended.py` says which one to use when nobody does.
"""

from .kv import KVSpec, SpecError
from .recipe import Recipe
from .text import Spec, parse

__all__ = ["KVSpec", "Recipe", "Spec", "SpecError", "parse"]
