"""The floor of every comparison: a resampler that is shown the same picture always."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bridges.contract import Instruction, Resampler, ResamplerFactory, VisionFeatures, VisionShape

_STEP = math.pi * (math.sqrt(5) - 1)


class BlindResampler(Resampler):
    """Any resampler, whose features are replaced by a constant.

    It has the parameters, the tokens and the cost of the resampler within, and learns what text
    alone can teach: the captions' form, and their most frequent words. A bridge that is not better
    than this one tells the LM nothing of the picture.

    The constant is one vector of unit variance for all patches: not zeros, with which whatever
    reads the features would have no gradient.

    Args:
        vision: sizes of the encoder.
        resampler: builds the resampler within.

    Shape: as the resampler within.
    """

    constant: Tensor

    def __init__(self, *, vision: VisionShape, resampler: ResamplerFactory) -> None:
        super().__init__()
        self.resampler = resampler(vision=vision)
        self.num_tokens, self.dim = self.resampler.num_tokens, self.resampler.dim
        self.reads_video = self.resampler.reads_video
        self.tokenizer = getattr(self.resampler, "tokenizer", None)
        # Of no random state: the same in every run, and so not among the weights.
        constant = math.sqrt(2) * torch.sin(_STEP * torch.arange(1, vision.dim + 1))
        self.register_buffer("constant", constant, persistent=False)

    def forward(self, vision: VisionFeatures, text: Instruction | None = None) -> Tensor:
        patches = self.constant.to(vision.patches).expand_as(vision.patches)
        return self.resampler(replace(vision, patches=patches), text)

    def load_pretrained(self, path: str | Path) -> None:
        """Hands the weights to the resampler within."""
        self.resampler.load_pretrained(path)
