"""`python -m opentq` is `opentq`."""

from .cli.main import main

main()
