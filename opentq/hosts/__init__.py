"""Hosts: programs whose models we compress. Each folder is one of them, and the only place that knows its internals."""
