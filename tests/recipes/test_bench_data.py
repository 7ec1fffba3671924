"""`bridges bench data`: both sides make the same batches, on one core, and leave nothing behind."""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from bridges.decode import FastPreprocess
from recipes import bench
from recipes.bench_data import Sizes, data_workloads
from recipes.bench_data_reference import mapped_batches
from recipes.bench_data_shards import MadeShards, jpeg, photo
from recipes.features import decode_features
from recipes.loader import SizedLoader
from recipes.stream import ShardStream
from recipes.workload import Workload, measure

# webdataset closes no file by itself.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

CPU = torch.device("cpu")
TINY = Sizes(
    photos=((60, 80), (150, 130)),
    batch=4,
    samples=12,
    distinct=3,
    pixels=32,
    patches=5,
    dim=8,
    epoch=42,
    train_batch=3,
    width=24,
    layers=1,
)
NAMES = [
    *(f"photos-{size}-{decode}" for size in ("80x60", "130x150") for decode in ("fast", "exact")),
    "photos-raw-tar",
    "features-webdataset",
    "features-mapped",
    "train-features-online",
    "resume",
]


@pytest.fixture(autouse=True)
def no_open_files():
    """Whatever is left is closed here, where the warning is known."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def builders() -> dict[str, Callable[[], Workload]]:
    return data_workloads(CPU, TINY)


def test_it_is_a_bench(builders: dict[str, Callable[[], Workload]]):
    assert bench.BENCHES["data"] is data_workloads
    assert list(builders) == NAMES
    names = list(data_workloads(CPU))
    assert names[:4] == [f"photos-{size}-{decode}" for size in ("640x480", "1600x1200")
                         for decode in ("fast", "exact")]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_both_sides_do_the_same(name: str, builders: dict[str, Callable[[], Workload]]):
    row = measure(builders[name](), CPU, repeats=2, peak_gflops=1.0, tick=lambda: None)
    assert row["name"] == name and row["shapes"]["threads"] == 1
    assert min(*row["ours_times"], *row["reference_times"]) > 0
    assert row["shapes"]["bytes_per_sample"] > 0
    if name.endswith("exact"):
        # Of two ways to round a normalised pixel.
        assert row["max_pixel_diff_of_255"] < 1e-3
    elif name.endswith("fast"):
        assert row["max_pixel_diff_of_255"] < 16 and row["mean_pixel_diff_of_255"] < 1.5
    elif name == "train-features-online":
        assert row["max_abs_loss_diff"] < 1e-3 and row["max_rel_grad_diff"] < 1e-2
        # What is stored need not be encoded.
        assert row["ours_flops"] < row["reference_flops"]
    else:
        assert row["max_abs_loss_diff"] == 0


def test_other_pixels_show(
    builders: dict[str, Callable[[], Workload]], monkeypatch: pytest.MonkeyPatch
):
    normalise = FastPreprocess.normalise
    monkeypatch.setattr(FastPreprocess, "normalise", lambda *args: 1.5 * normalise(*args))
    assert builders["photos-80x60-fast"]().checks({})["mean_pixel_diff_of_255"] > 5


def test_a_resume_to_another_place_shows(
    builders: dict[str, Callable[[], Workload]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(SizedLoader, "load_state_dict", lambda self, state: None)
    assert builders["resume"]().checks({})["max_abs_loss_diff"] == 1


def test_a_step_has_one_core(builders: dict[str, Callable[[], Workload]]):
    seen = []
    workload = builders["resume"]()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        side = workload.ours.step
        assert isinstance(side, partial)
        side.func(lambda: seen.append(torch.get_num_threads()))
        seen.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(threads)
    assert seen == [1, 2]


def test_mapped_features_are_those_that_were_written():
    made = MadeShards()
    features = [torch.full((5, 8), float(number)) for number in range(8)]
    shards = made.features("numbers", features)
    batches = mapped_batches(shards, 4, (5, 8))
    found = torch.cat([next(batches), next(batches)])
    assert sorted(found[:, 0, 0].tolist()) == list(range(8))
    assert torch.equal(found, found[:, :1, :1].expand_as(found))
    stored = [decode_features(raw) for raw in ShardStream(shards, dict, seed=0, shuffle=False)]
    assert torch.equal(torch.stack(stored).float(), torch.stack(features))


def test_the_shards_go_with_what_made_them():
    made = MadeShards()
    folder: Path = made.folder
    made.photos(20, 30, 4, 2)
    assert list(folder.rglob("*.tar"))
    del made
    gc.collect()
    assert not folder.exists()


def test_photos_are_the_same_each_time_and_as_large_as_photos():
    first, again, other = (jpeg(photo(120, 160, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert 4_000 < len(first) < 12_000
