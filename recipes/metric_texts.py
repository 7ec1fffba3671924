"""Captions kept as tensors: ranks exchange nothing else."""

import json
from collections.abc import Sequence

import torch

from recipes.metric_rows import PerImage, check_pairs
from recipes.metric_tokens import ptb_tokens


class CaptionTexts(PerImage):
    """A metric that needs the words of all images at once.

    The words of an image are kept as UTF-8 of JSON.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_rows("letters", dtype=torch.uint8)
        self.add_rows("letter_counts", dtype=torch.long)

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Adds images.

        Args:
            predictions: one caption for each.
            references: the right ones of each.
        """
        check_pairs(predictions, references)
        images = [
            json.dumps([ptb_tokens(text) for text in (prediction, *right)]).encode()
            for prediction, right in zip(predictions, references, strict=True)
        ]
        self.append("letters", list(b"".join(images)))
        self.append("letter_counts", [len(image) for image in images])

    def captions(self) -> list[list[list[str]]]:
        """The words of each image's prediction and, after it, of its references."""
        letters = bytes(self.rows("letters").tolist())
        images, start = [], 0
        for count in self.rows("letter_counts").tolist():
            images.append(json.loads(letters[start : start + count]))
            start += count
        return images
