"""`graft report`."""


def report() -> None:
    """To come."""
    raise NotImplementedError
