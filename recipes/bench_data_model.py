"""A small model with random weights, for `bridges bench data`."""

from functools import partial
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bridges import LanguageModel, SoftPrefix, VisionEncoder, VisionLanguageModel, add_image_token
from bridges.preprocess import HFPreprocess
from perceiver import PerceiverResampler
from recipes.bench_data_shards import captions


def small_model(pixels: int, width: int, layers: int) -> VisionLanguageModel:
    """Random weights: a ViT/16 that reads as CLIP does, a Perceiver, a Llama of two blocks.

    Args:
        pixels: side of what the ViT reads.
        width: of the ViT and of the LM.
        layers: of the ViT.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = hf.ViTModel(
            hf.ViTConfig(
                image_size=pixels,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=3,
            ),
            add_pooling_layer=False,
        )
        tokenizer = _tokenizer()
        llama = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=2,
                num_attention_heads=3,
            )
        )
        processor = hf.CLIPImageProcessor(
            size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}
        )
        vision = VisionEncoder(encoder, HFPreprocess(processor), image_size=(pixels, pixels))
        bridge = partial(SoftPrefix, resampler=partial(PerceiverResampler, depth=2, num_latents=32))
        return VisionLanguageModel.connect(vision, LanguageModel(llama, tokenizer), bridge)


def _tokenizer() -> Any:
    """Byte-level BPE, as LMs have it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<pad>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    core.train_from_iterator(captions(100), trainer)
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>"
    )
    add_image_token(tokenizer)
    return tokenizer
