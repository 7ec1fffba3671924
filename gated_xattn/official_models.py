"""Official weights as whole models: HF's Idefics."""

from pathlib import Path
from typing import Any

from torch import Tensor

from bridges.build import bridge_factory
from bridges.language import IMAGE_TOKEN, LanguageModel
from bridges.model import VisionLanguageModel
from bridges.official import read_config, read_safetensors, some
from bridges.precision import Precision, resolve_dtype
from bridges.vision import HFPreprocess, Preprocess, VisionEncoder
from gated_xattn.bridge import GatedXAttn
from gated_xattn.key_maps import FAKE_TOKEN
from gated_xattn.official import load_bridge

VISION = "model.vision_model."
LLAMA = ("model.layers.", "model.norm.", "model.embed_tokens.weight", "lm_head.weight")
"""Beginnings of the keys of HF's Idefics that are a Llama's, under the same names."""

VISION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)
"""What the configs of HF's Idefics vision tower and of CLIP's, its copy, have both."""

LANGUAGE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""What the configs of HF's Idefics and of Llama, whose blocks it has, have both."""


def load_idefics(
    folder: str | Path,
    *,
    tokenizer: Any | None = None,
    preprocess: Preprocess | None = None,
    prompt: str | None = None,
    dtype: Precision = "auto",
) -> VisionLanguageModel:
    """A whole model from HF's ``IdeficsForVisionText2Text``.

    Its vision tower becomes a ``CLIPVisionModel``, all tokens of whose last block are read, CLS
    included; its LM a ``LlamaForCausalLM``; its added tokens trained rows beside the LM's
    vocabulary; its ``<image>`` the bridge's marker. Our logits have no column for ``<image>``
    (HF has one, which its loss never asks for).

    Args:
        folder: a local folder with safetensors.
        tokenizer: of the LM; the folder's own by default.
        preprocess: the folder's own settings by default.
        prompt: what stands before a caption; by default BOS and the image between its two
            ``<fake_token_around_image>``, as HF's processor has it.
        dtype: of the two frozen ends. The bridge keeps full precision.

    Raises:
        ValueError: another model, one that HF itself cannot run, or weights missing or left over.
    """
    import transformers as hf

    folder = Path(folder)
    config = read_config(folder, "idefics")
    bridge = idefics_bridge(config)
    words: Any = tokenizer or hf.AutoTokenizer.from_pretrained(folder)
    added = _added_tokens(config, words)

    def leave(key: str) -> str | None:
        return None if key.startswith((VISION, *LLAMA)) else "the bridge's"

    state, _ = read_safetensors(folder, leave)
    buffers = (".rotary_emb.inv_freq", "embeddings.position_ids")  # of older versions
    state = {k: t for k, t in state.items() if not k.endswith(buffers)}
    tower = {k.removeprefix(VISION): t for k, t in state.items() if k.startswith(VISION)}
    llama = {k: t for k, t in state.items() if not k.startswith(VISION)}
    model = _build(hf.CLIPVisionModel, vision_config(config), tower, folder, dtype)
    lm = LanguageModel(
        _build(hf.LlamaForCausalLM, language_config(config), llama, folder, dtype),
        words,
        new_tokens=added,
    )
    side = config.vision_config.image_size
    vision = VisionEncoder(
        model,
        preprocess or idefics_preprocess(folder, side),
        drop_prefix=False,
        image_size=(side, side),
    )
    fake = FAKE_TOKEN if FAKE_TOKEN in words.get_vocab() else ""
    whole = VisionLanguageModel.connect(
        vision,
        lm,
        bridge_factory(bridge),
        prompt=prompt or f"{words.bos_token or ''}{fake}{IMAGE_TOKEN}{fake}",
    )
    assert isinstance(whole.bridge, GatedXAttn)
    load_bridge(folder, whole.bridge, lm)
    return whole.eval()


