"""opentq: long-context language models in the memory you have.

The KV cache is compressed once, and attention is computed directly on the compressed bytes, inside mlx-lm.
"""
