"""Linear and MLP projectors: one soft token for each patch."""

from torch import Tensor, nn

from bridges.contract import Instruction, Resampler, VisionFeatures, VisionShape


class Projector(Resampler):
    """LLaVA's projector: every patch becomes a token, positions and all.

    The reader that follows (`SoftPrefix`) owns the last linear layer, into the LM's width. So
    ``layers=1`` is LLaVA's linear projection (this module then passes the patches on) and
    ``layers=2`` is LLaVA-1.5's Linear–GELU–Linear.

    Args:
        vision: sizes of the encoder; `num_tokens` is its number of patches.
        layers: linear layers between patches and LM, the reader's one included.
        dim: width between the layers; the vision width by default (LLaVA-1.5 uses the LM's).

    Shape: patches (b, i, p, d_vision) -> (b, i, p, dim).

    Source: LLaVA (arXiv 2304.08485) section 4.1; LLaVA-1.5 (arXiv 2310.03744) section 3.3.
    """

    def __init__(self, *, vision: VisionShape, layers: int = 2, dim: int | None = None) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"found layers={layers}; expected 1 (linear) or more (MLP)")
        if layers == 1 and dim not in (None, vision.dim):
            raise ValueError(
                f"found dim={dim} with layers=1, which passes patches of width {vision.dim} on; "
                "leave dim out or set layers: 2"
            )
        self.num_tokens = vision.num_patches
        self.dim = dim or vision.dim
        stack: list[nn.Module] = []
        width = vision.dim
        for _ in range(layers - 1):
            stack += [nn.Linear(width, self.dim), nn.GELU()]
            width = self.dim
        self.layers = nn.Sequential(*stack)

    def forward(self, vision: VisionFeatures, text: Instruction | None = None) -> Tensor:
        found = vision.patches.shape[2]
        if found != self.num_tokens:
            raise ValueError(
                f"found {found} patches an image; expected the {self.num_tokens} of the encoder "
                "that this projector was built for: resize the images to its input size"
            )
        return self.layers(vision.patches)
