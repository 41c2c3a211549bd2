"""The command line: every command, its options and its parsing. Nothing imports it.

Modules import only light things at the top, so that `--help` is quick.
"""
