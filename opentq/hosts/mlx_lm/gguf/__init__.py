"""GGUF files as mlx-lm models: the header, the weights and the tokenizer of one file (or of its parts)."""

from .header import GGUFError, Header, read
from .model import config, load, loaded_bytes

__all__ = ["GGUFError", "Header", "config", "load", "loaded_bytes", "read"]
