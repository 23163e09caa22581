"""`graft demo`."""


def demo() -> None:
    """To come."""
    raise NotImplementedError
