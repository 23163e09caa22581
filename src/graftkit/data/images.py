"""Images that records name: paths beside the data, and never outside of its directory."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from graftkit.errors import DataError

MARK = "<image>"


def checked_images(where: str, images: Any, texts: Collection[str], directory: Path | None) -> tuple[str, ...]:
    """The paths that a record names, relative to `directory`, as many as its texts have `<image>`.

    A path that is absolute or climbs is fine as long as it ends within the directory, links followed. Without a
    directory only their number is checked. Raises DataError.
    """
    listed = [images] if isinstance(images, str) else images
    if not isinstance(listed, (list, tuple)) or not all(isinstance(image, str) and image for image in listed):
        raise DataError(f"{where}: images: expected a list of paths, got {images!r:.60}; export embedded ones to files")
    marks = sum(text.count(MARK) for text in texts)
    if marks != len(listed):
        raise DataError(f"{where}: {len(listed)} images, but {marks} {MARK} in the prompt; expected one for each")
    return tuple(listed) if directory is None else tuple(_inside(where, image, directory) for image in listed)


def _inside(where: str, image: str, directory: Path) -> str:
    root = os.path.realpath(directory)
    try:
        place = os.path.realpath(os.path.join(root, image))
    except ValueError as error:
        raise DataError(f"{where}: images: {image!r:.60} is no path") from error
    if os.path.commonpath([root, place]) != root:
        raise DataError(f"{where}: images: {image!r:.80} lies outside of {directory}; name the directory of the images "
                        "by `images:` in the task's description")  # fmt: skip
    if not os.path.isfile(place):
        raise DataError(f"{where}: images: {place} does not exist")
    return os.path.relpath(place, root)
