"""Two ranks train on a mixture in step, whatever runs dry and whatever one of them lacks.

The file is also the program of a rank: `python test_mixture_distributed.py FOLDER`.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tiny_mixture as mix
import torch
import yaml

RANKS, STEPS = 2, 24
MIXINGS = ("accumulate", "round_robin")


def run_rank(folder: Path) -> None:
    """Trains with both ways to mix, one after the other; the environment says which rank it is."""
    from recipes.train import train

    for mixing in MIXINGS:
        more = [f"--data.mixing={mixing}", f"--model.out={folder}/{mixing}-{{rank}}.pt"]
        more += ["--trainer.devices=2", "--trainer.strategy=ddp", f"--trainer.max_steps={STEPS}"]
        train(mix.arguments(folder, folder / mixing, *more))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def ranks(on_disk, tmp_path_factory) -> dict[str, list[Mapping[str, Any]]]:
    """What two processes wrote down, for both ways to mix."""
    folder = tmp_path_factory.mktemp("ranks")
    mix.write_sources(folder / "shards")
    config = mix.config(on_disk.vision, on_disk.lm, folder / "shards")
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    world = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=os.environ | path | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {
        mixing: [
            torch.load(folder / f"{mixing}-{rank}.pt", weights_only=True) for rank in range(RANKS)
        ]
        for mixing in MIXINGS
    }


@pytest.mark.parametrize("mixing", MIXINGS)
def test_ranks_stay_in_step(ranks, mixing):
    first, second = ranks[mixing]
    assert mix.sources(first["seen"]) == mix.sources(second["seen"])
    batches = STEPS * len(mix.SIZES) if mixing == "accumulate" else STEPS
    assert len(first["seen"]) == len(second["seen"]) == batches
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
    for one, other in zip(first["gradients"], second["gradients"], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_no_rank_lacks_a_gradient(ranks, mixing):
    """Also where it has texts alone, and the other one does not; Lightning's plain DDP would hang
    or raise."""
    lonely = [
        one["images"] != other["images"]
        for one, other in zip(*(rank["seen"] for rank in ranks[mixing]), strict=True)
    ]
    assert any(lonely)
    for rank in ranks[mixing]:
        assert all(not batch.get("without_gradient") for batch in rank["seen"])
        assert any(gradient.any() for gradient in rank["gradients"][-1].values())


def test_every_source_ran_dry_at_its_own_time(ranks):
    """Batches of 2 on two ranks: the clips have one an epoch, the documents 2, the pairs 5."""
    for name, size in mix.SIZES.items():
        own = [
            [batch["keys"] for batch in rank["seen"] if batch["keys"][0].startswith(name)]
            for rank in ranks["accumulate"]
        ]
        per_epoch = size // RANKS // 2
        assert per_epoch < STEPS
        for start in range(0, STEPS, per_epoch):
            batches = [batch for rank in own for batch in rank[start : start + per_epoch]]
            keys = [*chain(*batches)]
            assert len(set(keys)) == len(keys), f"both ranks, or one twice, had a sample of {name}"
        epochs = [own[0][start : start + per_epoch] for start in range(0, STEPS, per_epoch)]
        assert epochs[0] != epochs[1]


def test_ranks_draw_apart(ranks):
    first, second = ([batch["draw"] for batch in rank["seen"]] for rank in ranks["accumulate"])
    assert not set(first) & set(second)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_rank(Path(sys.argv[1]))
