"""What compression costs a model, measured: fidelity to its own fp16 cache, needles, exact agreement, layer errors.

Everything here runs on any mlx-lm model folder, compares KV specs (and rivals, `contenders.py`) with the model's own
cache on the same tokens, and appends one JSON record per result; tables, plots and `recommended.toml` come from those.
"""
