"""`graft convert`."""


def convert() -> None:
    """To come."""
    raise NotImplementedError
