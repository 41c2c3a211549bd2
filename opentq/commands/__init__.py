"""Commands of the `opentq` program. Modules import only light things at the top, so that `--help` is quick."""
