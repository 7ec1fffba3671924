"""Documents of emoji scenes, whose texts all do the same with their pictures.

Two to five scenes, each followed by a text. What the texts say of the pictures is drawn once for
a document, out of `styles`: the ground's colour, the objects, the caption in capitals. A picture
alone does not tell which; the pairs before it do. So a model that learns from such documents
learns to read demonstrations.

The JSON is that of `recipes.documents`, ``{"parts": [{"image": 0}, "text", …]}``, with the name
of the ``style`` and, in ``scenes``, the truth of each scene (`recipes.scenes.truth`). Pictures
are ``key.0.jpg``, ``key.1.jpg``, …
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from recipes.scene_captions import caption
from recipes.scenes import VENDORS, Scene, draw, encoded, random_scene, truth

SCENES = (2, 5)
"""Fewest and most in a document."""


def _relation(scene: Scene) -> str:
    first, second = (placed.name for placed in scene.objects)
    return f"the {first} is {scene.relation} the {second}"


def _ground_first(scene: Scene) -> str:
    things, _, ground = caption(scene).rpartition(" on ")
    return f"on {ground} there is {things}"


styles: dict[str, Callable[[Scene], str]] = {
    "caption": caption,
    "colour": lambda scene: f"colour: {scene.colour}",
    "objects": lambda scene: f"objects: {', '.join(placed.name for placed in scene.objects)}",
    "relation": _relation,
    "shout": lambda scene: f"{caption(scene).upper()}!",
    "ground first": _ground_first,
}
"""What a text says of its scene, by name."""

PAIRS_ONLY = frozenset(("relation",))
"""Styles that need two objects."""


def scene_document(
    seed: int, split: str, k: int, vendors: Sequence[str] = VENDORS
) -> tuple[str, list[Scene]]:
    """Style and scenes of document k; scene j depends on (seed, split, k, j) and the style alone.

    Args:
        seed: Another seed gives other documents out of the same compositions.
        split: "train" or "val"; "val" holds only compositions that "train" never shows, in
            documents or in `recipes.scenes.generate`.
        k: Which one.
        vendors: Whose artwork to draw.
    """
    rng = random.Random(f"{seed}/{split}/document/{k}")
    style, count = rng.choice(list(styles)), rng.randint(*SCENES)
    scenes = []
    for j in range(count):
        rng = random.Random(f"{seed}/{split}/document/{k}/{j}")
        pair = style in PAIRS_ONLY or rng.random() < 0.5
        scenes.append(random_scene(rng, split, vendors, pair))
    return style, scenes


def document_samples(n: int, seed: int, split: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields n documents as webdataset samples; the first of them do not depend on n.

    Args:
        n: Number of documents.
        seed: See `scene_document`.
        split: See `scene_document`.
        folder: Of the emoji, see `bridges.embedded.fetch`.
    """
    for k in range(n):
        style, scenes = scene_document(seed, split, k)
        parts = [
            part for j, scene in enumerate(scenes) for part in ({"image": j}, styles[style](scene))
        ]
        pictures = {f"{j}.jpg": encoded(draw(scene, folder)) for j, scene in enumerate(scenes)}
        meta = {"parts": parts, "style": style, "scenes": [truth(scene) for scene in scenes]}
        yield {"__key__": f"{split}-document-{k:06d}", **pictures, "json": meta}
