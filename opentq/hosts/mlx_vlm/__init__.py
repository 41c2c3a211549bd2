"""mlx-vlm: its caches and hooks (`caches.py`, `hooks.py`), models with attention of their own (`seams.py`), and the names
of it that are not documented (`private.py`). mlx-vlm is imported when a model of it is given, and not before.
"""
