"""The captions of the emoji scenes: written, read back and scored part by part; and questions.

One sentence per scene, every noun with its article:

    OBJECT on COLOUR background
    OBJECT RELATION OBJECT on COLOUR background
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recipes.scene_names import CODE_POINTS, GROUND_COLOURS, INVERSE_RELATION

if TYPE_CHECKING:
    from recipes.scenes import Scene


@dataclass(frozen=True)
class Parsed:
    """What a caption claims; None for what it does not say.

    `objects` are noun phrases in order of mention: known names, or the raw phrase where no known
    name is in it, so that an invented object still counts as a wrong one.
    """

    objects: tuple[str, ...] | None
    relation: str | None
    colour: str | None


def caption(scene: "Scene") -> str:
    """The one caption of a scene."""
    phrases = [_with_article(placed.name) for placed in scene.objects]
    return f"{f' {scene.relation} '.join(phrases)} on {_with_article(scene.colour)} background"


def questions(scene: "Scene", rng: random.Random) -> list[dict[str, str]]:
    """Everything that can be asked of a scene, with answers of a word.

    The ground's colour, how many things, what is there (of one object) or on either side of the
    relation (of two), and whether something is there: once yes, once no, so that the words of such
    a question say nothing of its answer.

    Args:
        scene: What is in the picture.
        rng: Draws the objects of the yes and the no, and the order, in which no kind of question
            comes first more often than its share.

    Returns:
        Each with "question" and "answer".
    """
    names = [placed.name for placed in scene.objects]
    absent = rng.choice([name for name in CODE_POINTS if name not in names])
    pairs = {
        "What colour is the background?": scene.colour,
        "How many things are there?": ("one", "two")[len(names) - 1],
        f"Is there {_with_article(rng.choice(names))}?": "yes",
        f"Is there {_with_article(absent)}?": "no",
    }
    if scene.relation is None:
        pairs["What is there?"] = names[0]
    else:
        first, second = names
        pairs[f"What is {scene.relation} the {second}?"] = first
        pairs[f"What is {INVERSE_RELATION[scene.relation]} the {first}?"] = second
    asked = [{"question": question, "answer": answer} for question, answer in pairs.items()]
    rng.shuffle(asked)
    return asked


def parse_caption(text: str) -> Parsed:
    """Reads a caption back, tolerating what a half-trained LM writes.

    Only the first line and sentence count. Parts that are missing or unknown come back as None,
    except unknown objects (see `Parsed`).
    """
    sentence = re.split(r"[.\n]", text.strip().lower(), maxsplit=1)[0]
    things, *ground = re.split(r"\bon\b", sentence, maxsplit=1)
    colour = next((word for word in _words("".join(ground)) if word in GROUND_COLOURS), None)
    relation = re.search("|".join(rf"\b{phrase}\b" for phrase in INVERSE_RELATION), things)
    objects: list[str] = []
    for phrase in re.split(re.escape(relation[0]), things, maxsplit=1) if relation else [things]:
        known = [word for word in _words(phrase) if word in CODE_POINTS]
        objects += known or [" ".join(_words(phrase))]
    objects = [name for name in objects if name]
    return Parsed(tuple(objects) or None, relation[0] if relation else None, colour)


def score(generated: str, scene_meta: Mapping[str, Any]) -> dict[str, bool | None]:
    """Judges a generated caption against a sample's json, part by part.

    Args:
        generated: What the model wrote.
        scene_meta: "objects", "relation" and "colour" as `scene_samples` writes them.

    Returns:
        object: Exactly the right objects, in any order.
        relation: The right relation, or its inverse with the objects named in the other order.
            Where the objects are wrong, the phrase alone is compared. None for a single object.
        colour: The right ground colour.
    """
    said = parse_caption(generated)
    true_objects, true_relation = tuple(scene_meta["objects"]), scene_meta["relation"]
    # Sorted, not sets: two cats are not one cat.
    objects_right = sorted(said.objects or ()) == sorted(true_objects)
    named_in_other_order = objects_right and said.objects != true_objects
    expected = INVERSE_RELATION[true_relation] if named_in_other_order else true_relation
    return {
        "object": objects_right,
        "relation": None if true_relation is None else said.relation == expected,
        "colour": said.colour == scene_meta["colour"],
    }


def _words(phrase: str) -> list[str]:
    return [word for word in re.findall(r"\w+", phrase) if word not in ("a", "an", "the")]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
