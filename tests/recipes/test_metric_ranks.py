"""Two processes get the figures of one, also where one of them has seen nothing.

The file is also the program of a rank: `python test_metric_ranks.py FOLDER RANK`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.metric_captions import Bleu, CiderD, ExactMatch, RougeL
from recipes.metric_likelihood import CaptionNLL
from recipes.metric_retrieval import CaptionRecall
from recipes.metric_rows import PerImage
from recipes.metric_vqa import VqaAccuracy
from recipes.metric_zero_shot import ZeroShotAccuracy

FIXTURE = Path(__file__).with_name("data") / "metric_captions.json"
CUTS = {"uneven": 3, "all on the second": 0}
"""How many of the images the first rank has."""


def fed(start: int, end: int | None) -> dict[str, PerImage]:
    """Every metric, of some images of a fixed set."""
    images = json.loads(FIXTURE.read_text())["images"]
    rows = slice(start, end)
    texts = [image["prediction"] for image in images][rows]
    truths = [image["references"] for image in images][rows]
    metrics: dict[str, Any] = {
        "cider": CiderD(),
        "bleu": Bleu(),
        "rouge": RougeL(),
        "exact": ExactMatch(),
        "vqa": VqaAccuracy(),
    }
    for metric in metrics.values():
        if texts:
            metric.update(texts, truths)
    random = torch.Generator().manual_seed(0)
    vectors, count = torch.randn(len(images), 5, 4, generator=random), torch.arange(len(images))
    vectors = F.normalize(vectors, dim=-1)
    nll, recall, zero_shot = CaptionNLL(), CaptionRecall((1, 3)), ZeroShotAccuracy(4, (1, 2))
    if texts:
        nll.update(vectors[rows, 0, 0].abs(), 1 + count[rows])
        # An image's text is another rank's: it stands at the other end.
        recall.update(vectors[rows, :3], count[rows], vectors[rows, 4], count.flip(0)[rows])
        zero_shot.update(vectors[rows, 0], count[rows] % 4)
    return metrics | {"nll": nll, "recall": recall, "zero_shot": zero_shot}


def figures(metrics: Mapping[str, PerImage]) -> dict[str, Tensor]:
    """What they compute, what each image got, and the sums to resample; twice, to the bit."""
    found: dict[str, Tensor] = {}
    for name, metric in metrics.items():
        result = metric.compute()
        results = result if isinstance(result, dict) else {"": result}
        found |= {f"{name}.{key}": torch.as_tensor(value) for key, value in results.items()}
        found[f"{name} each"] = metric.per_image()
        assert torch.equal(found[f"{name} each"], metric.per_image())
        if isinstance(metric, Bleu | CaptionNLL):
            found[f"{name} sums"] = metric.per_image_sums()
        if isinstance(metric, CaptionRecall):
            found |= {f"hits {key}": hits for key, hits in metric.hits().items()}
    return found


def run_rank(folder: Path, rank: int) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=2)
    for name, cut in CUTS.items():
        metrics = fed(0, cut) if rank == 0 else fed(cut, None)
        torch.save(figures(metrics), folder / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """The folder in which two processes left their figures."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(folder), str(rank)],
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", CUTS)
def test_ranks_have_the_figures_of_one_process(ranks, name, rank):
    alone = figures(fed(0, None))
    found = torch.load(ranks / f"{name}-{rank}.pt", weights_only=True)
    assert list(found) == list(alone)
    for figure, value in alone.items():
        torch.testing.assert_close(found[figure], value, rtol=0, atol=1e-12, msg=figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_rank(Path(sys.argv[1]), int(sys.argv[2]))
