"""Memory: what a model, its cache and a prefill take, what this machine gives, and so what fits."""
