"""One training step of BLIP-2's stage 1, ours and the reference's, on the same batch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from bridges.contract import Instruction, VisionFeatures, VisionShape
from bridges.precision import Precision
from qformer.resampler import QFormer
from qformer.stage1 import Stage1
from recipes.bench_reference import Kernel, Negatives, ReferenceStage1, reference_keys
from recipes.workload import count_flops, matmul_precision

CLS, SEP, FIRST_WORD = 101, 102, 999
"""Of BERT's vocabulary."""

LENGTH_SPREAD = 0.28
"""Standard deviation of the logarithm of caption lengths."""


@dataclass(frozen=True)
class Sizes:
    """Of the Q-Former and of what it reads; BLIP-2's with the features of EVA ViT-g."""

    patches: int = 257
    vision_dim: int = 1408
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    num_queries: int = 32
    vocab_size: int = 30523
    max_text: int = 32


@dataclass(frozen=True)
class Case:
    """A batch.

    Attributes:
        batch: samples.
        dtype: bf16 is autocast over fp32 weights, as the Q-Former is trained.
        mean_tokens: of a caption, [CLS] and [SEP] included; None for `max_text` in all of them.
        compiled: both sides through `torch.compile`.
    """

    batch: int
    dtype: Precision = "bf16"
    mean_tokens: int | None = 13
    compiled: bool = False


def build_models(sizes: Sizes, device: torch.device) -> tuple[Stage1, ReferenceStage1]:
    """Ours with random weights (std 0.02) and the reference with the same ones."""
    torch.manual_seed(0)
    shape = VisionShape(sizes.vision_dim, sizes.patches, (1, sizes.patches))
    shared: dict[str, Any] = {
        name: getattr(sizes, name)
        for name in ("vocab_size", "num_queries", "dim", "depth", "num_heads")
    }
    with device:
        ours = Stage1(QFormer(vision=shape, **shared))
        reference = ReferenceStage1(vision_dim=sizes.vision_dim, max_text=sizes.max_text, **shared)
    reference.copy_weights(dict(ours.named_parameters()))
    return ours, reference


def caption_lengths(batch: int, mean: int | None, longest: int) -> list[int]:
    """Token counts of a batch of captions: evenly spaced quantiles of a skewed distribution.

    Log-normal, cut to 6…24: for 8 captions of 13 tokens on average 8 to 19. By quantiles, so that
    batches of every size have the same distribution.
    """
    if mean is None:
        return [longest] * batch
    # A log-normal's mean lies above its median.
    bell = NormalDist(math.log(mean) - LENGTH_SPREAD**2 / 2, LENGTH_SPREAD)
    tokens = (math.exp(bell.inv_cdf((i + 0.5) / batch)) for i in range(batch))
    return [min(longest, 24, max(6, round(count))) for count in tokens]


@dataclass(frozen=True)
class Batch:
    """Random features and captions, and the negatives that both sides take.

    Attributes:
        patches: (b, p, d_vision).
        text: padded to the longest caption, as our collator does.
        negatives: another sample for everyone.
    """

    patches: Tensor
    text: Instruction
    negatives: Negatives

    @classmethod
    def of(cls, case: Case, sizes: Sizes, device: torch.device) -> "Batch":
        """The same batch at every call."""
        b, random = case.batch, torch.Generator().manual_seed(0)
        lengths = torch.tensor(caption_lengths(b, case.mean_tokens, sizes.max_text))
        lengths = lengths[torch.randperm(b, generator=random)]
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.randint(FIRST_WORD, sizes.vocab_size - 1, mask.shape, generator=random)
        ids[:, 0] = CLS
        ids[torch.arange(b), lengths - 1] = SEP
        patches = torch.randn(b, sizes.patches, sizes.vision_dim, generator=random)
        shifts = torch.randint(1, b, (2, b), generator=random)
        texts, images = (torch.arange(b) + shifts) % b
        return cls(
            patches.to(device),
            Instruction((ids * mask).to(device), mask.to(device)),
            Negatives(texts.to(device), images.to(device)),
        )


