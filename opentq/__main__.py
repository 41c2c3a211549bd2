"""`opentq`, which is also `python -m opentq`: ready for Ctrl-C before the modules of the command line are there."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    from .cli.main import main as run

    run()


def _stop(*_: object) -> None:
    # Raised in the middle of an import, KeyboardInterrupt can end as another error, or as none.
    os.write(2, b"opentq: stopped\n")
    os._exit(130)


if __name__ == "__main__":
    main()
