"""What the hosts have in common."""


class HookError(RuntimeError):
    """A host is not as expected, or the compressed path was not entered."""
