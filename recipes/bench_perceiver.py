"""The workloads of `bridges bench perceiver`: the Perceiver Resampler beside two references."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from bridges.contract import VisionFeatures, VisionShape
from bridges.precision import Precision
from perceiver import PerceiverResampler
from recipes.bench_pair import Leaf, Pair, pair_workload, weight_leaves
from recipes.workload import Workload


@dataclass(frozen=True)
class Sizes:
    """Sizes of a resampler and of what it reads.

    Attributes:
        media: images or clips.
        frames: of each of them, read together.
        patches: of a frame.
        dim: width of patches and latents.
        depth: layers.
        heads: of attention.
        head_dim: width of a head.
        latents: tokens of an image or clip.
    """

    media: int
    frames: int
    patches: int
    dim: int
    depth: int = 6
    heads: int = 8
    head_dim: int = 64
    latents: int = 64


IMAGES = Sizes(media=8, frames=1, patches=257, dim=1280, heads=16, head_dim=96)
"""Of IDEFICS-1's resampler behind CLIP ViT-H."""

LONG_CLIP = Sizes(media=2, frames=8, patches=257, dim=1280, heads=16, head_dim=96)
"""The same over clips of 8 frames."""

CLIPS = Sizes(media=2, frames=8, patches=256, dim=1024)
"""Of OpenFlamingo's resampler behind CLIP ViT-L, over the 8 frames of Flamingo's clips."""


def perceiver_workloads(
    device: torch.device,
    images: Sizes = IMAGES,
    long_clip: Sizes = LONG_CLIP,
    clips: Sizes = CLIPS,
) -> dict[str, Callable[[], Workload]]:
    """All workloads on a device, by name; a GPU gets 16 times the media."""
    many = 16 if device.type == "cuda" else 1
    ways: dict[str, tuple[Callable[[Sizes, torch.device, Precision], Pair], Sizes]] = {
        "hf-images": (hugging_face, images),
        "hf-8-frames": (hugging_face, long_clip),
        "flamingo-pytorch-8-frames": (flamingo_pytorch, clips),
    }
    builders = {}
    for name, (way, sizes) in ways.items():
        sizes = Sizes(**(asdict(sizes) | {"media": many * sizes.media}))
        for dtype in ("bf16",) if device.type == "cuda" else ("fp32", "bf16"):
            key = f"{name}-{dtype}"
            builders[key] = partial(pair_workload, key, way, sizes, dtype, device)
    return builders


def hugging_face(sizes: Sizes, device: torch.device, dtype: Precision) -> Pair:
    """Hugging Face's resampler of IDEFICS-1, in its own configuration.

    It knows no time: it reads a clip as one long row of patches, and so does ours here.
    """
    features = _features(sizes, device)
    mine = _ours(sizes, device, activation="relu")
    config = IdeficsConfig(vision_config={"embed_dim": sizes.dim})
    theirs = IdeficsPerceiverResampler(
        config, sizes.dim, sizes.depth, sizes.heads, sizes.head_dim, sizes.latents
    ).to(device)
    names = {"latents": "latents", "norm": "layer_norm"}
    for n in range(sizes.depth):
        ours, attention, feed_forward = f"layers.{n}", f"blocks.{n}.0", f"blocks.{n}.1"
        names |= {
            f"{ours}.features_norm": f"{attention}.context_layer_norm",
            f"{ours}.latents_norm": f"{attention}.latents_layer_norm",
            f"{ours}.attention.q": f"{attention}.q_proj",
            f"{ours}.attention.k": f"{attention}.k_proj",
            f"{ours}.attention.v": f"{attention}.v_proj",
            f"{ours}.attention.out": f"{attention}.output_proj",
            f"{ours}.ff_norm": f"{feed_forward}.ln",
            f"{ours}.ff.up": f"{feed_forward}.fc",
            f"{ours}.ff.out": f"{feed_forward}.c_proj",
        }
    leaves = weight_leaves(mine, theirs, names)
    return _pair(mine, lambda: theirs(features.patches[:, 0]), features, leaves, dtype)


