"""`graft inspect`."""


def inspect() -> None:
    """To come."""
    raise NotImplementedError
