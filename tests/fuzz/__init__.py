"""Random lives of caches, held to a plain model of what they must hold. `dev/fuzz.py` runs many of them.

`specs.py` draws specs from the whole grammar, `case.py` a case (a cache and what is done to it), `lane.py` is the plain
model, `life.py` lives a case and judges it, `shrink.py` makes a failing case small.
"""