class FlamingoPytorchClips(nn.Module):
    """flamingo-pytorch's resampler over clips.

    The package reads every frame by itself. Here its modules read all frames of a clip together,
    as Flamingo's do: a time embedding is added to each frame, and the frames are given as one.

    Raises:
        ImportError: flamingo-pytorch is not installed.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        try:
            from flamingo_pytorch import PerceiverResampler as Reference
        except ImportError as error:
            raise ImportError(
                "this workload measures beside flamingo-pytorch: pip install 'bridges[bench]'"
            ) from error
        self.resampler = Reference(
            dim=sizes.dim,
            depth=sizes.depth,
            dim_head=sizes.head_dim,
            heads=sizes.heads,
            num_latents=sizes.latents,
            num_media_embeds=1,
        )
        nn.init.zeros_(self.resampler.media_pos_emb).requires_grad_(False)
        self.time_embedding = nn.Parameter(torch.zeros(sizes.frames, sizes.dim))

    def forward(self, frames: Tensor) -> Tensor:
        """Shape: (m, f, p, d) -> (m, n, d)."""
        clips = rearrange(frames + self.time_embedding[:, None], "m f p d -> m 1 (f p) d")
        return self.resampler(clips)[:, 0]


def flamingo_pytorch(sizes: Sizes, device: torch.device, dtype: Precision) -> Pair:
    """flamingo-pytorch's resampler, over clips.

    Raises:
        ImportError: flamingo-pytorch is not installed.
    """
    features = _features(sizes, device)
    mine = _ours(sizes, device, num_frames=sizes.frames)
    theirs = FlamingoPytorchClips(sizes).to(device)
    names = {
        "latents": "resampler.latents",
        "norm": "resampler.norm",
        "time_embedding": "time_embedding",
    }
    for n in range(sizes.depth):
        ours, attention, feed_forward = (
            f"layers.{n}",
            f"resampler.layers.{n}.0",
            f"resampler.layers.{n}.1",
        )
        names |= {
            f"{ours}.features_norm": f"{attention}.norm_media",
            f"{ours}.latents_norm": f"{attention}.norm_latents",
            f"{ours}.attention.q": f"{attention}.to_q",
            f"{ours}.attention.out": f"{attention}.to_out",
            f"{ours}.ff_norm": f"{feed_forward}.0",
            f"{ours}.ff.up": f"{feed_forward}.1",
            f"{ours}.ff.out": f"{feed_forward}.3",
        }
    leaves = weight_leaves(mine, theirs, names)
    # Its keys and values come from one matrix.
    inner = sizes.heads * sizes.head_dim
    weights = dict(mine.named_parameters())
    joined = dict(theirs.named_parameters())
    for n in range(sizes.depth):
        both = joined[f"resampler.layers.{n}.0.to_kv.weight"]
        for part, rows in (("k", slice(None, inner)), ("v", slice(inner, None))):
            name = f"layers.{n}.attention.{part}.weight"
            both.data[rows] = weights[name].data
            leaves.append(Leaf(name, weights[name], both, rows))
    frames = rearrange(features.patches[:, 0], "m (f p) d -> m f p d", f=sizes.frames)
    return _pair(mine, lambda: theirs(frames), features, leaves, dtype)


def _features(sizes: Sizes, device: torch.device) -> VisionFeatures:
    """Random and frozen, without padding; a sample is one image or clip."""
    random = torch.Generator().manual_seed(0)
    shape = (sizes.media, 1, sizes.frames * sizes.patches, sizes.dim)
    real = torch.ones(sizes.media, 1, sizes.frames, dtype=torch.bool, device=device)
    return VisionFeatures(
        torch.randn(shape, generator=random).to(device),
        real[..., 0],
        (1, sizes.patches),
        None if sizes.frames == 1 else real,
    )


def _ours(sizes: Sizes, device: torch.device, **options: Any) -> PerceiverResampler:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        mine = PerceiverResampler(
            vision=VisionShape(sizes.dim, sizes.patches, (1, sizes.patches)),
            num_latents=sizes.latents,
            depth=sizes.depth,
            num_heads=sizes.heads,
            head_dim=sizes.head_dim,
            **options,
        )
        for parameter in mine.parameters():
            if parameter.ndim == 1:  # norms start as if they had no scale and shift
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return mine.to(device)


def _pair(
    mine: PerceiverResampler,
    reference: Callable[[], Tensor],
    features: VisionFeatures,
    leaves: list[Leaf],
    dtype: Precision,
) -> Pair:
    random = torch.Generator().manual_seed(2)
    shape = (len(features.patches), mine.num_tokens, mine.dim)
    gradient = torch.randn(shape, generator=random).to(features.patches.device)
    return Pair(lambda: mine(features)[:, 0], reference, leaves, gradient, dtype != "fp32")
