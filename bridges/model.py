"""The assembled model: frozen encoder, bridge, frozen LM."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bridges.compact_head import compact_head
from bridges.condition import Condition, packed_images
from bridges.contract import Bridge, BridgeFactory, BridgeOutput, Instruction, VisionFeatures
from bridges.hooks import DecoderHooks, SameCondition
from bridges.language import IMAGE_TOKEN, LanguageModel
from bridges.loss import IGNORE, label_positions, token_losses
from bridges.prompts import PromptEncoder
from bridges.vision import VisionEncoder


@dataclass(frozen=True)
class ModelOutput:
    """Result of a training or scoring pass.

    Attributes:
        loss: mean caption loss per label in nats, plus the bridge's auxiliary losses.
        token_losses: (n), loss of each label in row-major order.
        label_counts: long (b), labels of each row.
        losses: the auxiliary losses by name.
    """

    loss: Tensor
    token_losses: Tensor
    label_counts: Tensor
    losses: dict[str, Tensor]

    def row_losses(self) -> Tensor:
        """Summed loss of each row: (b)."""
        rows = torch.arange(len(self.label_counts), device=self.token_losses.device)
        rows = rows.repeat_interleave(self.label_counts)
        sums = torch.zeros_like(self.label_counts, dtype=self.token_losses.dtype)
        return sums.index_add(0, rows, self.token_losses)


class VisionLanguageModel(nn.Module):
    """A bridge between a frozen vision encoder and a frozen LM.

    Args:
        vision: the frozen encoder.
        lm: the frozen LM.
        bridge: built for the two; see `connect` for the usual way.
        prompt: what stands before a caption, with `<image>` where the image belongs.

    Raises:
        ValueError: the bridge asks for layers that the LM does not have.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        lm: LanguageModel,
        bridge: Bridge,
        *,
        prompt: str = IMAGE_TOKEN,
    ) -> None:
        super().__init__()
        if lm.image_token not in prompt:
            raise ValueError(
                f"found prompt {prompt!r}; expected {lm.image_token!r} in it, where the image goes"
            )
        if bridge.num_tokens < 1:
            raise ValueError(
                f"found num_tokens={bridge.num_tokens} in {type(bridge).__name__}; expected at "
                "least one placeholder an image: emit a learned marker"
            )
        self.vision = vision
        self.lm = lm
        self.bridge = bridge
        self.prompt = prompt
        self.hooks = DecoderHooks(lm.model, bridge.inserts(), lm.shape.num_layers)

    @classmethod
    def connect(
        cls,
        vision: VisionEncoder,
        lm: LanguageModel,
        bridge: BridgeFactory,
        *,
        prompt: str = IMAGE_TOKEN,
    ) -> "VisionLanguageModel":
        """Builds the bridge from the sizes of the frozen ends, on the LM's device."""
        built = bridge(vision=vision.shape, decoder=lm.shape)
        return cls(vision, lm, built.to(lm.device), prompt=prompt)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        vision: VisionFeatures,
        text: Instruction | None = None,
        *,
        segments: Tensor | None = None,
    ) -> ModelOutput:
        """Loss of the labels given the images.

        Args:
            input_ids: long (b, t), `bridge.num_tokens` placeholders for each real image.
            attention_mask: bool (b, t).
            labels: long (b, t), IGNORE (-100) where there is no loss.
            vision: features of the images, from `vision.encode` or from a cache.
            text: an instruction for resamplers that read one.
            segments: long (b, t), the sample of each column of packed rows, as its row in
                `vision` and `text`, which are those of the samples then; the samples stand in
                their order, row by row. None sees the text or the images of another, or predicts
                its first token. Columns of padding may have any sample's number.
        """
        if segments is not None:
            border = segments[:, 1:] != segments[:, :-1]
            labels = torch.cat([labels[:, :1], labels[:, 1:].masked_fill(border, IGNORE)], dim=1)
        output, hidden = self._decode(input_ids, attention_mask, vision, text, segments)
        at_labels, targets = label_positions(hidden, labels)
        losses = token_losses(self.lm.head, at_labels, targets, self._vocabulary())
        # A batch without a label has a loss of zero, and zero gradients.
        loss = losses.sum() / max(1, len(losses)) + sum(output.losses.values())
        counts = (labels[:, 1:] != IGNORE).sum(dim=1)
        return ModelOutput(loss, losses, counts, output.losses)

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        vision: VisionFeatures,
        *,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Logits of every position, for inspection: (b, t, vocabulary)."""
        return self.lm.head(self._decode(input_ids, attention_mask, vision, None, segments)[1])

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        vision: VisionFeatures,
        text: Instruction | None = None,
        **options: Any,
    ) -> Tensor:
        """Continues left-padded prompts with HF's ``generate``: greedy, beams or sampling.

        Args:
            input_ids: long (b, t), padded on the left.
            attention_mask: bool (b, t).
            vision: features of the images.
            text: an instruction for resamplers that read one.
            **options: of ``generate`` (``max_new_tokens``, ``num_beams``, ``do_sample``, …).

        Returns:
            The new tokens only, long (b · num_return_sequences, t').

        Raises:
            ValueError: ``prefill_chunk_size``, which HF cannot combine with embeddings, or a
                prompt that leaves the context no room.
        """
        if options.get("prefill_chunk_size") is not None:
            raise ValueError(
                "found prefill_chunk_size; HF's chunked prefill ignores embeddings. Leave it out"
            )
        room = int(options.get("max_new_tokens", 0))
        pad = self.lm.tokenizer.pad_token_id
        options.setdefault("pad_token_id", self.lm.tokenizer.eos_token_id if pad is None else pad)
        ends = [self.lm.tokenizer.eos_token_id, self.lm.end_id]
        options.setdefault("eos_token_id", list(dict.fromkeys(ends)))
        if self.lm.image_token_id < self._vocabulary():
            options.setdefault("suppress_tokens", [self.lm.image_token_id])
        compact = compact_head(self.lm.model.get_output_embeddings())
        ready = self.continuing(input_ids, attention_mask, vision, text, room=room)
        with ready as embeddings, compact:
            return self.lm.model.generate(
                inputs_embeds=embeddings, attention_mask=attention_mask.long(), **options
            )

    @contextmanager
    def continuing(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        vision: VisionFeatures,
        text: Instruction | None = None,
        *,
        room: int = 0,
    ) -> Iterator[Tensor]:
        """Embeddings of left-padded prompts, for LM calls that continue them from one cache.

        Inside, the LM sees these images, whose projections are kept from call to call, and may
        have each row several times in a row (beams, choices).

        Args:
            input_ids: long (b, t), padded on the left.
            attention_mask: bool (b, t).
            vision: features of the images.
            text: an instruction for resamplers that read one.
            room: positions that will follow the prompts.

        Yields:
            (b, t, d_lm).

        Raises:
            ValueError: prompts padded on the right, or that leave the context no room.
        """
        if not bool(attention_mask[:, -1].all()):
            raise ValueError(
                "found prompts padded on the right; expected padding on the left, or the LM "
                "continues the padding: use PromptEncoder(..., padding_side='left')"
            )
        output = self.bridge(self._matched(vision), text)
        embeddings = self._fill(input_ids, output, vision, room)
        self._condition(input_ids, attention_mask, output, vision, keep_projections=True)
        training = self.lm.model.training
        self.lm.train(False)  # in training mode HF gives a checkpointed block no cache
        try:
            yield embeddings
        finally:
            self.hooks.condition = None
            self.lm.train(training)

    def prompt_encoder(self, max_completion: int = 64) -> PromptEncoder:
        """The encoder of prompts for this LM and this bridge."""
        lm = self.lm
        return PromptEncoder(
            lm.tokenizer, lm.image_token, self.bridge.num_tokens, max_completion, lm.end_id
        )

    def check_length(self, length: int) -> None:
        """Refuses more positions than the LM's context holds.

        Raises:
            ValueError: with both numbers.
        """
        if self.lm.max_length is not None and length > self.lm.max_length:
            raise ValueError(
                f"found {length} positions ({self.bridge.num_tokens} placeholders an image, text "
                f"and new tokens); expected at most {self.lm.max_length}, the LM's context "
                "length: use fewer images, fewer tokens per image or less text"
            )

    def trainable_state(self) -> dict[str, Tensor]:
        """Everything that training changes: the bridge's state and the LM's LoRA weights."""
        bridge = {f"bridge.{n}": t for n, t in self.bridge.state_dict().items()}
        return bridge | {f"lm.{n}": t for n, t in self.lm.trainable_state().items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `trainable_state` returned.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape; nothing is changed.
        """
        own = self.trainable_state()
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
        if wrong:
            raise ValueError(
                f"found weights that do not fit this bridge in {len(wrong)} places, first "
                f"{wrong[0]!r}; expected those of {type(self.bridge).__name__} with the same "
                "settings: rebuild it from the run's own run.json"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def _decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        vision: VisionFeatures,
        text: Instruction | None,
        segments: Tensor | None = None,
    ) -> tuple[BridgeOutput, Tensor]:
        output = self.bridge(self._matched(vision), text)
        embeddings = self._fill(input_ids, output, vision, segments=segments)
        self._condition(input_ids, attention_mask, output, vision, segments=segments)
        try:
            hidden = self.lm.hidden(embeddings, attention_mask, segments=segments)
        finally:
            # The LM, used on its own or by another bridge, is unchanged.
            self.hooks.condition = None
        return output, hidden

    def _matched(self, vision: VisionFeatures) -> VisionFeatures:
        """Checks the features against the encoder that the bridge was built for."""
        width = vision.patches.shape[-1]
        if width != self.vision.shape.dim:
            raise ValueError(
                f"found features of width {width}; expected {self.vision.shape.dim}, the width of "
                "this model's encoder: these features come from another encoder, cache them again"
            )
        reader = getattr(self.bridge, "resampler", self.bridge)
        if vision.num_frames > 1 and not getattr(reader, "reads_video", False):
            raise ValueError(
                f"found clips of {vision.num_frames} frames for {type(reader).__name__}, which "
                "reads pictures; expected a resampler that reads clips: "
                "perceiver.PerceiverResampler with num_frames set, or one frame per clip"
            )
        parameter = next(self.bridge.parameters())
        image_mask = vision.image_mask.to(parameter.device)
        patches = vision.patches.to(parameter.device, parameter.dtype)
        # A padding image may hold anything, and NaN would pass through every mask further on.
        real = image_mask[..., None]
        frame_mask = vision.frame_mask
        if frame_mask is not None:
            frame_mask = frame_mask.to(parameter.device)
            per_frame = patches.shape[2] // vision.num_frames
            real = (real & frame_mask).repeat_interleave(per_frame, dim=-1)
        patches = patches.masked_fill(~real[..., None], 0.0)
        return VisionFeatures(patches, image_mask, vision.grid, frame_mask)

    def _fill(
        self,
        input_ids: Tensor,
        output: BridgeOutput,
        vision: VisionFeatures,
        room: int = 0,
        *,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Token embeddings with the soft tokens in the places of their placeholders."""
        n = self.bridge.num_tokens
        self.check_length(input_ids.shape[1] + room)
        width = output.soft_tokens.shape[-1]
        if width != self.lm.shape.dim:
            raise ValueError(
                f"found soft tokens of width {width}; expected {self.lm.shape.dim}, the LM's: "
                "build the bridge with VisionLanguageModel.connect"
            )
        placeholders = (input_ids == self.lm.image_token_id).to(self.lm.device)
        image_mask = vision.image_mask.to(self.lm.device)
        found, images = placeholders.sum(dim=1), image_mask.sum(dim=1)
        if segments is not None:
            samples = segments.to(self.lm.device)[placeholders]
            found = samples.bincount(minlength=len(images))
            if len(found) > len(images) or bool((samples.diff() < 0).any()):
                raise ValueError(
                    f"found segments out of order, or above {len(images) - 1}, the last row of "
                    "vision; expected the samples of vision in their order: see "
                    "recipes.packing.pack"
                )
        if not torch.equal(found, images * n):
            row = int((found != images * n).nonzero()[0])
            raise ValueError(
                f"row {row}: found {int(found[row])} placeholders for {int(images[row])} images × "
                f"{n} tokens; expected {int(images[row]) * n}: build prompts with PromptEncoder"
            )
        embeddings = self.lm.embed(input_ids)
        soft = output.soft_tokens[image_mask].flatten(0, 1)
        return embeddings.masked_scatter(placeholders[..., None], soft.to(embeddings.dtype))

    def _condition(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        output: BridgeOutput,
        vision: VisionFeatures,
        *,
        segments: Tensor | None = None,
        keep_projections: bool = False,
    ) -> None:
        placeholders = (input_ids == self.lm.image_token_id).to(self.lm.device)
        image_mask = vision.image_mask.to(self.lm.device)
        n = self.bridge.num_tokens
        if segments is not None:
            segments = segments.to(self.lm.device)
            output, image_mask = packed_images(output, image_mask, placeholders, n, segments)
        self.hooks.condition = Condition.of(
            output,
            placeholders,
            n,
            image_mask,
            attention_mask=attention_mask.to(self.lm.device, torch.bool),
            segments=segments,
            keep_projections=keep_projections,
        )
        self.lm.recompute_context = SameCondition(self.hooks)

    def _vocabulary(self) -> int:
        return self.lm.model.config.vocab_size
