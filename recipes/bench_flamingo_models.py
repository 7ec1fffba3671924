"""Both sides of `bridges bench flamingo_step`: an LM with gated blocks, ours and the usual way."""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from bridges import (
    LanguageModel,
    Projector,
    VisionEncoder,
    VisionLanguageModel,
    add_image_token,
)
from gated_xattn import GatedXAttn
from recipes.bench_flamingo_reference import ReferenceFlamingo

END = "<|endofchunk|>"
BOS = 2

NAMES = {
    "attn_norm.weight": "attn.norm.weight",
    "attn_norm.bias": "attn.norm.bias",
    "attn.q.weight": "attn.to_q.weight",
    "attn.out.weight": "attn.to_out.weight",
    "attn_gate": "attn_gate",
    "ff_norm.weight": "ff.0.weight",
    "ff_norm.bias": "ff.0.bias",
    "ff.up.weight": "ff.1.weight",
    "ff.out.weight": "ff.3.weight",
    "ff_gate": "ff_gate",
}
"""Parameters of our gated block in flamingo-pytorch's; its ``attn.to_kv`` joins our k and v."""


@dataclass(frozen=True)
class Sizes:
    """Of the LM (OPT-125M's), its text and its images.

    The images' tokens are as wide as the LM: flamingo-pytorch's block knows no other width.

    Attributes:
        vocab_size: rows of the embedding.
        words: of them those that the tokenizer has; the new tokens follow.
        dim: width.
        depth: blocks, with a gated block before each.
        num_heads: of a block; of a gated block too.
        text: positions.
        images: of each text.
        latents: tokens of an image.
    """

    vocab_size: int = 50272
    words: int = 50265
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    text: int = 256
    images: int = 5
    latents: int = 64


def build_models(
    sizes: Sizes, device: torch.device
) -> tuple[VisionLanguageModel, ReferenceFlamingo]:
    """Ours and the reference, with the same random weights and open gates.

    Ours starts at the images' tokens: a convolution stands for the encoder, whose only use is to
    say how wide they are, and a projector of no layers for the resampler.
    """
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.dim,
        word_embed_proj_dim=sizes.dim,
        ffn_dim=4 * sizes.dim,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.num_heads,
        max_position_embeddings=2048,
        dropout=0.0,
    )
    # Weights that bf16 holds exactly, so that the two precisions have the same.
    lm = OPTForCausalLM(config).bfloat16().float()
    encoder = VisionEncoder(
        nn.Conv2d(3, sizes.dim, 1),
        lambda _: torch.zeros(3, 1, sizes.latents),
        image_size=(1, sizes.latents),
    )
    tokenizer = _tokenizer(sizes.words)
    head_dim = sizes.dim // sizes.num_heads
    reference = copy.deepcopy(lm)
    ours = VisionLanguageModel.connect(
        encoder,
        LanguageModel(lm, tokenizer, end_of_chunk=END),
        partial(
            GatedXAttn,
            resampler=partial(Projector, layers=1),
            every=1,
            num_heads=sizes.num_heads,
            head_dim=head_dim,
        ),
    )
    new = [ours.lm.image_token_id, ours.lm.end_id]
    theirs = ReferenceFlamingo(reference, new, head_dim)
    _share_weights(ours, theirs)
    return ours.to(device), theirs.to(device)


@torch.no_grad()
def _share_weights(ours: VisionLanguageModel, reference: ReferenceFlamingo) -> None:
    """The reference gets our gated blocks, ours the reference's rows of the new tokens."""
    bridge, new = ours.bridge, ours.lm.new_tokens
    assert isinstance(bridge, GatedXAttn) and new is not None
    bridge.marker.copy_(reference.embedding[ours.lm.image_token_id][None])
    new.embedding.copy_(reference.embedding[ours.lm.end_id][None])
    for mine, theirs in zip(bridge.blocks, reference.blocks, strict=True):
        for name, (parameter, other, rows) in partners(mine, theirs).items():
            if name.endswith("gate"):
                parameter.fill_(0.5)
            other[rows] = parameter


def partners(
    ours: nn.Module, reference: nn.Module
) -> dict[str, tuple[nn.Parameter, nn.Parameter, slice]]:
    """By our names: our parameter of a gated block, the reference's, and the rows that are ours."""
    mine, theirs = dict(ours.named_parameters()), dict(reference.named_parameters())
    joined, keys = theirs["attn.to_kv.weight"], mine["attn.k.weight"].shape[0]
    found = {ours: (mine[ours], theirs[name], slice(None)) for ours, name in NAMES.items()}
    found["attn.k.weight"] = (mine["attn.k.weight"], joined, slice(None, keys))
    found["attn.v.weight"] = (mine["attn.v.weight"], joined, slice(keys, None))
    assert found.keys() == mine.keys()
    return found


def _tokenizer(words: int) -> PreTrainedTokenizerFast:
    names = {f"w{index}": index for index in range(words)}
    core = Tokenizer(WordLevel(names, unk_token="w3"))
    options = {"bos_token": f"w{BOS}", "eos_token": f"w{BOS}", "pad_token": "w1"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **options)
    add_image_token(tokenizer)
    return tokenizer
