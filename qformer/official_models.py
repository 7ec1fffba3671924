"""Official weights as whole models: the vision encoder, stage 1, BLIP-2 and InstructBLIP."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from bridges.contract import VisionShape
from bridges.language import LanguageModel, add_image_token
from bridges.model import VisionLanguageModel
from bridges.official import take
from bridges.precision import Precision, resolve_dtype
from bridges.prompts import QUESTION
from bridges.soft_prefix import SoftPrefix
from bridges.vision import HFPreprocess, Preprocess, VisionEncoder
from qformer.key_maps import HF_LEAVES_OUT, NEVER_TAKEN
from qformer.official import OfficialCheckpoint, check_sizes, read_official
from qformer.official_files import read_config
from qformer.resampler import QFormer
from qformer.stage1 import Stage1


def load_vision(
    path: str | Path,
    *,
    preprocess: Preprocess | None = None,
    num_heads: int = 16,
    dtype: Precision = "auto",
) -> VisionEncoder:
    """The frozen encoder of an official checkpoint, as the Q-Former reads it.

    All tokens of its last block, CLS included, before the norm: that one is the Q-Former's.

    Args:
        path: a LAVIS ``.pth`` with EVA ViT-g in it, or an HF folder.
        preprocess: by default the folder's own, or BLIP's.
        num_heads: of a LAVIS encoder; a state dict does not tell them.
        dtype: of the frozen weights.

    Raises:
        ValueError: no encoder in the file (LAVIS leaves frozen weights out of many), or one of
            another shape.
    """
    import transformers as hf

    official = read_official(path, frozen=True)
    state = {k.removeprefix("vision."): t for k, t in official.state.items() if _is_vision(k)}
    if not state:
        raise ValueError(
            f"found no vision encoder in {path}; expected visual_encoder.… or vision_model.…: take "
            "a file that has it, or build the encoder from its own checkpoint"
        )
    for name in ("weight", "bias"):
        state[f"post_layernorm.{name}"] = official.state[f"qformer.ln_vision.{name}"]
    if official.config is not None:
        config = official.config.vision_config
    else:
        config = _eva_config(state, num_heads)
    instruct = official.form == "instructblip"
    model: Any = (hf.InstructBlipVisionModel if instruct else hf.Blip2VisionModel)(config)
    take(model, state, official.path)
    return _encoder(model.to(resolve_dtype(dtype)), preprocess, official.path)


def load_official_stage1(
    path: str | Path, *, vision: VisionShape, tokenizer: str | None = None
) -> tuple[Stage1, list[str]]:
    """Stage 1 from LAVIS's ``blip2_pretrain….pth`` or HF's ``Blip2ForImageTextRetrieval``.

    Args:
        path: as for `read_official`.
        vision: sizes of the encoder; see `qformer.official_models.load_vision`.
        tokenizer: of the text branch, see `QFormer`; BERT's with [DEC] for the published ones.
            None where token ids come from elsewhere.

    Returns:
        The model, and the names of its weights that the file has no place for and that are fresh
        therefore: the LM head and the temperature in HF's case.

    Raises:
        ValueError: another encoder's or tokenizer's sizes, or weights missing or left over.
    """
    return official_stage1(read_official(path), vision=vision, tokenizer=tokenizer)


def official_stage1(
    official: OfficialCheckpoint, *, vision: VisionShape, tokenizer: str | None = None
) -> tuple[Stage1, list[str]]:
    """Stage 1 from a checkpoint that is read already; see `load_official_stage1`."""
    sizes = official.sizes
    if "vision_projection.weight" not in official.state or sizes.vocab_size is None:
        raise ValueError(
            f"found no stage-1 heads or no text branch in {official.path}; expected a checkpoint "
            "of stage 1 (LAVIS: blip2_pretrained.pth, HF: Blip2ForImageTextRetrieval): for stage 2 "
            "take QFormer.load_pretrained or load_blip2"
        )
    qformer = QFormer(
        vision=vision,
        tokenizer=tokenizer,
        ln_vision_eps=official.ln_vision_eps,
        **sizes.arguments(),
    )
    check_sizes(official, qformer)
    embed_dim = len(official.state["vision_projection.weight"])
    stage1 = Stage1(qformer, embed_dim=embed_dim)
    fresh: list[str] = []
    if official.form != "lavis":
        fresh = [name for name in stage1.state_dict() if name.partition(".")[0] in HF_LEAVES_OUT]
    take(stage1, official.state, official.path, fresh)
    return stage1, fresh


def load_blip2(
    folder: str | Path,
    *,
    tokenizer: Any | None = None,
    preprocess: Preprocess | None = None,
    prompt: str | None = None,
    dtype: Precision = "auto",
) -> VisionLanguageModel:
    """A whole model from HF's ``Blip2-`` or ``InstructBlipForConditionalGeneration``.

    Args:
        folder: a local folder with safetensors.
        tokenizer: of the LM; the folder's own by default.
        preprocess: the folder's own by default.
        prompt: what stands before a caption. By default image, BOS and, for InstructBLIP, the
            question, in the order in which these models were trained.
        dtype: of the two frozen ends. The Q-Former keeps full precision.

    Raises:
        ValueError: another model, an encoder-decoder LM, or weights missing or left over.
    """
    import transformers as hf

    folder = Path(folder)
    config = read_config(folder)
    if not config.use_decoder_only_language_model:
        raise ValueError(
            f"found the encoder-decoder {config.text_config.model_type!r} in {folder}; expected a "
            "causal LM: take the checkpoint with OPT or Vicuna, or QFormer.load_pretrained alone"
        )
    instruct = config.model_type == "instructblip"
    loaded: Any = (
        hf.InstructBlipForConditionalGeneration if instruct else hf.Blip2ForConditionalGeneration
    ).from_pretrained(
        folder,
        dtype=resolve_dtype(dtype),
        output_loading_info=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported below
    )
    theirs, report = loaded
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    wrong += [key for key in report["unexpected_keys"] if key not in NEVER_TAKEN]
    if wrong:
        raise ValueError(
            f"found {len(wrong)} weights missing, left over or of another shape in {folder}, first "
            f"{sorted(map(str, wrong))[0]}; expected those of a {type(theirs).__name__} and no "
            "other: fetch it again"
        )
    tokenizer = tokenizer or hf.AutoTokenizer.from_pretrained(folder)
    image_id = add_image_token(tokenizer)
    if config.image_token_index not in (None, image_id):
        raise ValueError(
            f"found image_token_index={config.image_token_index} in {folder} and a tokenizer that "
            f"has <image> at {image_id}; expected the model's own tokenizer"
        )
    official = read_official(folder)
    lm = LanguageModel(theirs.language_model, tokenizer)
    own = folder / "qformer_tokenizer"
    resampler = partial(
        QFormer,
        tokenizer=str(own) if own.is_dir() else None,
        ln_vision_eps=official.ln_vision_eps,
        **official.sizes.arguments(),
    )
    model = VisionLanguageModel.connect(
        _encoder(theirs.vision_model, preprocess, folder),
        lm,
        partial(SoftPrefix, resampler=resampler),
        prompt=prompt or f"{lm.image_token}{_bos(tokenizer)}{QUESTION if instruct else ''}",
    )
    take(model.bridge, _bridge_state(official), folder)
    return model.eval()


def _encoder(model: Any, preprocess: Preprocess | None, where: Path) -> VisionEncoder:
    import transformers as hf

    size = model.config.image_size
    if preprocess is None:
        names = ("preprocessor_config.json", "processor_config.json")
        if any((where / name).is_file() for name in names):
            preprocess = HFPreprocess(hf.AutoImageProcessor.from_pretrained(where))
        else:
            square = {"height": size, "width": size}
            preprocess = HFPreprocess(hf.BlipImageProcessor(size=square))
    return VisionEncoder(model, preprocess, layer=-1, drop_prefix=False, image_size=(size, size))


def _eva_config(state: dict[str, Tensor], num_heads: int) -> Any:
    import transformers as hf

    patches = state["embeddings.patch_embedding.weight"]
    side = round((state["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    return hf.Blip2VisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=len(state["encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=sum(name.endswith(".mlp.fc1.bias") for name in state),
        num_attention_heads=num_heads,
        image_size=side * patches.shape[-1],
        patch_size=patches.shape[-1],
        qkv_bias="encoder.layers.0.self_attn.qkv.bias" in state,
    )


def _bridge_state(official: OfficialCheckpoint) -> dict[str, Tensor]:
    """Names of a `SoftPrefix` around a Q-Former."""
    return {
        f"resampler.{k.removeprefix('qformer.')}" if k.startswith("qformer.") else k: tensor
        for k, tensor in official.state.items()
    }


def _is_vision(key: str) -> bool:
    return key.startswith("vision.")


def _bos(tokenizer: Any) -> str:
    """The BOS that a tokenizer puts before text by itself, else nothing."""
    ids = tokenizer("a")["input_ids"]
    adds = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if adds else ""
