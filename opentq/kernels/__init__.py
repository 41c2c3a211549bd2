"""Kernels: device code in three dialects side by side, compiled on first use, and the layouts they read."""
