"""One Lightning module for every generative bridge."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric

from bridges import (
    BridgeFactory,
    LanguageModel,
    LanguageSource,
    LoRA,
    ModelOutput,
    RunSpec,
    VisionEncoder,
    VisionLanguageModel,
    VisionSource,
    save_run,
)
from bridges.language import IMAGE_TOKEN
from bridges.prompts import CAPTION_INSTRUCTION, QUESTION, instruction_tokenizer
from bridges.run import check_fingerprints
from qformer.runs import check_encoder, is_stage1_run
from recipes.batch import CaptionBatch, CaptionCollator
from recipes.data import CaptionData
from recipes.training import BridgeModule, OptimizerOptions


class CaptionModule(BridgeModule):
    """Trains a bridge to write: cross-entropy on the tokens of the caption, or answer, only.

    Args:
        vision: the frozen encoder.
        lm: the frozen LM.
        bridge: the bridge, by class path; its widths come from the two ends.
        optimizer: optimiser and schedule.
        prompt: what stands before a caption; must hold ``<image>``. With ``data.task:
            instruction``, ``{question}`` in it is the sample's question.
        init_from: weights that the bridge's resampler starts from, see its `load_pretrained`: a
            run of stage 1, or a checkpoint. Of no meaning once the run has begun.
    """

    def __init__(
        self,
        vision: VisionSource,
        lm: LanguageSource,
        bridge: BridgeFactory,
        optimizer: OptimizerOptions = OptimizerOptions(),
        prompt: str = IMAGE_TOKEN,
        init_from: str | None = None,
    ) -> None:
        super().__init__(optimizer)
        self.vlm = VisionLanguageModel.connect(
            VisionEncoder.load(**vars(vision)),
            LanguageModel.load(**vars(lm)),
            bridge,
            prompt=prompt,
        )
        self.init_from = init_from
        self.val_nll = MeanMetric()

    @property
    def vision(self) -> VisionEncoder:
        return self.vlm.vision

    def training_step(self, batch: CaptionBatch, _: int) -> Tensor:
        """Caption loss of a batch, in nats per token, plus the bridge's own losses."""
        output = self._forward(batch)
        size = len(batch)
        self.log("loss", output.loss, prog_bar=True, batch_size=size)
        for name, loss in output.losses.items():
            self.log(f"loss/{name}", loss, batch_size=size)
        if batch.text.truncated:
            self.log("truncated_captions", float(batch.text.truncated), batch_size=size)
        if batch.truncated_questions:
            self.log("truncated_questions", float(batch.truncated_questions), batch_size=size)
        return output.loss

    def validation_step(self, batch: CaptionBatch, _: int) -> None:
        """Held-out caption loss per token."""
        output = self._forward(batch)
        self.val_nll.update(output.token_losses.mean(), len(output.token_losses))
        self.log("val_loss", self.val_nll, prog_bar=True, batch_size=len(batch))

    def check_data(self, data: CaptionData) -> None:
        """The prompt leaves the LM's context room, and somebody reads the questions there are."""
        prompt = self.vlm.prompt
        if data.task == "caption" and QUESTION in prompt:
            raise ValueError(
                f"found {QUESTION!r} in model.prompt {prompt!r} with data.task: caption; expected "
                "questions for it: set data.task to instruction, or take it out of the prompt"
            )
        reads = QUESTION in prompt or instruction_tokenizer(self.vlm.bridge) is not None
        if data.task == "instruction" and not reads:
            raise ValueError(
                f"found data.task: instruction, and neither {QUESTION!r} in model.prompt "
                f"{prompt!r} nor a resampler that reads text; expected one of them: give a "
                "prompt such as '<image>Question: {question} Answer:'"
            )
        text = self.vlm.prompt_encoder()([prompt], questions=[CAPTION_INSTRUCTION])
        self.vlm.check_length(text.input_ids.shape[1] + 1)

    def initialise(self) -> None:
        """The resampler starts from `init_from`.

        Raises:
            ValueError: a bridge without a resampler, or one that cannot be given weights; a run
                of another encoder.
        """
        if self.init_from is None:
            return
        load = getattr(getattr(self.vlm.bridge, "resampler", None), "load_pretrained", None)
        if load is None:
            raise ValueError(
                f"found model.init_from with a {type(self.vlm.bridge).__name__}, whose resampler "
                "cannot be given weights; expected one with load_pretrained, such as "
                "qformer.QFormer: leave model.init_from out, or choose another resampler"
            )
        if is_stage1_run(Path(self.init_from)):
            check_encoder(Path(self.init_from), self.vision)
        load(self.init_from)

    def collator(self, max_tokens: int) -> CaptionCollator:
        return CaptionCollator.of(self.vlm, max_tokens)

    def save(self, folder: Path, config: dict[str, Any]) -> None:
        lora = config["lm"]["lora"]
        lm = LanguageSource(**config["lm"] | {"lora": LoRA(**lora) if lora else None})
        vision = VisionSource(**config["vision"])
        save_run(folder, self.vlm, RunSpec(vision, lm, config["bridge"], config["prompt"]))

    def done(self, folder: Path) -> str:
        return f"the bridge is in {folder}; caption with: bridges caption IMAGE --run {folder}"

    def fingerprints(self) -> dict[str, str]:
        return {"vision": self.vlm.vision.fingerprint, "lm": self.vlm.lm.fingerprint}

    def check_fingerprints(self, belongs: dict[str, str], where: str) -> None:
        check_fingerprints(belongs, self.vlm.vision, self.vlm.lm, where)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.vlm.trainable_state()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.vlm.load_trainable_state(state_dict)

    def _forward(self, batch: CaptionBatch) -> ModelOutput:
        text = batch.text
        features = batch.features(self.vlm.vision)
        return self.vlm(
            text.input_ids, text.attention_mask, text.labels, features, batch.instruction
        )
