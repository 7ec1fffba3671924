"""Shards as Lightning data: what is read of them, and what is held out."""

import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L

from bridges import VisionEncoder, VisionLanguageModel
from bridges.decode import DecodeMode
from recipes.batch import CaptionCollator, Collate
from recipes.cache import PICTURES, CacheForm, cache_features, check_cached
from recipes.documents import DOCUMENTS
from recipes.documents_window import DocumentCollator, Window
from recipes.loader import SizedLoader
from recipes.packing import PackingCollator
from recipes.remote import is_remote_folder
from recipes.shard_files import ShardError, expand_shards
from recipes.stream import ShardStream
from recipes.video import Clips, clip_form

Task = Literal["caption", "instruction", "interleaved", "video"]
"""What is read of a sample; see `CaptionData`."""

HELD_OUT_SPLITS = ("val", "dev")
"""Never "test": what a run is watched on is not what it is measured on."""

logger = logging.getLogger(__name__)


class CaptionData(L.LightningDataModule):
    """Shards of captioned pictures, of clips, or of documents with pictures in them.

    Args:
        shards: paths with braces or globs, or a folder. In a folder with ``train-*.tar`` those
            are for training and ``val-*`` or ``dev-*`` for validation.
        val_shards: shards to validate on; found in the folder of `shards` by default.
        batch_size: per rank.
        num_workers: processes that decode pictures on each rank.
        max_caption_tokens: longer captions, questions and answers are cut.
        feature_cache: folder in which the frozen features of all pictures are kept, computed
            once before training; null encodes pictures as they come. Of a clip, the first 256
            frames are kept (`recipes.video.MAX_CACHED`; how many clips are cut is logged), unless
            `fps` is null; a document of more pictures than that is a bad sample.
        shuffle_buffer: samples mixed with each other, see `recipes.stream.ShardStream`.
        on_error: what to do with a bad sample: stop, or count it, name it and go on.
        max_bad_fraction: what stops a run that skips: more bad samples than this, of those seen.
        seed: of the order of samples.
        task: what is read of a sample: ``caption``; for instruction tuning ``instruction``, one
            of the questions in its JSON's ``qa`` with its answer (a sample without any: its
            caption); ``interleaved``, a window of a document (`recipes.documents`); ``video``,
            the caption of a clip (`recipes.video`). In training, one of several captions,
            questions, windows or stretches of a clip is drawn anew each epoch; in validation
            always the same is taken.
        max_tokens: longest window of a document, placeholders included.
        max_images: most pictures in such a window.
        min_similarity: leave out pictures that match their text less, where a document says so.
        loss_before_image: learn text before the first picture of a window, too, and documents
            without a picture; these are else bad samples, see `on_error`.
        pack: put several short samples of a batch into one row of tokens (`recipes.packing`).
        decode: ``exact`` makes pixels as the encoder's own processor does, ``fast`` several times
            as fast and nearly the same (`bridges.decode.FastPreprocess`).
        num_frames: most frames of a clip.
        fps: frames a second of a stretch of the clip; null spreads `num_frames` over all of it.
    """

    def __init__(
        self,
        shards: str,
        val_shards: str | None = None,
        batch_size: int = 24,
        num_workers: int = 0,
        max_caption_tokens: int = 64,
        feature_cache: str | None = None,
        shuffle_buffer: int = 1000,
        on_error: Literal["raise", "skip"] = "raise",
        max_bad_fraction: float = 0.05,
        seed: int = 0,
        task: Task = "caption",
        max_tokens: int = 256,
        max_images: int = 5,
        min_similarity: float | None = None,
        loss_before_image: bool = False,
        pack: bool = False,
        decode: DecodeMode = "exact",
        num_frames: int = 8,
        fps: float | None = 1.0,
    ) -> None:
        super().__init__()
        self.train_shards, self.held_out_shards = split_shards(shards, val_shards)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_caption_tokens = max_caption_tokens
        self.feature_cache = feature_cache
        self.shuffle_buffer = shuffle_buffer
        self.on_error: Literal["raise", "skip"] = on_error
        self.max_bad_fraction = max_bad_fraction
        self.seed = seed
        self.task: Task = task
        self.window = Window(max_tokens, max_images, min_similarity, loss_before_image)
        self.pack = pack
        self.decode: DecodeMode = decode
        self.clips = Clips(num_frames, fps)
        self.source_shards = [*self.train_shards, *self.held_out_shards]
        self._train: ShardStream[Any] | None = None
        self._held_out: ShardStream[Any] | None = None

    def collator(self, model: VisionLanguageModel) -> Collate:
        """Makes this task's batches for a model.

        Raises:
            ValueError: windows of documents that do not fit the model; an LM that cannot keep
                packed texts apart.
        """
        if self.task == "interleaved":
            collate = DocumentCollator.of(model, self.window)
        else:
            collate = CaptionCollator.of(
                model,
                self.max_caption_tokens,
                questions=self.task == "instruction",
                clips=self.clips if self.task == "video" else None,
            )
        return PackingCollator.of(model, collate) if self.pack else collate

    def connect(self, vision: VisionEncoder, collate: Collate, world_size: int = 1) -> None:
        """Fits the stream to what reads it: its preprocessing, its features, its batches.

        Args:
            vision: the frozen encoder; it fills the feature cache where it is now.
            collate: decodes samples and makes the batches: a module's `collator`, or `collator`.
            world_size: number of ranks that share the training samples.

        Raises:
            ValueError: features of another encoder or task, or fewer samples than the ranks need
                for a batch each.
        """
        if not self.train_shards:
            named = ", ".join(path.name for path in self.held_out_shards[:5])
            raise ShardError(
                f"found held-out shards alone ({named}); expected some to train on, too, such as "
                "train-000000.tar: restore them, or name shards and val_shards each"
            )
        form = self.cache_form()
        check_cached([*self.train_shards, *self.held_out_shards], vision, form, self.decode)
        if self.feature_cache is not None:
            cache = partial(
                cache_features,
                encoder=vision,
                cache=Path(self.feature_cache),
                on_error=self.on_error,
                max_bad_fraction=self.max_bad_fraction,
                form=form,
                decode=self.decode,
            )
            self.train_shards = cache(self.train_shards)
            self.held_out_shards = cache(self.held_out_shards) if self.held_out_shards else []
        self._vision = vision
        self._collate = collate
        self._world_size = world_size
        self._train = self._stream(self.train_shards, training=True)
        if self.held_out_shards:
            self._held_out = self._stream(self.held_out_shards, training=False)
            if (samples := self._held_out.total_samples) < world_size:
                raise ValueError(
                    f"found {samples} held-out samples for {world_size} ranks; expected one each: "
                    "hold out more, or train on fewer devices"
                )
        if not self.batches_per_epoch():
            raise ValueError(
                f"found {self._train.total_samples} samples for batches of {self.batch_size} on "
                f"{world_size} ranks; expected at least one batch each: lower data.batch_size, or "
                "train on fewer devices"
            )

    def batches_per_epoch(self) -> int:
        """Training batches of a whole epoch on each rank."""
        assert self._train is not None
        return self._train.total_samples // (self.batch_size * self._world_size)

    def train_dataloader(self) -> SizedLoader:
        """The rest of the current epoch; asked for anew before each."""
        assert self.trainer is not None and self._train is not None
        self._train.set_epoch(epoch_of(self.trainer))
        return self._loader(self._train, drop_last=True)

    def val_dataloader(self) -> SizedLoader | list[Any]:
        """The held-out pictures, in order; none if there are no held-out shards."""
        return [] if self._held_out is None else self._loader(self._held_out, drop_last=False)

    def keep_skipped(self, file: Path) -> None:
        """Names every bad sample that is skipped from now on, and those found already, in a file.

        Args:
            file: of this rank; a line of JSON each (`recipes.bad_samples.BadSample`).
        """
        for stream in self._streams():
            stream.bad.keep(file, {str(shard) for shard in stream.shards})

    @property
    def skipped(self) -> dict[str, int]:
        """Bad samples by kind that this rank has met."""
        return dict(sum((stream.skipped for stream in self._streams()), Counter()))

    @property
    def contents(self) -> list[str]:
        """Digests of the samples of each shard that is read, to train on or held out."""
        return [digest for stream in self._streams() for digest in stream.contents]

    def _streams(self) -> list[ShardStream[Any]]:
        return [stream for stream in (self._train, self._held_out) if stream is not None]

    def cache_form(self) -> CacheForm:
        """What of a sample is encoded, and kept beside the features."""
        if self.task == "video":
            return clip_form(self.clips)
        return DOCUMENTS if self.task == "interleaved" else PICTURES

    def _stream(self, shards: Sequence[Path], *, training: bool) -> ShardStream[Any]:
        return ShardStream(
            list(shards),
            self._collate.decoder(self._vision.image_decoder(self.decode), training=training),
            seed=self.seed,
            shuffle=training,
            shuffle_buffer=self.shuffle_buffer,
            on_error=self.on_error,
            max_bad_fraction=self.max_bad_fraction,
            progress=True,
        )

    def _loader(self, stream: ShardStream[Any], *, drop_last: bool) -> SizedLoader:
        loader = SizedLoader(
            stream,
            self.batch_size,
            self._collate,
            num_workers=self.num_workers,
            drop_last=drop_last,
            pin_memory=next(self._vision.parameters()).device.type == "cuda",
        )
        if loader.world_size != self._world_size:
            raise ValueError(
                f"found {loader.world_size} ranks by the process group or WORLD_SIZE; expected the "
                f"trainer's {self._world_size}: unset WORLD_SIZE and RANK, or set trainer.devices "
                "and trainer.num_nodes"
            )
        return loader


