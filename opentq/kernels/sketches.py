"""What all kernels that choose pages read of sketches; their layout is in `attention/pages.py`."""


def shape_of(row: int, width: int) -> tuple[int, int]:
    """(C, D) of sketches with rows of `C * 34 + D + 2` bytes for queries of `C + D` numbers."""
    channels = (row - width - 2) // 33
    return channels, width - channels
