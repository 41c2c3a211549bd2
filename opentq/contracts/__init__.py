"""Contracts: what the rooms below and above agree on: `codec` (vector to bits), `layout` (how bits lie in memory),
`attention` (one call), `backend` (the kernels of one kind of machine), `check` (what `doctor` says of them).
"""
