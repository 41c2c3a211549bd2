"""The dial: what the KV cache of a model is made of. `kv.py` is one spec, `recipe.py` one per layer, `recommended.py`
which one to use when nobody says.
"""

from .kv import KVSpec, SpecError, spec_from_flags
from .recipe import Recipe

__all__ = ["KVSpec", "Recipe", "SpecError", "spec_from_flags"]
