"""One training step of an LM with gated blocks, ours and the reference's, on the same batch."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bridges import VisionFeatures, VisionLanguageModel
from bridges.loss import IGNORE
from bridges.precision import Precision, resolve_dtype
from gated_xattn import GatedXAttn
from recipes.bench_flamingo_models import BOS, Sizes, partners
from recipes.bench_flamingo_reference import ReferenceFlamingo
from recipes.workload import matmul_precision


@dataclass(frozen=True)
class Case:
    """A batch.

    Attributes:
        batch: texts.
        dtype: bf16 is an LM in bf16, and gated blocks in fp32 under autocast.
        amp: the reference's LM is in fp32 under autocast too, OpenFlamingo's ``amp_bf16``.
        decoder_gradients: the reference computes the gradients of the frozen decoder too, as
            OpenFlamingo does under FSDP.
    """

    batch: int
    dtype: Precision = "bf16"
    amp: bool = False
    decoder_gradients: bool = False


@dataclass(frozen=True)
class Batch:
    """Random texts full of images, the same at every call.

    A text is BOS, then as many chunks as there are images: an image, words, the end of the chunk.
    All words and ends carry a loss, as in OpenFlamingo.

    Attributes:
        input_ids: long (b, t).
        labels: long (b, t).
        places: bool (b, t), of the images.
        ours: media (b, i, m, d), as a resampler would make them: they get a gradient.
        reference: the same, of the other side.
    """

    input_ids: Tensor
    labels: Tensor
    places: Tensor
    ours: Tensor
    reference: Tensor

    @classmethod
    def of(cls, batch: int, sizes: Sizes, image_id: int, end_id: int, device: torch.device):
        """Random words and media."""
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(10, sizes.words, (batch, sizes.text), generator=random)
        ids[:, 0] = BOS
        for chunk in torch.arange(1, sizes.text).tensor_split(sizes.images):
            ids[:, chunk[0]], ids[:, chunk[-1]] = image_id, end_id
        places = ids == image_id
        labels = ids.masked_fill(places, IGNORE)
        shape = (batch, sizes.images, sizes.latents, sizes.dim)
        media = torch.randn(shape, generator=random)
        leaves = [media.clone().to(device).requires_grad_() for _ in range(2)]
        return cls(ids.to(device), labels.to(device), places.to(device), *leaves)


class StepPair:
    """Forward and backward of one loss on both sides; no optimizer.

    Args:
        ours: the model.
        reference: the model, with the same weights.
        batch: what both read.
        case: of the batch.
    """

    def __init__(
        self, ours: VisionLanguageModel, reference: ReferenceFlamingo, batch: Batch, case: Case
    ) -> None:
        self.ours, self.reference = ours, reference
        self.batch, self.case = batch, case
        self.device = batch.input_ids.device
        self._autocast = False

    def step_ours(self) -> Tensor:
        """The loss after one step of ours, with the gradients in the parameters."""
        batch, media = self.batch, self.batch.ours
        everything = torch.ones_like(batch.places)
        real = torch.ones(media.shape[:2], dtype=torch.bool, device=self.device)
        vision = VisionFeatures(media, real, (1, media.shape[2]))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            loss = self.ours(batch.input_ids, everything, batch.labels, vision).loss
        loss.backward()
        return loss.detach()

    def step_reference(self) -> Tensor:
        """The same of the reference."""
        batch = self.batch
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            loss = self.reference(batch.input_ids, batch.labels, batch.reference, batch.places)
        loss.backward()
        self.reference.mask_gradient()
        return loss.detach()

    def before(self) -> None:
        """Before each step of either side."""
        self._zero()
        self._use(self.case.dtype)

    def checks(self, _: Mapping[str, int]) -> dict[str, float]:
        """Differences as timed and in fp32."""
        loss, gradient = self._differences(self.case.dtype)
        # Of "medium", CUDA and newer CPUs make less than fp32.
        with matmul_precision("highest"):
            exact_loss, exact_gradient = self._differences("fp32")
        return {
            "max_abs_loss_diff": loss,
            "max_rel_grad_diff": gradient,
            "max_abs_loss_diff_fp32": exact_loss,
            "max_rel_grad_diff_fp32": exact_gradient,
        }

    def gradients(self, dtype: Precision) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Both losses (2,), and the gradients of all that both sides train, by our names."""
        self._zero()
        self._use(dtype)
        with self._embeddings() as looked_up:
            losses = torch.stack([self.step_ours(), self.step_reference()])
        found = {"media": (_grad(self.batch.ours), _grad(self.batch.reference))}
        bridge, new = self.ours.bridge, self.ours.lm.new_tokens
        assert isinstance(bridge, GatedXAttn) and new is not None
        # <image> of the reference has a row in the head as well, which ours does not score.
        marker = _grad(looked_up[0])[self.batch.places].sum(dim=0, keepdim=True)
        found["marker"] = (_grad(bridge.marker), marker)
        end = _grad(self.reference.embedding)[self.ours.lm.end_id][None]
        found["new_tokens"] = (_grad(new.embedding), end)
        gates: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for place, blocks in enumerate(zip(bridge.blocks, self.reference.blocks, strict=True)):
            for name, (parameter, other, rows) in partners(*blocks).items():
                pair = _grad(parameter), _grad(other)[rows]
                if name.endswith("gate"):
                    gates[name].append(pair)
                else:
                    found[f"blocks.{place}.{name}"] = pair
        # One number each, some of them near zero: only all together have they a scale.
        found |= {name: _joined(pairs) for name, pairs in gates.items()}
        self.before()
        return losses, found

    def _zero(self) -> None:
        self.ours.zero_grad(set_to_none=True)
        self.reference.zero_grad(set_to_none=True)
        self.batch.ours.grad = self.batch.reference.grad = None
        self.reference.decoder_gradients(self.case.decoder_gradients)

    def _use(self, dtype: Precision) -> None:
        """Puts both LMs into a precision."""
        self._autocast = dtype != "fp32"
        theirs: Precision = "fp32" if self.case.amp else dtype
        for parameter in self.ours.lm.model.parameters():
            parameter.data = parameter.data.to(resolve_dtype(dtype))
        for parameter in self.reference.lm_parameters():
            parameter.data = parameter.data.to(resolve_dtype(theirs))
        # As in `bridges.language`: on CPU in bf16 the fused kernel is the slower one.
        slow = self.device.type == "cpu" and self._autocast
        for lm in (self.ours.lm.model, self.reference.lm):
            lm.set_attn_implementation("eager" if slow else "sdpa")

    def _differences(self, dtype: Precision) -> tuple[float, float]:
        losses, gradients = self.gradients(dtype)
        relative = [
            float((ours.float() - reference.float()).abs().max() / reference.abs().max())
            for ours, reference in gradients.values()
        ]
        return float((losses[0] - losses[1]).abs()), max(relative)

    @contextmanager
    def _embeddings(self) -> Iterator[list[Tensor]]:
        """Keeps the gradient of what the reference looks up."""
        found: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            output.retain_grad()
            found.append(output)

        handle = self.reference.lm.get_input_embeddings().register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()


def _joined(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    ours, reference = zip(*pairs, strict=True)
    return torch.cat(ours), torch.cat(reference)


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
