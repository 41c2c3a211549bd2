"""`python -m opentq` is `opentq`."""

from .cli import main

main()
