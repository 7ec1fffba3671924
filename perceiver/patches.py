"""The patches of images and clips, made ready once for all layers of a resampler."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bridges.precision import as_autocast

Norm = nn.LayerNorm | nn.RMSNorm


@dataclass(frozen=True)
class Patches:
    """Normalised patches, before the scale and shift that every layer has of its own.

    Every layer reads the same patches, LN(x) = γ ⊙ x̂ + β with its own γ and β. So x̂ is made once,
    and γ and β are folded into the layer's projection: W (γ ⊙ x̂ + β) = (W ⊙ γ) x̂ + W β. If the
    patches are frozen, x̂ depends on no parameter, and backward multiplies its way into none of
    them, which would be a third of the projections' FLOPs.

    Time embeddings make x̂ depend on parameters. The patches of a frame share one embedding though,
    and its gradient needs less than the gradient of every patch: see `_TimedProjection`.

    Attributes:
        normalised: x̂, (m, f · p, d) for m images or clips of f frames.
        inverse_std: (m, f, p), by what a patch was multiplied to make x̂.
        times: (m, f, d), what was added to the frames, if it needs a gradient that patches do not
            need; None otherwise.
    """

    normalised: Tensor
    inverse_std: Tensor
    times: Tensor | None

    @classmethod
    def of(cls, patches: Tensor, times: Tensor | None, norm: Norm) -> "Patches":
        """Adds the time embeddings and normalises.

        Args:
            patches: (m, f, p, d).
            times: (m, f, d), or None for none.
            norm: says which norm it is, and its epsilon; its weights are not used.
        """
        only_times = times is not None and times.requires_grad and not patches.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and not only_times):
            x = patches.float()
            if times is not None:
                x = x + times[:, :, None]
            normalised, inverse_std = _normalise(x, norm)
            normalised = as_autocast(normalised.to(norm.weight.dtype))
            normalised = rearrange(normalised, "m f p d -> m (f p) d")
        return cls(normalised, inverse_std[..., 0], times if only_times else None)

    def project(self, linear: nn.Linear, norm: Norm, latents: Tensor) -> Tensor:
        """``linear(norm(patches))`` by head, followed by the latents' own projection.

        Args:
            linear: to keys or values.
            norm: of the same layer, for the patches.
            latents: (m, h, n, d_head), keys or values.

        Returns:
            (m, h, f · p + n, d_head).
        """
        weight, shift = linear.weight * norm.weight, None
        if isinstance(norm, nn.LayerNorm):
            shift = F.linear(norm.bias, linear.weight)
        if self.times is None:
            return _project(self.normalised, weight, shift, latents)
        weight = as_autocast(weight)
        shift = as_autocast(shift) if shift is not None else None
        return _TimedProjection.apply(
            self.normalised, self.inverse_std, self.times, weight, shift, latents
        )


def _normalise(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """x̂ and by what x was multiplied for it: (..., d) -> (..., d), (..., 1)."""
    if isinstance(norm, nn.LayerNorm):
        normalised, _, inverse_std = torch.native_layer_norm(x, x.shape[-1:], None, None, norm.eps)
        return normalised, inverse_std
    assert norm.eps is not None
    inverse_std = (x.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt()
    return x * inverse_std, inverse_std


def _project(normalised: Tensor, weight: Tensor, shift: Tensor | None, latents: Tensor) -> Tensor:
    projected = F.linear(normalised, weight, shift)
    projected = rearrange(projected, "m s (h d) -> m h s d", h=latents.shape[1])
    return torch.cat([projected, latents], dim=2)


class _TimedProjection(torch.autograd.Function):
    """`_project` whose backward reaches the time embeddings and none of the frozen patches.

    With y = W x̂ + c, x̂ = r (x + e), r = 1 / |x + e| (the root mean square, for LayerNorm after the
    mean is taken off) and g the gradient of y, a patch gives its embedding e the gradient

        r (Wᵀg - x̂ ⟨Wᵀg, x̂⟩ / d), and for LayerNorm its mean is taken off.

    Wᵀ may come after the sum over the patches of a frame, and ⟨Wᵀg, x̂⟩ = ⟨g, y - c⟩. So no product
    of all patches with W is needed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        normalised: Tensor,
        inverse_std: Tensor,
        times: Tensor,
        weight: Tensor,
        shift: Tensor | None,
        latents: Tensor,
    ) -> Tensor:
        joined = _project(normalised, weight, shift, latents)
        ctx.save_for_backward(normalised, inverse_std, weight, shift, joined)
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        normalised, inverse_std, weight, shift, joined = ctx.saved_tensors
        (m, f, p), d = inverse_std.shape, normalised.shape[-1]
        latents = gradient[:, :, f * p :]
        inner = (gradient * joined).sum(dim=-1)[:, :, : f * p].sum(dim=1).view(m, f, p)
        gradient = rearrange(gradient[:, :, : f * p], "m h s d -> (m s) (h d)")
        if shift is not None:
            inner = inner - (gradient @ shift).view(m, f, p)
        by_frame = "(m f p) o -> (m f) p o"
        r = inverse_std.reshape(m * f, 1, p).to(weight.dtype)
        summed = (r @ rearrange(gradient, by_frame, m=m, f=f)).view(m, f, -1)
        times = (summed @ weight).float()
        if shift is not None:  # as only LayerNorm has
            times = times - times.mean(dim=-1, keepdim=True)
        along = (inner.float() * inverse_std / d).reshape(m * f, 1, p).to(weight.dtype)
        times = times - (along @ normalised.view(m * f, p, d)).view(m, f, d)
        return (
            None,
            None,
            times,
            gradient.T @ normalised.flatten(0, 1) if ctx.needs_input_grad[3] else None,
            gradient.sum(dim=0) if shift is not None else None,
            latents,
        )
