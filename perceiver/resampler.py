"""Flamingo's Perceiver Resampler."""

from pathlib import Path
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from bridges.attention import NORMS, Attention
from bridges.contract import Instruction, Resampler, VisionFeatures, VisionShape
from bridges.feed_forward import FeedForward
from perceiver.frames import frame_positions, interpolate
from perceiver.patches import Patches

Activation = Literal["gelu", "relu", "squared_relu", "swiglu"]


class PerceiverLayer(nn.Module):
    """latents += attention(latents, [features; latents]); latents += feed_forward(latents).

    Args:
        dim: width of latents and features.
        num_heads: see `PerceiverResampler`, as all that follow.
        num_kv_heads: see there.
        head_dim: see there.
        ff_mult: see there.
        activation: see there.
        norm: see there.
        norm_eps: see there.
        qk_norm: see there.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int,
        ff_mult: int,
        activation: Activation,
        norm: Literal["layer", "rms"],
        norm_eps: float,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.features_norm = NORMS[norm](dim, eps=norm_eps)
        self.latents_norm = NORMS[norm](dim, eps=norm_eps)
        self.attention = Attention(
            dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            qk_norm=NORMS[norm] if qk_norm else None,
            norm_eps=norm_eps,
        )
        self.ff_norm = NORMS[norm](dim, eps=norm_eps)
        if activation == "swiglu":
            self.ff = FeedForward(dim, ff_mult * dim, "silu", gated=True)
        else:
            self.ff = FeedForward(dim, ff_mult * dim, activation)

    def forward(self, patches: Patches, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """Reads the patches and the latents themselves.

        Args:
            patches: of m images or clips.
            latents: (m, n, d).
            mask: bool (m, 1, 1, s + n), which patches and latents may be read; all by default.

        Returns:
            (m, n, d).
        """
        block, queries = self.attention, self.latents_norm(latents)
        keys, values = (
            patches.project(
                linear,
                self.features_norm,
                rearrange(linear(queries), "m n (h d) -> m h n d", h=block.num_kv_heads),
            )
            for linear in (block.k, block.v)
        )
        latents = latents + block(queries, (block.norm_keys(keys), values), mask)
        return latents + self.ff(self.ff_norm(latents))


class PerceiverResampler(Resampler):
    """A fixed number of learned latents read the patches of each image or clip.

    All frames of a clip are read together. With `num_frames`, what a frame shows is told apart
    from when: a learned embedding is added to all its patches. An image is a clip of one frame.
    Images have no spatial position embedding (Flamingo A.1.1), the encoder's features carry their
    places. Padding frames are masked, padding images give zeros.

    The defaults are OpenFlamingo's (8 heads of width 64, GELU, the encoder's width). Others:

    - Flamingo: ``dim: 1536, num_heads: 16, head_dim: 96, activation: squared_relu, num_frames: 8``;
    - IDEFICS-1: ``num_heads: 16, head_dim: 96, activation: relu``, some with ``qk_norm: true``;
    - Idefics2: ``dim: 4096, depth: 3, num_heads: 16, num_kv_heads: 4, head_dim: 96, activation:
      swiglu, norm: rms, norm_eps: 1.0e-6, latents_init: ones, projection: swiglu, projection_dim:
      14336``.

    Its parameters: ``latents``, ``time_embedding`` (num_frames, dim; only with `num_frames`),
    ``input`` (nothing, ``weight`` and ``bias``, or ``gate``, ``up`` and ``out``), ``norm``, and in
    ``layers.N`` ``features_norm``, ``latents_norm``, ``attention.{q,k,v,out}`` (with `qk_norm`
    ``q_norm`` and ``k_norm`` too), ``ff_norm``, ``ff.{up,out}`` (``gate`` too in a SwiGLU).

    Args:
        vision: sizes of the encoder.
        num_latents: tokens per image or clip.
        depth: number of layers.
        dim: width of the latents; the encoder's by default.
        num_heads: attention heads.
        num_kv_heads: heads of keys and values, if fewer (grouped-query attention).
        head_dim: width of a head.
        ff_mult: the feed-forward is this many times wider than `dim`.
        activation: of the feed-forward; ``swiglu`` has a third linear layer as its gate.
        norm: LayerNorm or RMSNorm, everywhere.
        norm_eps: epsilon of all norms.
        qk_norm: such a norm on each head's queries and keys.
        latents_init: ``normal`` (standard deviation 1) or ``ones``.
        num_frames: frames with a learned time embedding, 0 for none. Clips may be longer or
            shorter: see `frame_positions`. Without any, the order of frames is lost.
        projection: of the features, before the layers: ``linear`` only if `dim` is not the
            encoder's width (the references have none), ``swiglu`` always.
        projection_dim: inner width of the SwiGLU projection; ``4 * dim`` by default.

    Shape: patches (b, i, f · p, d_vision) -> (b, i, num_latents, dim).

    Source: Flamingo (arXiv 2204.14198) section 2.1, figure 5 and appendix A.1.1; Idefics2
    (arXiv 2405.02246).
    """

    reads_video = True

    def __init__(
        self,
        *,
        vision: VisionShape,
        num_latents: int = 64,
        depth: int = 6,
        dim: int | None = None,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int = 64,
        ff_mult: int = 4,
        activation: Activation = "gelu",
        norm: Literal["layer", "rms"] = "layer",
        norm_eps: float = 1e-5,
        qk_norm: bool = False,
        latents_init: Literal["normal", "ones"] = "normal",
        num_frames: int = 0,
        projection: Literal["linear", "swiglu"] = "linear",
        projection_dim: int | None = None,
    ) -> None:
        super().__init__()
        if projection_dim is not None and projection != "swiglu":
            raise ValueError(
                f"found projection_dim={projection_dim} for a {projection} projection, which has "
                "no inner width; expected projection: swiglu, or no projection_dim"
            )
        self.num_tokens = num_latents
        self.dim = dim or vision.dim
        if projection == "swiglu":
            inner = projection_dim or 4 * self.dim
            self.input = FeedForward(vision.dim, inner, "silu", gated=True, out_dim=self.dim)
        elif self.dim != vision.dim:
            self.input = nn.Linear(vision.dim, self.dim)
        else:
            self.input = nn.Identity()
        init = torch.randn if latents_init == "normal" else torch.ones
        self.latents = nn.Parameter(init(num_latents, self.dim))
        self.time_embedding = (
            nn.Parameter(torch.randn(num_frames, self.dim)) if num_frames else None
        )
        self.layers = nn.ModuleList(
            PerceiverLayer(
                self.dim,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                ff_mult=ff_mult,
                activation=activation,
                norm=norm,
                norm_eps=norm_eps,
                qk_norm=qk_norm,
            )
            for _ in range(depth)
        )
        self.norm = NORMS[norm](self.dim, eps=norm_eps)

    def forward(self, vision: VisionFeatures, text: Instruction | None = None) -> Tensor:
        patches = rearrange(vision.patches, "b i (f p) d -> (b i) f p d", f=vision.num_frames)
        real = vision.image_mask[..., None]
        if vision.frame_mask is not None:
            real = real & vision.frame_mask
        tokens = self._resample(patches, rearrange(real, "b i f -> (b i) f"))
        return rearrange(tokens, "(b i) n d -> b i n d", b=len(vision.image_mask))

    def load_pretrained(self, path: str | Path) -> None:
        """Takes the weights of an OpenFlamingo ``.pt`` or of an HF ``Idefics…`` folder.

        See `perceiver.official.load_resampler`.
        """
        from perceiver.official import load_resampler

        load_resampler(path, self)

    def _resample(self, patches: Tensor, real: Tensor) -> Tensor:
        """Only what has a real frame is computed; the rest gets zeros.

        Shape: patches (m, f, p, d_vision), real bool (m, f) -> (m, n, d).
        """
        if real.all():
            return self._read(patches, real)
        some = real.any(dim=1)
        rows = some.nonzero()[:, 0]
        if not len(rows):
            # One is computed all the same, so that every parameter has a gradient (of zero).
            rows = rows.new_zeros(1)
        kept = real[rows]
        mask = None
        if real.shape[1] > 1:
            own = kept.new_ones(len(kept), self.num_tokens)
            mask = torch.cat([repeat(kept, "m f -> m (f p)", p=patches.shape[2]), own], dim=1)
            mask = mask[:, None, None]
        # Padding may hold NaN, which a mask in attention would let through.
        found = self._read(patches[rows].masked_fill(~kept[..., None, None], 0.0), kept, mask)
        found = found.masked_fill(~some[rows, None, None], 0.0)
        return found.new_zeros(len(some), *found.shape[1:]).index_copy(0, rows, found)

    def _read(self, patches: Tensor, real: Tensor, mask: Tensor | None = None) -> Tensor:
        """Shape: as `_resample`, mask bool (m, 1, 1, f · p + n)."""
        times = None
        if self.time_embedding is not None:
            positions = frame_positions(real.sum(dim=1), real.shape[1], len(self.time_embedding))
            times = interpolate(self.time_embedding, positions)
        blocks = [layer for layer in self.layers if isinstance(layer, PerceiverLayer)]
        features = Patches.of(self.input(patches), times, self.norm)
        latents = repeat(self.latents, "n d -> m n d", m=len(patches))
        for block in blocks:
            latents = block(features, latents, mask)
        return self.norm(latents)
