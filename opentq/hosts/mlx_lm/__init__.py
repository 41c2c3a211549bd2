"""mlx-lm: the two hooks (`hooks.py`), models with attention of their own (`seams.py`), what each layer does
(`policy.py`), and what commands need of it (`load.py`, `generate.py`, `report.py`).
"""
