"""NVIDIA GPUs: CUDA sources, what launches them, their storage layouts and their attention."""