def epoch_of(trainer: L.Trainer) -> int:
    """Whose order the training samples have: with ``overfit_batches`` it is always the same."""
    fixed = getattr(trainer, "overfit_batches", 0)  # Lightning's own, though not declared
    return 0 if fixed else trainer.current_epoch


def split_shards(shards: str, val_shards: str | None) -> tuple[list[Path], list[Path]]:
    """Training and held-out shards of ``--data``; see `CaptionData`.

    Of a folder, what is held out is not trained on; one of held-out shards alone leaves none.

    Raises:
        ShardError: as `expand_shards`; shards named for both.
    """
    folder = Path(shards)
    train = expand_shards(shards)
    held_out = expand_shards(val_shards) if val_shards else []
    whole = folder.is_dir() or is_remote_folder(shards)
    if whole:
        named = train
        train = [path for path in named if path.name.startswith("train-")] or named
        if not val_shards:
            held_out = [
                path
                for split in HELD_OUT_SPLITS
                for path in named
                if path.name.startswith(f"{split}-")
            ]
    places = {path.resolve() for path in held_out}
    both = [path for path in train if path.resolve() in places]
    left = [path for path in train if path not in both]
    if both and ((val_shards and not left) or not whole):
        named = ", ".join(map(str, both[:10]))
        raise ShardError(
            f"found {len(both)} of {len(train)} shards to train on held out, too: {named}; "
            "expected others: take them out of data.shards or data.val_shards"
        )
    if both and val_shards:
        logger.info("%d of %d shards in %s are held out", len(both), len(train), folder)
    return left, held_out
