"""The Q-Former against HF's BLIP-2, by itself and in the whole model."""

from functools import partial

import parity
import pytest
import tiny
import torch
import transformers as hf
from parity import small
from torch import nn
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from bridges import (
    DecoderShape,
    LanguageModel,
    SoftPrefix,
    VisionEncoder,
    VisionFeatures,
    VisionLanguageModel,
    VisionShape,
)
from qformer import QFormer

QUERIES, DIM, VISION_DIM, DEPTH = 5, 32, 24, 4


class Reference(nn.Module):
    """Query tokens → `Blip2QFormerModel`, on image features that pass a LayerNorm of their own."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(QUERIES, DIM))
        # LAVIS keeps this norm outside of the Q-Former, with torch's own eps.
        self.ln_vision = nn.LayerNorm(VISION_DIM)
        config = hf.Blip2QFormerConfig(
            hidden_size=DIM,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            intermediate_size=48,
            cross_attention_frequency=every,
            encoder_hidden_size=VISION_DIM,
            layer_norm_eps=1e-12,
            use_qformer_text_input=False,
        )
        self.qformer = Blip2QFormerModel(config).eval()

    def forward(self, patches):
        return self.qformer(
            query_embeds=self.query_tokens.expand(len(patches), -1, -1),
            encoder_hidden_states=self.ln_vision(patches),
        ).last_hidden_state


def names_of(depth: int, every: int, prefix: str = "") -> dict[str, str]:
    """Our names, after a prefix, to HF's."""
    names = {
        f"{prefix}queries": "query_tokens",
        f"{prefix}embedding_norm": "qformer.layernorm",
        f"{prefix}ln_vision": "ln_vision",
    }
    for layer in range(depth):
        ours, theirs = f"{prefix}layers.{layer}", f"qformer.encoder.layer.{layer}"
        blocks = {"self_attention": "attention", "cross_attention": "crossattention"}
        for mine, block in blocks.items():
            if mine == "cross_attention" and layer % every:
                continue
            norm = mine.replace("attention", "norm")
            names |= {
                f"{ours}.{mine}.q": f"{theirs}.{block}.attention.query",
                f"{ours}.{mine}.k": f"{theirs}.{block}.attention.key",
                f"{ours}.{mine}.v": f"{theirs}.{block}.attention.value",
                f"{ours}.{mine}.out": f"{theirs}.{block}.output.dense",
                f"{ours}.{norm}": f"{theirs}.{block}.output.LayerNorm",
            }
        names |= {
            f"{ours}.query_ff.up": f"{theirs}.intermediate_query.dense",
            f"{ours}.query_ff.out": f"{theirs}.output_query.dense",
            f"{ours}.query_norm": f"{theirs}.output_query.LayerNorm",
        }
    return names


@pytest.mark.parametrize("every", [1, 2, 3])
def test_query_stream(every: int):
    vision = VisionShape(VISION_DIM, 6, (2, 3))
    ours = QFormer(
        vision=vision,
        num_queries=QUERIES,
        dim=DIM,
        depth=DEPTH,
        num_heads=4,
        ff_dim=48,
        cross_attention_every=every,
    )
    theirs = Reference(every)
    pairs = parity.pair_up(ours, theirs, names_of(DEPTH, every))
    parity.copy_weights(pairs)
    a = small(2, 3, 6, VISION_DIM)
    b = a.detach().flatten(0, 1).requires_grad_()
    mask = torch.ones(2, 3, dtype=torch.bool)
    out = ours(VisionFeatures(a, mask, (2, 3)))
    parity.assert_parity(pairs, (out, theirs(b).unflatten(0, (2, 3))), [(a, b)])


def test_defaults_have_the_published_size():
    with torch.device("meta"):
        ours = QFormer(vision=VisionShape(1408, 257, (16, 16)))
        config = hf.Blip2QFormerConfig(encoder_hidden_size=1408)
        theirs = Blip2QFormerModel(config)
    queries, ln_vision = 32 * 768, 2 * 1408
    assert ours.num_tokens == 32
    assert size_of(ours) == size_of(theirs) + queries + ln_vision


def size_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def bridge_of(vision: VisionShape, decoder: DecoderShape) -> SoftPrefix:
    resampler = partial(QFormer, num_queries=QUERIES, dim=DIM, depth=DEPTH, num_heads=4, ff_dim=48)
    return SoftPrefix(vision=vision, decoder=decoder, resampler=resampler)


@torch.no_grad()
def test_whole_model():
    tokenizer = tiny.make_tokenizer()
    size = (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    config = hf.Blip2Config(
        vision_config={
            "hidden_size": VISION_DIM,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": size[0],
            "patch_size": 4,
            # HF has 1e-6 here, LAVIS (and we) 1e-5 in ln_vision.
            "layer_norm_eps": 1e-5,
        },
        qformer_config={
            "hidden_size": DIM,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "use_qformer_text_input": False,
        },
        text_config=tiny.CONFIGS["opt"]().to_dict(),
        num_query_tokens=QUERIES,
        image_text_hidden_size=8,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    theirs = hf.Blip2ForConditionalGeneration(config).eval()
    tiny.randomise(theirs)

    lm = tiny.causal_lm("opt")
    lm.load_state_dict(theirs.language_model.state_dict())
    # BLIP-2 keeps CLS; the norm after the last block is the Q-Former's ln_vision.
    vision = VisionEncoder(
        theirs.vision_model, tiny.preprocess, layer=-1, drop_prefix=False, image_size=size
    )
    ours = VisionLanguageModel.connect(vision, LanguageModel(lm, tokenizer), bridge_of)
    names = names_of(DEPTH, 2, "resampler.") | {"projection": "language_projection"}
    names["resampler.ln_vision"] = "vision_model.post_layernorm"
    found = dict(theirs.named_parameters())
    for name, parameter in ours.bridge.named_parameters():
        (prefix,) = [p for p in names if name == p or name.startswith(f"{p}.")]
        partner = found[names[prefix] + name.removeprefix(prefix)]
        parameter.copy_(partner.reshape(parameter.shape))

    pixels = torch.randn(2, 3, *size)
    text = ours.prompt_encoder()(["<image>a", "<image>longer"])
    features = vision.encode(pixels[:, None])
    found = ours.logits(text.input_ids, text.attention_mask, features)
    expected = theirs(
        pixel_values=pixels,
        input_ids=text.input_ids,
        attention_mask=text.attention_mask.long(),
    ).logits
    parity.close(found[text.attention_mask], expected[text.attention_mask], "logits")
    other = ours.logits(text.input_ids, text.attention_mask, vision.encode(pixels.flip(0)[:, None]))
    assert (other - found).abs().max() > 1e-2
