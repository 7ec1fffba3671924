"""One Lightning module for every generative bridge."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
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
from recipes.batch import CaptionBatch, Collate
from recipes.data import CaptionData
from recipes.mixture import MixtureData
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
        init_from: weights that the bridge starts from, or its resampler alone, see their
            `load_pretrained`: a run of stage 1, or a checkpoint. Of no meaning once the run has
            begun.
    """

    takes_mixtures = True

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

    @property
    def vision(self) -> VisionEncoder:
        return self.vlm.vision

    def training_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        """Caption loss of a batch, in nats per token, plus the bridge's own losses."""
        output = self._forward(batch)
        size = len(batch)
        self.log("fill", batch.fill, batch_size=size)
        for name, loss in output.losses.items():
            self.log(f"loss/{name}", loss, batch_size=size)
        if batch.text.truncated:
            self.log("truncated_captions", float(batch.text.truncated), batch_size=size)
        if batch.truncated_questions:
            self.log("truncated_questions", float(batch.truncated_questions), batch_size=size)
        return self.objective(output.loss, batch, batch_idx)

    def setup(self, stage: str) -> None:
        """A metric for the held-out samples, of every source of a mixture."""
        names = ["val_loss"]
        if isinstance(data := self._data, MixtureData):
            names = [f"val_loss/{name}" for name in data.held_out]
        self.val_losses = nn.ModuleDict({name: MeanMetric() for name in names})

    def validation_step(self, batch: CaptionBatch, _: int, dataloader_idx: int = 0) -> None:
        """Held-out caption loss per token."""
        losses = self._forward(batch).token_losses
        name, metric = list(self.val_losses.items())[dataloader_idx]
        assert isinstance(metric, MeanMetric)
        if len(losses):
            metric.update(losses.mean(), len(losses))
        options: dict[str, Any] = {"batch_size": len(batch), "add_dataloader_idx": False}
        self.log(name, metric, prog_bar=name == "val_loss", **options)

    def on_validation_epoch_end(self) -> None:
        """The held-out losses of a mixture's sources, weighed as in training, are its own."""
        if not isinstance(data := self._data, MixtureData):
            return
        weighed = [
            data.sources[name].weight * metric.compute()  # pyright: ignore[reportCallIssue]
            for name, metric in zip(data.held_out, self.val_losses.values(), strict=True)
        ]
        self.log("val_loss", torch.stack(weighed).sum(), prog_bar=True, sync_dist=True)

    def check_data(self, data: CaptionData) -> None:
        """The prompt leaves the LM's context room, and somebody reads the questions there are."""
        prompt = self.vlm.prompt
        if data.task in ("caption", "video") and QUESTION in prompt:
            raise ValueError(
                f"found {QUESTION!r} in model.prompt {prompt!r} with data.task: {data.task}; "
                "expected questions for it: set data.task to instruction, or take it out of the "
                "prompt"
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
        """The bridge, or its resampler, starts from `init_from`.

        Raises:
            ValueError: neither can be given these weights; a run of another encoder.
        """
        if self.init_from is None:
            return
        if is_stage1_run(Path(self.init_from)):
            check_encoder(Path(self.init_from), self.vision)
        self.vlm.bridge.load_pretrained(self.init_from, self.vlm.lm)

    def collator(self, data: CaptionData) -> Collate:
        return data.collator(self.vlm)

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

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    def _forward(self, batch: CaptionBatch) -> ModelOutput:
        text = batch.text
        features = batch.features(self.vlm.vision)
        return self.vlm(
            text.input_ids,
            text.attention_mask,
            text.labels,
            features,
            batch.instruction,
            segments=batch.segments,
        )
