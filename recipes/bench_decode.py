"""The workloads of `bridges bench decode`: an LM with gated cross-attention writes, greedily."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from bridges.condition import Condition, image_index
from bridges.contract import LayerInsert
from bridges.hooks import DecoderHooks
from gated_xattn import GatedCrossAttention
from gated_xattn.reading import read_masked
from recipes.workload import Side, Workload, matmul_precision

PRECISION = "highest"
"""torch's default, in which `bridges caption` writes: "medium" is set for training only.

It would round every weight of the LM anew for every token.
"""


@dataclass(frozen=True)
class Sizes:
    """An LM with random weights, its gated blocks, and what is to be written.

    Attributes:
        family: of the LM, ``llama`` or ``opt``; the sizes below are SmolLM2-135M's, a Llama.
        width: of the LM.
        ff_dim: inner width of the LM's feed-forward.
        layers: of the LM.
        heads: of the LM's attention.
        kv_heads: of a Llama's keys and values.
        vocab: rows of the embedding.
        every: a gated block before every n-th LM block.
        gated_heads: of a gated block, of width 64.
        ff_mult: a gated feed-forward is this many times wider than the LM.
        images: in the prompt of each sample.
        latents: tokens of an image.
        batch: samples.
        prompt: tokens of a prompt.
        new_tokens: written after it.
    """

    family: Literal["llama", "opt"] = "llama"
    width: int = 576
    ff_dim: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    vocab: int = 49152
    every: int = 4
    gated_heads: int = 8
    ff_mult: float = 4.0
    images: int = 1
    latents: int = 64
    batch: int = 1
    prompt: int = 32
    new_tokens: int = 24


SMOLLM2 = Sizes()
OPT = Sizes("opt", 768, 3072, layers=12, heads=12, vocab=50272, every=1, gated_heads=12)
"""OPT-125M with a gated block of the LM's own heads before every block."""

REPROJECTED = {
    f"{lm}-{name}": replace(sizes, images=images, batch=batch, new_tokens=new_tokens)
    for lm, sizes in {"opt-125m-every1": OPT, "smollm2-135m-every4": SMOLLM2}.items()
    for name, images, batch, new_tokens in (
        ("1-image", 1, 1, 24),
        ("5-images", 5, 1, 24),
        ("5-images-b8", 5, 8, 12),
    )
}
"""Beside the same blocks where the images are projected again at every token."""

BARE = {
    # The gated feed-forward of the shipped `gated_xattn_small`, and Flamingo's.
    "smollm2-135m-every4": replace(SMOLLM2, ff_mult=1.0, new_tokens=48),
    "smollm2-135m-every4-ff4": replace(SMOLLM2, new_tokens=48),
}
"""Beside the LM without gated blocks."""


class Reprojecting(GatedCrossAttention):
    """The same block as others decode with it: every call projects all images, under a mask."""

    def read(self, hidden: Tensor, condition: Condition) -> Tensor:
        return read_masked(self.attn, self.attn_norm, hidden, condition, self.visible)


