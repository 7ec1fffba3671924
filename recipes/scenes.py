"""Emoji scenes: pictures whose objects, places and colours are known exactly.

One or two emoji on a coloured ground, captioned by a small grammar:

    a cat on a green background
    an apple to the left of a dog on a yellow background

and asked about, with answers of a word: "What is to the right of the apple?" – "dog".

A test bed rather than a data set: any number of scenes from a seed, and captions that can be
scored part by part. 15 % of the compositions (pairs of objects; for a single object, the object
with its ground colour) never occur in the "train" split, so that the "val" split asks for what was
learned rather than for what was memorised.
"""

import hashlib
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from recipes.scene_captions import caption, questions
from recipes.scene_names import CODE_POINTS, GROUND_COLOURS, INVERSE_RELATION

IMAGE_SIZE = 224
HELD_OUT_SHARE = 0.15
SINGLE_SIZES = (80, 150)  # drawn edge in pixels, lowest and highest
PAIR_SIZES = (64, 110)  # two of the largest still fit side by side
# How far centres may differ across the relation's axis, as a share of their distance along it.
MAX_SLANT = 0.4
COLOUR_JITTER = 10
VENDORS = ("Goog", "Twtr")
SPLITS = ("train", "val")


@dataclass(frozen=True)
class PlacedEmoji:
    """An emoji and where it is: `box` is (left, top, right, bottom) in pixels."""

    name: str
    vendor: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """What is in a picture: `objects[0]` is `relation` `objects[1]`, on ground `colour`.

    Attributes:
        objects: One or two emoji, in the order in which the caption names them.
        relation: A key of INVERSE_RELATION; None for a single object.
        colour: A key of GROUND_COLOURS.
        ground: The colour as painted, RGB with jitter.
    """

    objects: tuple[PlacedEmoji, ...]
    relation: str | None
    colour: str
    ground: tuple[int, int, int]


def generate(
    n: int,
    seed: int,
    split: str,
    vendors: Sequence[str] = VENDORS,
    two_object_share: float = 0.5,
) -> Iterator[Scene]:
    """Yields n scenes; scene k depends on (seed, split, k) and the options, not on n.

    Args:
        n: Number of scenes.
        seed: Another seed gives other scenes out of the same compositions.
        split: "train" or "val"; "val" holds only compositions that "train" never shows.
        vendors: Whose artwork to draw; leave one out to hold its style out.
        two_object_share: Probability that a scene has two objects.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected 'train' or 'val'")
    if not vendors or not set(vendors) <= set(VENDORS):
        raise ValueError(f"vendors are {list(vendors)}, expected some of {list(VENDORS)}")
    for k in range(n):
        rng = random.Random(f"{seed}/{split}/{k}")
        yield random_scene(rng, split, vendors, pair=rng.random() < two_object_share)


def draw(scene: Scene, folder: Path) -> Image.Image:
    """Paints a scene at 224×224 with the emoji of `folder` (see `bridges.embedded.fetch`)."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), scene.ground)
    for placed in scene.objects:
        left, top, right, bottom = placed.box
        emoji = _open_emoji(folder, placed.vendor, placed.name)
        emoji = emoji.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        image.paste(emoji, (left, top), emoji)
    return image


def scene_samples(
    n: int,
    seed: int,
    split: str,
    folder: Path,
    vendors: Sequence[str] = VENDORS,
    two_object_share: float = 0.5,
) -> Iterator[dict[str, Any]]:
    """Yields scenes as webdataset samples: jpg, txt, and json with the ground truth.

    The json's "qa" lists {"question", "answer"}, see `questions`.
    """
    for k, scene in enumerate(generate(n, seed, split, vendors, two_object_share)):
        text = caption(scene)
        # A stream of their own: whatever is asked, the scenes stay as they are.
        asking = random.Random(f"{seed}/{split}/{k}/questions")
        meta = {"captions": [text], **truth(scene), "qa": questions(scene, asking)}
        jpg = encoded(draw(scene, folder))
        yield {"__key__": f"{split}-{k:06d}", "jpg": jpg, "txt": text, "json": meta}


