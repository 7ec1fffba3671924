"""The contract between a frozen vision encoder, a bridge and a frozen causal LM.

Two independent choices make a bridge: which tokens are made of an image (a `Resampler`) and
how the LM reads them (a `Bridge`, which may insert layers into the LM). Letters used in shapes
throughout the project: b batch, i images per sample, p patches per image, n soft tokens per
image, m memory tokens per image, t text positions, d width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor, nn

from bridges.condition import Condition

if TYPE_CHECKING:
    from bridges.language import LanguageModel

Site = Literal["layer_input", "attention_output"]


@dataclass(frozen=True)
class VisionFeatures:
    """What a frozen vision encoder says about the images of a batch.

    Attributes:
        patches: (b, i, p, d_vision). Patches are in row-major order, after any prefix tokens
            (CLS, registers) that were kept: ``p = prefix + rows * columns``. Of a clip they
            stand frame after frame: (b, i, f · p, d_vision).
        image_mask: bool (b, i); False marks a padding image, whose patches may be anything.
        grid: rows and columns of the patches (of one frame).
        frame_mask: bool (b, i, f), False for a padding frame, whose patches may be anything;
            real frames come first. None for pictures, which have one frame each.
    """

    patches: Tensor
    image_mask: Tensor
    grid: tuple[int, int]
    frame_mask: Tensor | None = None

    @property
    def num_frames(self) -> int:
        """Frames of each image or clip, padding included."""
        return 1 if self.frame_mask is None else self.frame_mask.shape[2]

    def __post_init__(self) -> None:
        if self.patches.ndim != 4 or self.image_mask.shape != self.patches.shape[:2]:
            raise ValueError(
                f"found patches {tuple(self.patches.shape)} and image_mask "
                f"{tuple(self.image_mask.shape)}; expected (b, i, p, d) and (b, i): for one image "
                "a sample add the image axis with patches[:, None]"
            )
        frames = self.frame_mask
        if frames is not None and (
            frames.shape[:-1] != self.image_mask.shape or self.patches.shape[2] % frames.shape[-1]
        ):
            raise ValueError(
                f"found frame_mask {tuple(frames.shape)} for patches {tuple(self.patches.shape)}; "
                "expected (b, i, f), and patches (b, i, f · p, d): flatten frames and patches"
            )
        rows, columns = self.grid
        if rows * columns > self.patches.shape[2] // self.num_frames:
            raise ValueError(
                f"found {self.patches.shape[2] // self.num_frames} patches a frame for a "
                f"{rows}×{columns} grid; expected at least rows × columns of them"
            )


@dataclass(frozen=True)
class Instruction:
    """Text that a resampler may read beside the image (InstructBLIP).

    Attributes:
        input_ids: (b, t), in the vocabulary of the resampler's own text branch.
        attention_mask: bool (b, t); False marks padding.
    """

    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a frozen vision encoder that a resampler needs to build itself.

    Attributes:
        dim: width of a patch.
        num_patches: patches per image, kept prefix tokens included.
        grid: rows and columns of the patches.
    """

    dim: int
    num_patches: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a frozen LM that a bridge may need to build itself.

    Attributes:
        dim: width of the LM's residual stream and token embeddings.
        num_layers: number of decoder blocks.
        num_heads: attention heads of one block.
        embedding_std: root mean square of the LM's token embeddings, the scale at which the
            LM's first block is used to receive its input.
    """

    dim: int
    num_layers: int
    num_heads: int
    embedding_std: float = 1.0


class Resampler(nn.Module, ABC):
    """Turns the patches of every image into ``num_tokens`` tokens of width ``dim``.

    Set both attributes in ``__init__``; the constructor takes ``vision`` as a keyword. A class
    that reads clips (`VisionFeatures.frame_mask`) sets ``reads_video``; the others are never
    given any.
    """

    num_tokens: int
    dim: int
    reads_video: bool = False

    @abstractmethod
    def forward(self, vision: VisionFeatures, text: Instruction | None = None) -> Tensor:
        """Resamples each image by itself.

        Shape: patches (b, i, p, d_vision) -> (b, i, n, dim).
        """

    def load_pretrained(self, path: str | Path) -> None:
        """Takes weights that were trained elsewhere, where a resampler knows such a form.

        Raises:
            ValueError: it knows none, or these do not fit.
        """
        raise ValueError(
            f"found weights to start from ({path}) for {type(self).__name__}, which has no form "
            "of them; expected a resampler that has (qformer.QFormer, "
            "perceiver.PerceiverResampler): leave init_from out"
        )


@dataclass(frozen=True)
class BridgeOutput:
    """What a bridge hands to the LM.

    Attributes:
        soft_tokens: (b, i, n, d_lm), they fill the image's placeholders.
        memory: (b, i, m, d_memory), read by the inserted layers, or None.
        losses: auxiliary losses by name, each a scalar added to the training loss.
        next_image: bool (b), rows whose text reads the first image after it in the place of the
            latest before it (Flamingo's augmentation of web pages); None for no row.
    """

    soft_tokens: Tensor
    memory: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    next_image: Tensor | None = None


class InsertedModule(Protocol):
    """A module that rewrites an activation inside the LM; it must be an ``nn.Module``."""

    def __call__(self, hidden: Tensor, condition: Condition) -> Tensor:
        """Shape: hidden (b, t, d_lm) -> (b, t, d_lm)."""
        ...


@dataclass(frozen=True)
class LayerInsert:
    """Puts ``module`` into decoder block ``layer`` of the LM.

    Attributes:
        layer: index of the decoder block, from 0.
        site: ``layer_input`` rewrites the residual stream before the block (gated
            cross-attention); ``attention_output`` rewrites what the block's self-attention
            returns, before it joins the residual stream (LLaMA-Adapter).
        module: a submodule of the bridge, called as ``module(hidden, condition)``.
    """

    layer: int
    site: Site
    module: InsertedModule


class Bridge(nn.Module, ABC):
    """Everything trainable between the two frozen ends.

    Every image owns ``num_tokens >= 1`` placeholders in the text, filled by soft tokens; a
    bridge that speaks to the LM through inserted layers emits one learned marker. The trainer,
    the collator and generation never ask which kind of bridge they have.

    The constructor takes ``vision`` and ``decoder`` as keywords (see `BridgeFactory`).
    """

    num_tokens: int

    @abstractmethod
    def forward(self, vision: VisionFeatures, text: Instruction | None = None) -> BridgeOutput:
        """Makes soft tokens, and memory where layers are inserted, of every image."""

    def inserts(self) -> Sequence[LayerInsert]:
        """The layers to put into the LM; none by default."""
        return ()

    def load_pretrained(self, path: str | Path, lm: "LanguageModel") -> None:
        """Takes weights that were trained elsewhere: by default, those of its resampler.

        Args:
            path: a file or folder in a form that this bridge or its resampler knows.
            lm: the LM, for weights that belong to its new tokens.

        Raises:
            ValueError: they know none, or these do not fit.
        """
        load = getattr(getattr(self, "resampler", None), "load_pretrained", None)
        if load is None:
            raise ValueError(
                f"found weights to start from ({path}) for a {type(self).__name__}, which has no "
                "resampler that can be given any; expected a bridge or a resampler with "
                "load_pretrained: leave init_from out"
            )
        load(path)


class ResamplerFactory(Protocol):
    """Builds a resampler once the sizes of the vision encoder are known."""

    def __call__(self, *, vision: VisionShape) -> Resampler: ...


class BridgeFactory(Protocol):
    """Builds a bridge once both frozen ends are known.

    In Python: ``functools.partial(SoftPrefix, resampler=partial(PerceiverResampler, depth=2))``.
    In YAML: ``class_path`` and ``init_args`` without the two arguments below. So widths flow from
    the frozen ends and nobody types them.
    """

    def __call__(self, *, vision: VisionShape, decoder: DecoderShape) -> Bridge: ...
