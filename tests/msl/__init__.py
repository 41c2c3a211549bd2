"""A Metal emulator for tests: kernels written for Apple's GPUs compiled as C++ and executed on the CPU, lane by lane.

    rewrite.py      MSL text to what Clang takes        metal.h      the standard library a kernel sees
    instrument.py   counters and checks, in LLVM IR     runtime.cpp  lanes as fibers, barriers, races, bounds
    compiler.py     text to shared library              launch.py    `mx.fast.metal_kernel` without a GPU
    mlx_sources.py  MLX's own kernels and preamble      cost.py      counts to modelled times

What it proves and what it can't: docs/metal.md.
"""