class StepPair:
    """Forward and backward of the same three losses on both sides; no optimizer.

    Args:
        ours: the model.
        reference: the model, with the same weights.
        batch: what both read.
        case: of the batch.
    """

    def __init__(self, ours: Stage1, reference: ReferenceStage1, batch: Batch, case: Case) -> None:
        self.ours, self.reference = ours, reference
        self.batch, self.case = batch, case
        self.device = batch.patches.device
        # As in `bridges.attention`: on CPU in bf16 the fused kernel is the slower one.
        slow = self.device.type == "cpu" and case.dtype != "fp32"
        self.kernel: Kernel = "eager" if slow else "sdpa"
        self._run_ours: Any = torch.compile(ours) if case.compiled else ours
        self._run_reference: Any = torch.compile(reference) if case.compiled else reference

    def step_ours(self, dtype: Precision) -> dict[str, Tensor]:
        """Losses after one step of ours, with the gradients in the parameters."""
        patches = self.batch.patches[:, None]
        one = torch.ones(patches.shape[:2], dtype=torch.bool, device=self.device)
        vision = VisionFeatures(patches, one, (1, patches.shape[2]))
        negatives = (self.batch.negatives.texts, self.batch.negatives.images)
        with self._autocast(dtype):
            losses = self._run_ours(vision, self.batch.text, negatives=negatives).losses
        torch.stack([*losses.values()]).sum().backward()
        return losses

    def step_reference(self, dtype: Precision) -> dict[str, Tensor]:
        """The same of the reference."""
        self.reference.use(self.kernel)
        text = self.batch.text
        with self._autocast(dtype):
            losses = self._run_reference(
                self.batch.patches, text.input_ids, text.attention_mask, self.batch.negatives
            )
        torch.stack([*losses.values()]).sum().backward()
        return losses

    def checks(self, flops: Mapping[str, int]) -> dict[str, float]:
        """Differences as timed and in fp32, and the FLOPs of LAVIS's own schedule.

        Args:
            flops: of a step, by side.
        """
        # Of "medium", CUDA and newer CPUs make less than fp32.
        with matmul_precision("highest"):
            exact_loss, exact_gradient = self._differences("fp32")
        loss, gradient = self._differences(self.case.dtype)
        return {
            "max_abs_loss_diff": loss,
            "max_rel_grad_diff": gradient,
            "max_abs_loss_diff_fp32": exact_loss,
            "max_rel_grad_diff_fp32": exact_gradient,
            "reference_flops_with_cached_queries": flops["reference"] - self.cached_query_flops(),
        }

    def cached_query_flops(self) -> int:
        """What the reference would save if ITG took the queries' keys and values from ITC.

        LAVIS does. The pass over [queries; text] then lacks its queries: all that a pass over
        queries alone does, and their attention to the text's columns (two products, each with
        two in backward).
        """
        model, b = self.reference, len(self.batch.patches)

        def queries_alone() -> None:
            with self._autocast(self.case.dtype):
                states = model.encode(model.ln_vision(self.batch.patches))
            states.sum().backward()

        n, dim = model.queries.shape
        layers = len(model.qformer.encoder.layer)
        attention = 2 * 3 * 2 * b * n * model.max_text * dim * layers
        found = count_flops(queries_alone) + attention
        self.zero_reference()
        return found

    def zero_ours(self) -> None:
        """Before each step of ours."""
        self.ours.zero_grad(set_to_none=True)

    def zero_reference(self) -> None:
        """Before each step of the reference."""
        self.reference.zero_grad(set_to_none=True)

    def _differences(self, dtype: Precision) -> tuple[float, float]:
        self.zero_ours()
        self.zero_reference()
        ours, reference = self.step_ours(dtype), self.step_reference(dtype)
        loss = max(float((ours[name] - reference[name]).detach().abs()) for name in reference)
        gradient = max(gradient_differences(self.ours, self.reference).values())
        self.zero_ours()
        self.zero_reference()
        return loss, gradient

    def _autocast(self, dtype: Precision) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype != "fp32")


def gradient_differences(ours: Stage1, reference: ReferenceStage1) -> dict[str, float]:
    """By parameter of ours: the largest difference over the reference's largest gradient.

    The same number added to all keys changes no attention, so the gradient of a key's bias is
    zero but for rounding: it is measured by that of the query's bias beside it.
    """
    theirs = dict(reference.named_parameters())
    found = {}
    keys = reference_keys(dict(ours.named_parameters()), len(reference.qformer.encoder.layer))
    for name, parameter in ours.named_parameters():
        expected = theirs[keys[name]].grad
        scale = theirs[keys[name.replace("_attention.k.bias", "_attention.q.bias")]].grad
        assert parameter.grad is not None and expected is not None and scale is not None, name
        difference = (parameter.grad - expected).abs().max() / scale.abs().max().clamp(min=1e-30)
        found[name] = float(difference)
    return found
