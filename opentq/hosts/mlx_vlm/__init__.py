"""mlx-vlm: its caches (`caches.py`), its language models with attention of their own (`seams.py`), and the names of it
that are not documented (`private.py`). mlx-vlm is imported when a model of it is given, and not before.
"""
