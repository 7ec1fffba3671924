"""One training run of an ablation, from its config to its scores, and nothing else in memory."""

import gc
import hashlib
import json
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bridges import VisionLanguageModel
from bridges.files import write_json, write_text
from recipes.ablation_grid import Scoring
from recipes.ablation_measure import MEASURED_FILE
from recipes.attention_words import drawn, readings
from recipes.cache import is_cached, mean_patches
from recipes.checkpoints import LAST
from recipes.data import CaptionData, split_shards
from recipes.evaluate import HeldOut
from recipes.evaluate_scores import Scored, score_model, score_stage1
from recipes.gates import read_gates
from recipes.mixture import sources_of
from recipes.module import CaptionModule
from recipes.recording import PROVENANCE_FILE
from recipes.run_log import read_log
from recipes.samples import image_extension
from recipes.stage1 import Stage1Module
from recipes.stream import ShardStream
from recipes.train import train_module
from recipes.training import BridgeModule

JOB_FILE = "job.json"
RESULT_FILE = "result.json"
PAIRS = ("caption", "instruction")
"""Tasks whose samples are pictures with captions, which can be scored."""

RUN = "run"
"""The run directory, in the job's folder."""


@dataclass(frozen=True)
class Job:
    """What is trained, and how it is scored.

    Attributes:
        name: for people.
        config: of `bridges train`, whole but for the run directory.
        order_samples: see `Measure`.
        scoring: None for none.
        first: digest of the sweep's own run that ``model.init_from`` names; empty for none.
    """

    name: str
    config: dict[str, Any]
    order_samples: int
    scoring: Scoring | None = None
    first: str = ""

    @property
    def digest(self) -> str:
        """Of all that the result depends on; of a first stage not where it lies, but what it is."""
        config = self.config
        if self.first:
            config = config | {"model": config["model"] | {"init_from": self.first}}
        content = json.dumps([config, self.order_samples, self._scoring()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Into the folder in which `run_job` finds it."""
        described = {"name": self.name, "digest": self.digest, "config": self.config}
        rest = {"order_samples": self.order_samples, "scoring": self._scoring()}
        rest |= {"first": self.first}
        write_json(folder / JOB_FILE, described | rest)

    @classmethod
    def read(cls, folder: Path) -> "Job":
        """What `write` wrote."""
        raw = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        scoring = raw["scoring"]
        return cls(
            raw["name"],
            raw["config"],
            raw["order_samples"],
            None if scoring is None else Scoring(**scoring),
            raw["first"],
        )

    def _scoring(self) -> dict[str, Any] | None:
        return None if self.scoring is None else asdict(self.scoring)


def read_result(folder: Path, job: Job) -> dict[str, Any] | None:
    """The result of a job that is finished; None of one that is not, has failed or was another."""
    try:
        result = read_outcome(folder)
    except (OSError, ValueError):
        return None
    same = isinstance(result, dict) and result.get("digest") == job.digest
    return result if same and "error" not in result else None


def read_outcome(folder: Path) -> dict[str, Any]:
    """What `run_job` wrote, be it a result or an error."""
    return json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))


def run_job(folder: Path) -> None:
    """Trains and scores; ``result.json`` is written whatever becomes of it.

    A run that was killed goes on from its last checkpoint. One that has failed leaves the error
    and its traceback.
    """
    job = Job.read(folder)
    # Of a config that cannot be read, the parser would else end the process.
    os.environ["JSONARGPARSE_DEBUG"] = "true"
    try:
        result = _result(folder, job)
    except Exception as error:  # whatever is wrong with one cell, the others go on
        result = failure(f"{type(error).__name__}: {error}", traceback.format_exc())
    write_json(folder / RESULT_FILE, {"name": job.name, "digest": job.digest, **result})
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def failure(error: str, trace: str = "") -> dict[str, Any]:
    """The result of a job that has failed."""
    return {"error": error, "traceback": trace}


def _result(folder: Path, job: Job) -> dict[str, Any]:
    run = folder / RUN
    resume = (run / LAST).is_file() and _began_as(folder, job)
    if not resume and run.exists():
        rmtree(run)
    measure = {
        "class_path": "recipes.ablation_measure.Measure",
        "init_args": {"folder": str(run), "order_samples": job.order_samples},
    }
    trainer = job.config["trainer"]
    steps = trainer.get("max_steps") or -1
    trainer = trainer | {"callbacks": [*(trainer.get("callbacks") or []), measure]}
    # What the workers are made for, and not what else a machine may have.
    trainer.setdefault("accelerator", "cuda" if torch.cuda.is_available() else "cpu")
    every = min(
        job.config.get("checkpoint_every") or 500, max(10, steps // 2) if steps > 0 else 500
    )
    config = job.config | {"trainer": trainer, "run": str(run), "checkpoint_every": every}
    # JSON is YAML, and has no anchors, tags or octal surprises.
    write_text(folder / "config.yaml", json.dumps(config, indent=2))
    write_text(folder / "begun", job.digest)
    arguments = [f"--config={folder / 'config.yaml'}"]
    _, module = train_module([*arguments, *(["--resume=true"] if resume else [])])
    if resume and not _ended(run):
        # It was killed between its last checkpoint and its end: no step was left to be made, so
        # that nothing has written down what it was.
        rmtree(run)
        _, module = train_module(arguments)
    # Lightning leaves a module on the CPU.
    module.to(module.trainer.strategy.root_device)
    data: Any = module.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    provenance = json.loads((run / PROVENANCE_FILE).read_text(encoding="utf-8"))
    measured = json.loads((run / MEASURED_FILE).read_text(encoding="utf-8"))
    flops = measured["flops_per_step"]
    result = {
        **measured,
        "planned_steps": steps if steps > 0 else None,
        "train_flops": None if flops is None else flops * measured["steps"],
        "seconds": provenance["seconds"],
        "skipped_steps": provenance["skipped_steps"],
        "skipped_samples": provenance["skipped_samples"],
        "trainable_parameters": provenance["trainable_parameters"],
        "fingerprints": provenance["fingerprints"],
        "visual_tokens": visual_tokens(module),
        "features_digest": _contents(sources_of(data)),
        "threads": torch.get_num_threads(),
        "device": str(module.device),
        "packages": provenance["packages"],
        **_logged(run),
    }
    if job.scoring is not None:
        source = next(one for one in sources_of(data) if one.task in PAIRS)
        scored = _scored(module, source, job.scoring)
        result["scored"] = scored.to_json()
        looked_at = scored.images[: job.scoring.attention]
        result["attention"] = attention(module, held_out_pictures(job), looked_at)
    # A finished run is never resumed, and Adam's moments are most of its bytes.
    rmtree(run / "checkpoints")
    return result


def _began_as(folder: Path, job: Job) -> bool:
    """Whether the run that is there was begun by this very job."""
    try:
        return (folder / "begun").read_text(encoding="utf-8") == job.digest
    except OSError:
        return False


def _ended(run: Path) -> bool:
    """Whether a run has written down what it was."""
    try:
        provenance = json.loads((run / PROVENANCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "seconds" in provenance and (run / MEASURED_FILE).is_file()


def visual_tokens(module: BridgeModule) -> int:
    """Tokens that are made of each picture, however the LM reads them."""
    if isinstance(module, Stage1Module):
        return module.stage1.qformer.num_tokens
    bridge: Any = module.vlm.bridge  # pyright: ignore[reportAttributeAccessIssue]
    return int(getattr(bridge, "resampler", bridge).num_tokens)


def _contents(sources: Any) -> str:
    """A digest of all samples, features or pictures, that are trained on or held out."""
    contents = [source.contents for source in sources]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def _logged(run: Path) -> Mapping[str, Any]:
    curves = read_log(run, ("loss", "val_loss").__contains__)
    return {
        "curve": sorted(curves.get("loss", {}).items()),
        "val_curve": sorted(curves.get("val_loss", {}).items()),
        "gates": {name: sorted(points.items()) for name, points in read_gates(run).items()},
    }


def _scored(module: BridgeModule, source: CaptionData, scoring: Scoring) -> Scored:
    module.eval()
    batches = islice(source.val_dataloader(), -(-scoring.pictures // source.batch_size))
    held_out = HeldOut.collect(batches, module.vision).first(scoring.pictures)
    if isinstance(module, Stage1Module):
        return score_stage1(module.stage1, module.vision, held_out)
    model: VisionLanguageModel = module.vlm  # pyright: ignore[reportAttributeAccessIssue,reportAssignmentType]
    cached = all(is_cached(shard) for shard in source.train_shards)
    return score_model(
        model,
        held_out,
        mean_patches(source.train_shards) if cached else None,
        captions=scoring.captions,
        likelihood=scoring.likelihood,
        batch_size=scoring.batch_size,
        max_new_tokens=scoring.max_new_tokens,
    )


def held_out_pictures(job: Job) -> list[Path]:
    """Shards with the held-out pictures that are scored, as they were before encoding.

    Raises:
        ValueError: a mixture without a source of pairs.
    """
    data = job.config["data"]
    sources = filter(None, data["sources"].values()) if data.get("sources") else [data]
    pairs = [source for source in sources if source.get("task", "caption") in PAIRS]
    if not pairs:
        raise ValueError(
            "found no source of pictures with captions among data.sources; expected one, whose "
            f"held-out pictures are scored: one with task: {' or '.join(PAIRS)}"
        )
    return split_shards(pairs[0]["shards"], pairs[0].get("val_shards"))[1]


def named_samples(shards: Sequence[Path], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Raw samples of some names that `Scored.images` has, in their order; none of features."""
    if any(map(is_cached, shards)):
        return
    stream = ShardStream(
        list(shards), dict, seed=0, shuffle=False, on_error="skip", max_bad_fraction=1.0
    )
    wanted = list(names)
    for raw in stream.iterate() if wanted else ():
        if raw["__key__"] == wanted[0]:
            wanted.pop(0)
            yield raw
        if not wanted:
            return


@torch.no_grad()
def attention(
    module: BridgeModule, shards: Sequence[Path], names: Sequence[str]
) -> list[str | None]:
    """What the words of a model's captions look at, drawn over some held-out pictures.

    Returns:
        Data URIs; None for a picture whose caption looks at nothing; empty for a model whose
        attention cannot be read, or shards without pictures.
    """
    if not isinstance(module, CaptionModule):
        return []
    model: VisionLanguageModel = module.vlm
    drawn_pictures: list[str | None] = []
    with TemporaryDirectory() as folder:
        for place, raw in enumerate(named_samples(shards, names)):
            extension = image_extension(raw)
            path = Path(folder) / f"{place}.{extension}"
            path.write_bytes(raw[extension])
            try:
                (reading,) = readings(model, [path], None, None)
                shown = drawn(model, reading, "mean", "before")
            except ValueError:  # a resampler or a reader that says nothing of its attention
                return []
            drawn_pictures.append(shown["pictures"][0]["mean"])
    return drawn_pictures
