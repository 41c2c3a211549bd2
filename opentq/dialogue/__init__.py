"""Dialogue: what chat and server share. A request becomes an `Ask` (`ask.py`), tokens (`prompt.py`), sampled tokens
(`sampling.py`) and text again (`output.py`).
"""