class Writer:
    """An LM with gated blocks, and the prompts that it continues.

    Args:
        sizes: of everything.
        device: where it computes.
        block: the class of the gated blocks.
        gate: α and β of the blocks.
        keep: whether what was projected of the images is kept for the next token.
    """

    def __init__(
        self,
        sizes: Sizes,
        device: torch.device,
        block: type[GatedCrossAttention] = GatedCrossAttention,
        *,
        gate: float = 0.5,
        keep: bool = True,
    ) -> None:
        self.sizes, self.keep = sizes, keep
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same weights on both sides
            self.lm = _language_model(sizes).to(device)
            ids = torch.randint(0, sizes.vocab, (sizes.batch, sizes.prompt))
            shape = (sizes.batch, sizes.images, sizes.latents, sizes.width)
            self.memory = torch.randn(shape).to(device)
            layers = range(0, sizes.layers, sizes.every)
            ff_dim = int(sizes.ff_mult * sizes.width)
            options = {"num_heads": sizes.gated_heads, "ff_dim": ff_dim, "gate_init": gate}
            self.blocks = nn.ModuleList(
                block(sizes.width, sizes.width, **options) for _ in layers
            ).to(device)
        places = torch.arange(sizes.images) * (sizes.prompt // sizes.images)
        placeholders = torch.zeros(ids.shape, dtype=torch.bool)
        placeholders[:, places] = True
        self.placeholders = placeholders.to(device)
        self.ids = ids.to(device)
        self.cache = DynamicCache()
        inserts = [
            LayerInsert(layer, "layer_input", inserted)
            for layer, inserted in zip(layers, self.blocks, strict=True)
            if isinstance(inserted, GatedCrossAttention)
        ]
        self.hooks = DecoderHooks(self.lm, inserts, sizes.layers)

    @torch.no_grad()
    def read_prompt(self) -> None:
        """What comes before the first new token: the cache holds all of the prompt but its last.

        That one is the first step's, whose output is the first new token.
        """
        images = torch.ones(self.memory.shape[:2], dtype=torch.bool, device=self.memory.device)
        index = image_index(self.placeholders[:, :-1], 1)
        self.hooks.condition = Condition(self.memory, images, index, keep_projections=self.keep)
        self.cache = DynamicCache()
        with matmul_precision(PRECISION):
            self.lm.get_decoder()(input_ids=self.ids[:, :-1], past_key_values=self.cache)

    @torch.no_grad()
    def write(self, **options: Any) -> Any:
        """The new tokens, greedily, with HF's ``generate``; once for each `read_prompt`."""
        try:
            with matmul_precision(PRECISION):
                return self.lm.generate(
                    self.ids,
                    attention_mask=torch.ones_like(self.ids),
                    past_key_values=self.cache,
                    max_new_tokens=self.sizes.new_tokens,
                    min_new_tokens=self.sizes.new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                    **options,
                )
        finally:
            self.hooks.condition = None

    def kept_bytes(self) -> int:
        """What the images cost in memory from token to token, after `read_prompt`."""
        condition = self.hooks.condition
        kept = [] if condition is None else tree_leaves([*condition._kept.values()])
        return sum(x.nbytes for x in kept)


def decode_workloads(
    device: torch.device,
    reprojected: Mapping[str, Sizes] = REPROJECTED,
    bare: Mapping[str, Sizes] = BARE,
) -> dict[str, Callable[[], Workload]]:
    """All workloads on a device, by name."""
    ways = {name: partial(_beside_reprojected, name, s, device) for name, s in reprojected.items()}
    return ways | {name: partial(_beside_bare, name, s, device) for name, s in bare.items()}


def _beside_reprojected(name: str, sizes: Sizes, device: torch.device) -> Workload:
    ours = Writer(sizes, device)
    return _workload(name, ours, Writer(sizes, device, Reprojecting, keep=False))


def _beside_bare(name: str, sizes: Sizes, device: torch.device) -> Workload:
    # Behind closed gates the blocks compute all the same, and change nothing: so outputs are equal.
    ours, reference = Writer(sizes, device, gate=0.0), Writer(sizes, device, gate=0.0)
    reference.hooks.remove()
    return _workload(name, ours, reference)


def _workload(name: str, ours: Writer, reference: Writer) -> Workload:
    def checks(_: Mapping[str, int]) -> dict[str, float | None]:
        kept, results = [], []
        for side in (ours, reference):
            side.read_prompt()
            kept.append(side.kept_bytes())
            results.append(side.write(return_dict_in_generate=True, output_logits=True))
        written, expected = results
        found, wanted = (_losses(side) for side in (written, expected))
        logits = (torch.stack(side.logits) for side in (written, expected))
        return {
            "max_abs_loss_diff": float((found - wanted).abs().max()),
            "max_rel_grad_diff": None,
            "max_abs_logit_diff": float(torch.sub(*logits).abs().max()),
            "equal_tokens": float((written.sequences == expected.sequences).float().mean()),
            "ours_kept_bytes": kept[0],
            "reference_kept_bytes": kept[1],
        }

    shapes = asdict(ours.sizes) | {
        "gradients": "none: nothing is trained here",
        "float32_matmul_precision": PRECISION,
    }
    one, other = (Side(side.write, side.read_prompt) for side in (ours, reference))
    return Workload(name, shapes, "fp32", one, other, checks)


def _losses(written: Any) -> Tensor:
    """Of the tokens that were written: (b, t)."""
    logits = torch.stack(written.logits, dim=1).float()
    tokens = written.sequences[:, -logits.shape[1] :]
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")


def _language_model(sizes: Sizes) -> Any:
    if sizes.family == "opt":
        opt = OPTConfig(
            hidden_size=sizes.width,
            word_embed_proj_dim=sizes.width,
            ffn_dim=sizes.ff_dim,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            vocab_size=sizes.vocab,
        )
        return OPTForCausalLM(opt).eval().requires_grad_(False)
    llama = LlamaConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.ff_dim,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocab,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(llama).eval().requires_grad_(False)
