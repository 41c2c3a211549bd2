"""Dialogue: what chat and server share. A `GenerationRequest` (`request.py`) becomes tokens (`prompt.py`),
sampled tokens (`sampling.py`) and text again (`output.py`).
"""