def truth(scene: Scene) -> dict[str, Any]:
    """What is in a scene, for a sample's JSON; `recipes.scene_captions.score` reads it."""
    return {
        "objects": [placed.name for placed in scene.objects],
        "relation": scene.relation,
        "colour": scene.colour,
        "vendors": [placed.vendor for placed in scene.objects],
        "boxes": [list(placed.box) for placed in scene.objects],
    }


def encoded(picture: Image.Image) -> bytes:
    """A drawn picture as a JPEG."""
    jpg = io.BytesIO()
    picture.save(jpg, "JPEG", quality=95)
    return jpg.getvalue()


def is_held_out(names: Sequence[str], colour: str) -> bool:
    """Whether a composition belongs to "val"; the same for every seed and process.

    Two objects: their unordered pair, on any ground. One object: it and the ground's colour.
    """
    composition = sorted(names) if len(names) > 1 else [*names, colour]
    digest = hashlib.blake2b("/".join(composition).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def random_scene(rng: random.Random, split: str, vendors: Sequence[str], pair: bool) -> Scene:
    """A scene of one object, or of a pair, whose composition a split may show."""
    names, colours = list(CODE_POINTS), list(GROUND_COLOURS)
    while True:  # about seven draws for "val"
        chosen, colour = rng.sample(names, 2 if pair else 1), rng.choice(colours)
        if _belongs(chosen, colour, split):
            break
    relation = rng.choice(list(INVERSE_RELATION)) if pair else None
    boxes = _pair_boxes(rng, relation) if relation else [_single_box(rng)]
    red, green, blue = (
        level + rng.randint(-COLOUR_JITTER, COLOUR_JITTER) for level in GROUND_COLOURS[colour]
    )
    objects = (
        PlacedEmoji(name, rng.choice(list(vendors)), box)
        for name, box in zip(chosen, boxes, strict=True)
    )
    return Scene(tuple(objects), relation, colour, (red, green, blue))


def _belongs(names: Sequence[str], colour: str, split: str) -> bool:
    """Whether a split may show a composition.

    A pair in "train" must not show either object on a ground that is held out for it alone.
    """
    if split == "val":
        return is_held_out(names, colour)
    shown = [names, *([name] for name in names)]
    return not any(is_held_out(part, colour) for part in shown)


def _single_box(rng: random.Random) -> tuple[int, int, int, int]:
    size = rng.randint(*SINGLE_SIZES)
    left, top = (rng.randint(0, IMAGE_SIZE - size) for _ in range(2))
    return left, top, left + size, top + size


def _pair_boxes(rng: random.Random, relation: str) -> list[tuple[int, int, int, int]]:
    """Boxes of the first and the second named object, apart along the relation's axis."""
    before, after = (rng.randint(*PAIR_SIZES) for _ in range(2))
    # The room that is left along the axis falls before, between and after the two.
    start, gap = sorted(rng.randint(0, IMAGE_SIZE - before - after) for _ in range(2))
    near, far = (start, start + before), (gap + before, gap + before + after)
    # Across it, the second centre stays within MAX_SLANT of the first, and in the picture.
    across = rng.randint(0, IMAGE_SIZE - before)
    slack = MAX_SLANT * (sum(far) - sum(near)) / 2
    middle = across + (before - after) / 2
    lowest = max(0, int(middle - slack) + 1)
    highest = min(IMAGE_SIZE - after, int(middle + slack))
    shifted = rng.randint(lowest, highest)
    boxes = [(*near, across, across + before), (*far, shifted, shifted + after)]
    if relation in ("to the right of", "below"):
        boxes.reverse()
    if relation in ("above", "below"):
        return [(left, top, right, bottom) for top, bottom, left, right in boxes]
    return [(left, top, right, bottom) for left, right, top, bottom in boxes]


@lru_cache(maxsize=512)
def _open_emoji(folder: Path, vendor: str, name: str) -> Image.Image:
    path = folder / vendor / f"U+{CODE_POINTS[name]:X}.png"
    if not path.is_file():
        raise FileNotFoundError(
            f"no picture of {name!r} at {path}; give the folder of "
            "bridges.embedded.fetch('emoji'), which holds a folder for each vendor"
        )
    with Image.open(path) as file:
        return file.convert("RGBA")
