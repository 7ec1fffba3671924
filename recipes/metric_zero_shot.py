"""Zero-shot classification: prompts of each class, their mean embedding, accuracy at k."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from qformer.retrieval import first
from recipes.metric_rows import PerImage, mean
from recipes.metric_templates import CLIP_TEMPLATES

PLACE = "{}"
"""Where a template has the name of the class."""


def read_templates(path: Path) -> list[str]:
    """Templates from a text file, one on each line; empty lines are skipped.

    Raises:
        ValueError: see `read_class_prompts`.
    """
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    templates = [line.strip() for line in lines if line.strip()]
    _check_templates(templates, f" in {path}")
    return templates


def read_class_prompts(
    classes: Sequence[str],
    templates: Sequence[str] | None = CLIP_TEMPLATES,
    descriptions_file: Path | None = None,
) -> dict[str, list[str]]:
    """What is written about each class: filled templates, then descriptions.

    Args:
        classes: their names, as they stand in the prompts.
        templates: each with one ``{}``; none, for descriptions alone.
        descriptions_file: JSON, class -> sentences, as CuPL has a language model write them; more
            classes than are asked for do no harm.

    Raises:
        ValueError: neither templates nor descriptions, a template without ``{}``, a class twice,
            or one without descriptions.

    Source: CLIP (arXiv 2103.00020) section 3.1.4; CuPL (arXiv 2209.03320).
    """
    if not templates and descriptions_file is None:
        raise ValueError(
            "found neither templates nor descriptions of the classes; expected at least one: pass "
            "templates=CLIP_TEMPLATES"
        )
    if repeated := sorted({name for name in classes if list(classes).count(name) > 1}):
        raise ValueError(f"found the classes {repeated} twice; expected each once: rename them")
    _check_templates(templates or (), "")
    prompts = {
        name: [template.replace(PLACE, name) for template in templates or ()] for name in classes
    }
    if descriptions_file is not None:
        found = _read_descriptions(descriptions_file, classes)
        for name in classes:
            prompts[name] += found[name]
    return prompts


def class_embeddings(
    encode: Callable[[list[str]], Tensor], prompts: Mapping[str, Sequence[str]]
) -> Tensor:
    """One unit vector for each class: the mean of its prompts' unit vectors, normalised again.

    Args:
        encode: texts -> embeddings (texts, e), of any length.
        prompts: class -> what is written about it, from `read_class_prompts`.

    Returns:
        (classes, e), in the order of `prompts`.

    Source: CLIP's notebook "Prompt Engineering for ImageNet".
    """
    means = [F.normalize(encode(list(texts)), dim=-1).mean(dim=0) for texts in prompts.values()]
    return F.normalize(torch.stack(means), dim=-1)


class ZeroShotAccuracy(PerImage):
    """Share of images whose class is among the k best, over all images and as a mean over classes.

    Equal scores rank by chance, the same way every time: an encoder that sees nothing, and gives
    all classes one score, is right as often as chance and not always, or never. That, and the mean
    over the classes that have images rather than over those guessed too, is why torchmetrics'
    MulticlassAccuracy is not used; where neither arises its figures are these.

    Args:
        num_classes: how many there are.
        top_k: the k's.
    """

    higher_is_better = True

    def __init__(self, num_classes: int, top_k: Sequence[int] = (1, 5)) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.top_k = tuple(k for k in top_k if k < num_classes) or (1,)
        self.add_rows("hits", len(self.top_k))
        self.add_rows("targets", dtype=torch.long)

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Adds images.

        Args:
            scores: (b, classes), the higher the likelier.
            targets: long (b,), the right class.

        Raises:
            ValueError: shapes that do not belong together, a class that is not there, or NaN.
        """
        if scores.shape != (len(targets), self.num_classes) or targets.ndim != 1:
            raise ValueError(
                f"found scores {tuple(scores.shape)} and targets {tuple(targets.shape)}; expected "
                f"(b, {self.num_classes}) and (b,)"
            )
        if ((targets < 0) | (targets >= self.num_classes)).any():
            raise ValueError(
                f"found targets from {int(targets.min())} to {int(targets.max())}; expected 0 to "
                f"{self.num_classes - 1}"
            )
        right = first(scores, max(self.top_k)) == targets[:, None]
        self.append("hits", torch.stack([right[:, :k].any(dim=1) for k in self.top_k], dim=1))
        self.append("targets", targets)

    def compute(self) -> dict[str, Tensor]:
        """``{"accuracy@1": …, "accuracy_per_class@1": …, …}``, fp64 in 0…1.

        Raises:
            ValueError: no image yet.
        """
        hits, targets = self.rows("hits"), self.rows("targets")
        overall = mean(hits)
        counts = targets.bincount(minlength=self.num_classes)
        found = hits.new_zeros(self.num_classes, len(self.top_k)).index_add(0, targets, hits)
        per_class = mean(found[counts > 0] / counts[counts > 0, None])
        names = [(f"accuracy@{k}", f"accuracy_per_class@{k}") for k in self.top_k]
        return {
            name: values[column]
            for column, pair in enumerate(names)
            for name, values in zip(pair, (overall, per_class), strict=True)
        }

    def _each(self) -> Tensor:
        """Whether each image's class is the best, at the first of the k's."""
        return self.rows("hits")[:, 0]


def _check_templates(templates: Sequence[str], where: str) -> None:
    for template in templates:
        if template.count(PLACE) != 1:
            raise ValueError(
                f"found the template {template!r}{where}; expected one {PLACE} in it, for the name "
                "of the class"
            )


def _read_descriptions(path: Path, classes: Sequence[str]) -> dict[str, list[str]]:
    found = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(found, dict):
        raise ValueError(
            f"found a {type(found).__name__} in {path}; expected an object: class -> sentences"
        )
    if missing := [name for name in classes if name not in found]:
        raise ValueError(
            f"found no descriptions of {missing} in {path}; expected them for all "
            f"{len(classes)} classes"
        )
    for name in classes:
        texts = found[name]
        if not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
            raise ValueError(
                f"found {texts!r} as the descriptions of {name!r} in {path}; expected a list of "
                "at least one sentence, and none of them empty"
            )
    return found


def _is_text(found: object) -> bool:
    return isinstance(found, str) and bool(found.strip())
