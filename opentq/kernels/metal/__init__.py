"""Apple GPUs: Metal sources, what launches them and their attention."""
