"""The pictures of the test bed: scans of handwritten digits that scikit-learn ships, and coloured shapes drawn here.

The scans are the 1797 of `load_digits` (8 x 8, from the UCI optical digits), divided once for train, dev and test. The
shapes are drawn at random places and sizes; each split draws its own, and none is the same picture as another's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from wording import COLOURS, DIGITS, SHAPES

SPLITS = ("train", "dev", "test")
SCANS = {"dev": 120, "test": 600}  # the rest trains
DRAWN = {"train": 1200, "dev": 60, "test": 300}
SIZE = 32
PAINT = {"red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 240), "yellow": (240, 220, 40)}


@dataclass(frozen=True)
class Picture:
    """A picture and the words that name it."""

    name: str
    label: tuple[str, ...]
    image: Image.Image


@cache
def pictures(split: str) -> tuple[Picture, ...]:
    """The scans, then the shapes, of one split."""
    return (*scans(split), *shapes(split))


def scans(split: str) -> tuple[Picture, ...]:
    """The handwritten digits of one split, as grey 8 x 8 pictures."""
    from sklearn.datasets import load_digits

    values, digits = load_digits(return_X_y=True)
    grey = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return tuple(Picture(f"digit-{index:04d}", (DIGITS[digits[index]],), Image.fromarray(grey[index]))
                 for index in _places(len(grey))[split])  # fmt: skip


def _places(count: int) -> dict[str, list[int]]:
    order: Any = np.random.default_rng(0).permutation(count)
    dev, test = SCANS["dev"], SCANS["dev"] + SCANS["test"]
    parts = {"dev": order[:dev], "test": order[dev:test], "train": order[test:]}
    return {split: sorted(map(int, part)) for split, part in parts.items()}


def shapes(split: str) -> tuple[Picture, ...]:
    """Coloured shapes on black; all splits are drawn in one go, so that none repeats another's picture."""
    return _drawn()[split]


@cache
def _drawn() -> dict[str, tuple[Picture, ...]]:
    source, seen, found = random.Random(0), set[bytes](), {}
    for split in SPLITS:
        made: list[Picture] = []
        while len(made) < DRAWN[split]:
            colour, shape = COLOURS[len(made) % 4], SHAPES[len(made) // 4 % 5]
            image = _draw(colour, shape, source)
            if image.tobytes() not in seen:
                seen.add(image.tobytes())
                made.append(Picture(f"shape-{split}-{len(made):04d}", (colour, shape), image))
        found[split] = tuple(made)
    return found


def _draw(colour: str, shape: str, source: random.Random) -> Image.Image:
    scale = 4  # drawn large and made small, for smooth edges
    image = Image.new("RGB", (SIZE * scale, SIZE * scale))
    radius = source.uniform(8, 13) * scale
    x, y = (source.uniform(radius, SIZE * scale - radius) for _ in range(2))
    shade = tuple(round(value * source.uniform(0.8, 1)) for value in PAINT[colour])
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
    else:
        draw.polygon([(x + radius * across, y + radius * down) for across, down in _OUTLINES[shape]], fill=shade)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _star() -> list[tuple[float, float]]:
    turns = np.pi * np.arange(10) / 5
    reach = np.where(np.arange(10) % 2, 0.4, 1.0)
    return [(float(r * np.sin(t)), float(-r * np.cos(t))) for r, t in zip(reach, turns, strict=True)]


_ARM = 0.33
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "star": _star(),
    "cross": [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
              (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)],
}  # fmt: skip


def write_pictures(split: str, folder: Path) -> dict[str, str]:
    """Every picture of a split as a PNG file; their names in the folder by the pictures' names."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures(split):
        picture.image.save(folder / f"{picture.name}.png")
    return {picture.name: f"{picture.name}.png" for picture in pictures(split)}
