"""BLIP-2's first stage as a recipe."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from bridges import ResamplerFactory, VisionEncoder, VisionSource
from bridges.run import check_fingerprints, read_weights
from qformer import MomentumTeacher, QFormer, Stage1, init_from_bert
from qformer.gather import gather
from qformer.official import check_sizes, read_official
from qformer.official_models import official_stage1
from qformer.retrieval import itc_similarity, recall_at
from qformer.runs import (
    WEIGHTS_FILE,
    Stage1Spec,
    check_encoder,
    check_shapeless,
    is_stage1_run,
    load_weights,
    read_stage1,
    save_stage1,
)
from qformer.stage1 import OBJECTIVES, Stage1Output
from recipes.data import CaptionData
from recipes.pairs import PairBatch, PairCollator
from recipes.training import BridgeModule, OptimizerOptions

RECALL_AT = (1, 5)


@dataclass(frozen=True)
class LossWeights:
    """Factors of the three losses; 0 leaves one out."""

    itc: float = 1.0
    itm: float = 1.0
    itg: float = 1.0


@dataclass(frozen=True)
class MomentumOptions:
    """See `MomentumTeacher`.

    Attributes:
        momentum: of the moving average.
        queue_size: features kept.
        alpha: weight of the teacher's opinion.
        ramp_steps: steps in which `alpha` grows from 0.
    """

    momentum: float = 0.995
    queue_size: int = 65536
    alpha: float = 0.4
    ramp_steps: int = 0


class Stage1Module(BridgeModule):
    """Trains a Q-Former by image-text contrast, matching and grounded generation; no LM.

    Args:
        vision: the frozen encoder.
        qformer: `qformer.QFormer` with a tokenizer, by class path; the encoder's sizes are filled
            in.
        bert: a BERT to start from (hub name, folder, ``embedded:minilm-l6``); null for random.
        init_from: weights to start from in its place: a stage-1 run, a LAVIS ``.pth`` or a
            Hugging Face folder. Of no meaning once the run has begun.
        embed_dim: width in which images and texts are compared.
        label_smoothing: of ITC and ITG.
        temperature: at the start.
        weights: of the three losses.
        chunk_size: cached gradients: so many samples at a time, see `Stage1.forward`.
        momentum: ALBEF's teacher for ITC; null for none, as in BLIP-2.
        optimizer: optimiser and schedule.
    """

    def __init__(
        self,
        vision: VisionSource,
        qformer: ResamplerFactory,
        bert: str | None = None,
        init_from: str | None = None,
        embed_dim: int = 256,
        label_smoothing: float = 0.1,
        temperature: float = 0.07,
        weights: LossWeights = LossWeights(),
        chunk_size: int | None = None,
        momentum: MomentumOptions | None = None,
        optimizer: OptimizerOptions = OptimizerOptions(),
    ) -> None:
        super().__init__(optimizer)
        if bert is not None and init_from is not None:
            raise ValueError(
                "found both model.bert and model.init_from; expected one: the weights in init_from "
                "began as a BERT themselves"
            )
        if min(vars(weights).values()) < 0 or not any(vars(weights).values()):
            raise ValueError(f"found {weights}; expected no negative ones, and not all of them 0")
        self._vision = VisionEncoder.load(**vars(vision))
        built = qformer(vision=self._vision.shape)
        if type(built) is not QFormer or built.tokenizer is None:
            raise ValueError(
                f"found a {type(built).__name__} as model.qformer; expected a qformer.QFormer with "
                "a tokenizer: set class_path: qformer.QFormer and init_args.tokenizer"
            )
        self.stage1 = Stage1(
            built,
            embed_dim=embed_dim,
            label_smoothing=label_smoothing,
            temperature=temperature,
            dec_token_id=built.tokenizer.bos_token_id,
        )
        self.bert = bert
        self.init_from = init_from
        self.weights = vars(weights)
        self.objectives = [name for name in OBJECTIVES if self.weights[name]]
        self.chunk_size = chunk_size
        if momentum is not None and "itc" not in self.objectives:
            raise ValueError(
                "found model.momentum with model.weights.itc: 0; expected ITC for the teacher: "
                "give it a weight, or leave momentum out"
            )
        self._freeze_unused()
        # No submodule, or DDP would send its queue to all ranks in every step.
        teacher = MomentumTeacher(self.stage1, **vars(momentum)) if momentum else None
        self._unregistered = (teacher,)
        self.val_losses = nn.ModuleDict({name: MeanMetric() for name in self.objectives})
        self._held_out: list[tuple[Tensor, Tensor]] = []

    @property
    def vision(self) -> VisionEncoder:
        return self._vision

    @property
    def teacher(self) -> MomentumTeacher | None:
        """ALBEF's teacher, if there is one."""
        return self._unregistered[0]

    def on_fit_start(self) -> None:
        """The teacher follows to the device."""
        if self.teacher is not None:
            self.teacher.to(self.device)

    def initialise(self) -> None:
        """Starts from a BERT, or from stage-1 weights."""
        if self.bert is not None:
            head = init_from_bert(self.stage1.qformer, self.bert)
            if head:
                own, bias = self.stage1.lm_head.bias.data, head.pop("bias")
                words = min(len(own), len(bias))
                own[:words] = bias[:words]
                self.stage1.lm_head.load_state_dict(head, strict=False)
        elif self.init_from is not None and is_stage1_run(Path(self.init_from)):
            folder = Path(self.init_from)
            check_encoder(folder, self.vision)
            check_shapeless(folder, read_stage1(folder).qformer, self.stage1.qformer)
            load_weights(self.stage1, read_weights(folder / WEIGHTS_FILE), self.init_from)
        elif self.init_from is not None:
            checkpoint = read_official(self.init_from)
            official, fresh = official_stage1(checkpoint, vision=self.vision.shape)
            check_sizes(checkpoint, self.stage1.qformer)
            own = self.stage1.state_dict()
            state = official.state_dict() | {name: own[name] for name in fresh}
            load_weights(self.stage1, state, self.init_from)
        if self.teacher is not None:
            self.teacher.model.load_state_dict(self.stage1.state_dict())

    def check_data(self, data: CaptionData) -> None:
        """Texts fit the Q-Former's positions."""
        table = self.stage1.qformer.text_embeddings
        assert table is not None
        if not 3 <= data.max_caption_tokens <= table.position.num_embeddings:
            raise ValueError(
                f"found data.max_caption_tokens: {data.max_caption_tokens}; expected 3 to "
                f"{table.position.num_embeddings}, the Q-Former's max_text"
            )
        if data.task != "caption":
            raise ValueError(
                f"found data.task: {data.task}; expected caption: stage 1 learns from captions"
            )
        if data.pack:
            raise ValueError(
                "found data.pack: true; expected false: stage 1's losses compare whole texts"
            )

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """The weighted sum of the losses."""
        if self.teacher is not None and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.teacher.update(self.stage1)
        output = self._forward(batch, f"{self.current_epoch}/{batch_idx}", self.teacher)
        loss = torch.stack([self.weights[n] * x for n, x in output.losses.items()]).sum()
        size = len(batch)
        self.log("loss", loss, prog_bar=True, batch_size=size)
        for name, value in output.losses.items():
            self.log(f"loss/{name}", value.detach(), batch_size=size)
        seen = output.stats | {"temperature": self.stage1.temperature.detach()}
        for name, value in seen.items():
            self.log(name, value, batch_size=size)
        if batch.truncated:
            self.log("truncated_captions", float(batch.truncated), batch_size=size)
        return loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Held-out losses, and the embeddings for the recall at the end."""
        output = self._forward(batch, f"val/{batch_idx}", None)
        size = len(batch)
        for name, metric in self.val_losses.items():
            assert isinstance(metric, MeanMetric)
            metric.update(output.losses[name], size)
            self.log(f"val_loss/{name}", metric, batch_size=size)
        if "itm" in self.objectives:
            accuracy = output.stats["itm_accuracy"]
            self.log("val_itm_accuracy", accuracy, batch_size=size, sync_dist=True)
        self._held_out.append((output.images, output.texts))

    def on_validation_epoch_end(self) -> None:
        """Held-out text-to-image recall of ITC, and the sum of the losses."""
        images, texts = (gather(torch.cat(x)) for x in zip(*self._held_out, strict=True))
        self._held_out.clear()
        scores = itc_similarity(images, texts).T
        own = torch.arange(len(texts), device=scores.device)
        for name, value in recall_at(scores, own, own, RECALL_AT).items():
            self.log(f"val_{name}", value, prog_bar=name == "recall@1", sync_dist=True)
        losses = [self.weights[n] * metric.compute() for n, metric in self.val_losses.items()]  # pyright: ignore[reportCallIssue]
        self.log("val_loss", torch.stack(losses).sum(), prog_bar=True, sync_dist=True)

    def collator(self, data: CaptionData) -> PairCollator:
        tokenizer, grid = self.stage1.qformer.tokenizer, self.vision.shape.grid
        return PairCollator(tokenizer, data.max_caption_tokens, grid)

    def save(self, folder: Path, config: dict[str, Any]) -> None:
        spec = Stage1Spec(
            VisionSource(**config["vision"]),
            config["qformer"].get("init_args") or {},
            {n: config[n] for n in ("embed_dim", "label_smoothing", "temperature")}
            | {"dec_token_id": self.stage1.dec_token_id},
            self.trainer.datamodule.max_caption_tokens,  # pyright: ignore[reportAttributeAccessIssue]
        )
        save_stage1(folder, self.stage1, spec, self.vision)

    def done(self, folder: Path) -> str:
        return (
            f"the Q-Former is in {folder}; rank pictures and texts with: bridges retrieve --run "
            f"{folder} --data SHARDS; start stage 2 from it with --model.init_from {folder}"
        )

    def fingerprints(self) -> dict[str, str]:
        return {"vision": self.vision.fingerprint}

    def check_fingerprints(self, belongs: dict[str, str], where: str) -> None:
        check_fingerprints(belongs, self.vision, None, where)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        state = {f"stage1.{n}": t for n, t in self.stage1.state_dict().items()}
        if self.teacher is not None:
            state |= {f"teacher.{n}": t for n, t in self.teacher.state_dict().items()}
        return state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts: dict[str, dict[str, Tensor]] = {"stage1": {}, "teacher": {}}
        for name, tensor in state_dict.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        load_weights(self.stage1, parts["stage1"], "the checkpoint")
        if (self.teacher is None) == bool(parts["teacher"]):
            raise ValueError(
                "found a checkpoint with and a run without model.momentum, or the reverse; "
                "expected them to agree: resume with the settings that the run began with"
            )
        if self.teacher is not None:
            load_weights(self.teacher, parts["teacher"], "the checkpoint")

    def _freeze_unused(self) -> None:
        """What no objective reaches; DDP waits for the gradients of all that is trained."""
        stage1 = self.stage1
        if "itg" not in self.objectives:
            stage1.lm_head.requires_grad_(False)
        if "itm" not in self.objectives:
            stage1.itm_head.requires_grad_(False)
        if "itc" not in self.objectives:
            stage1.vision_projection.requires_grad_(False)
            stage1.text_projection.requires_grad_(False)
            stage1.temperature.requires_grad_(False)
            stage1.qformer.train_last_text("itg" in self.objectives)

    def _forward(
        self, batch: PairBatch, draw: str, teacher: MomentumTeacher | None
    ) -> Stage1Output:
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        # The same on all ranks, and the same again after a resume.
        seed = random.Random(f"{data.seed}/{draw}").getrandbits(62)
        return self.stage1(
            batch.features(self.vision, self.chunk_size),
            batch.text,
            image_ids=batch.image_ids,
            objectives=self.objectives,
            generator=torch.Generator().manual_seed(seed),
            chunk_size=self.chunk_size if self.training else None,
            teacher=teacher,
        )