def idefics_bridge(config: Any) -> dict[str, Any]:
    """The bridge of an ``IdeficsConfig``, as a YAML names it: class path and arguments.

    Raises:
        ValueError: a config that HF itself cannot run, or an activation that no bridge has.
    """
    if config.num_hidden_layers % config.cross_layer_interval:
        raise ValueError(
            f"found {config.num_hidden_layers} LM blocks and cross_layer_interval="
            f"{config.cross_layer_interval}; expected a divisor: HF's class fails on others"
        )
    if config.hidden_act != "silu":
        raise ValueError(
            f"found hidden_act={config.hidden_act!r}; expected 'silu', as in every published "
            "Idefics"
        )
    perceiver = config.perceiver_config
    resampler: dict[str, Any] = {"class_path": "bridges.Projector", "init_args": {"layers": 1}}
    if config.use_resampler:
        resampler = {
            "class_path": "perceiver.PerceiverResampler",
            "init_args": {
                "num_latents": perceiver.resampler_n_latents,
                "depth": perceiver.resampler_depth,
                "num_heads": perceiver.resampler_n_heads,
                "head_dim": perceiver.resampler_head_dim,
                "activation": "relu",
                "qk_norm": perceiver.qk_layer_norms_perceiver,
            },
        }
    dim, inner = config.hidden_size, config.intermediate_size
    # The bridge cuts the product off; a quotient may lie just below.
    ff_mult = inner / dim if int(inner / dim * dim) == inner else (inner + 0.5) / dim
    return {
        "class_path": "gated_xattn.GatedXAttn",
        "init_args": {
            "resampler": resampler,
            "every": config.cross_layer_interval,
            "first": 0,
            "num_heads": config.num_attention_heads,
            "head_dim": dim // config.num_attention_heads,
            "ff_mult": ff_mult,
            "norm": "rms",
            "norm_eps": config.rms_norm_eps,
            "feed_forward": "swiglu",
            "qk_norm": config.qk_layer_norms,
            "gate": "channel" if config.alpha_type == "vector" else "scalar",
        },
    }


def vision_config(config: Any) -> Any:
    """The ``CLIPVisionConfig`` of an ``IdeficsConfig``."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(**{name: getattr(config.vision_config, name) for name in VISION_FIELDS})


def language_config(config: Any) -> Any:
    """The ``LlamaConfig`` of an ``IdeficsConfig``."""
    from transformers import LlamaConfig

    return LlamaConfig(**{name: getattr(config, name) for name in LANGUAGE_FIELDS})


def idefics_preprocess(folder: Path, side: int) -> Preprocess:
    """What HF's Idefics image processor does to a picture: squashed to a square, CLIP's colours."""
    import transformers as hf

    options: dict[str, Any] = {}
    files = ("preprocessor_config.json", "processor_config.json")
    if any((folder / name).is_file() for name in files):
        theirs = hf.AutoImageProcessor.from_pretrained(folder)
        options = {"image_mean": theirs.image_mean, "image_std": theirs.image_std}
        side = theirs.size["height"]
    # CLIP's class has the same steps, and returns what `HFPreprocess` asks for.
    size = {"height": side, "width": side}
    return HFPreprocess(hf.CLIPImageProcessor(size=size, do_center_crop=False, **options))


def _added_tokens(config: Any, tokenizer: Any) -> list[str]:
    """The tokens whose rows HF's Idefics keeps beside its LM's, but for the image.

    Raises:
        ValueError: a tokenizer without the image among its rows.
    """
    ids = tokenizer.get_vocab()
    rows = config.vocab_size + config.additional_vocab_size
    if not 0 <= ids.get(IMAGE_TOKEN, -1) < rows:
        raise ValueError(
            f"found {IMAGE_TOKEN} at {ids.get(IMAGE_TOKEN)} in a tokenizer for {rows} token "
            "embeddings; expected the model's own tokenizer: give tokenizer"
        )
    added = [text for text, row in ids.items() if config.vocab_size <= row < rows]
    return sorted((text for text in added if text != IMAGE_TOKEN), key=ids.__getitem__)


def _build(cls: Any, config: Any, state: dict[str, Tensor], where: Path, dtype: Precision) -> Any:
    """An HF model of given weights.

    Raises:
        ValueError: weights missing, left over or of another shape.
    """
    model, report = cls.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=resolve_dtype(dtype),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below
    )
    kinds = ("missing_keys", "mismatched_keys", "unexpected_keys")
    if wrong := sorted(str(key) for kind in kinds for key in report[kind]):
        raise ValueError(
            f"found weights missing, left over or of another shape in {where}: {some(wrong)}; "
            f"expected those of a {cls.__name__} and no other: fetch it again"
        )
    return model
