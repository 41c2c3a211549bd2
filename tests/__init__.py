import opentq  # noqa: F401  # before MLX, as its users do: that gives MLX a fast float32 product on Linux
