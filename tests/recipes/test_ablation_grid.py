"""The YAML of an ablation: what becomes of it, and what is refused."""

import pytest
import yaml

from recipes.ablation_cells import cells_of
from recipes.ablation_command import _overrides
from recipes.ablation_fair import UnfairError, check_planned
from recipes.ablation_grid import GRIDS, read_grid
from recipes.ablation_plan import slug
from recipes.cli import main
from recipes.config_keys import get_key, set_key

RESAMPLER = "model.bridge.init_args.resampler"
SHIPPED = sorted(path.stem for path in GRIDS.glob("*.yaml"))


def test_the_grids_that_were_promised_are_shipped():
    names = ("adapters", "flamingo_gates", "blip2_stage1", "tokens")
    assert {*names, *(f"{name}_small" for name in names)} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_grid_is_fair_and_has_its_controls(name):
    found, grid = read_grid(name)
    cells = cells_of(grid)
    check_planned(cells, grid.match)
    assert found == name and grid.title
    assert [cell.kind for cell in cells[-2:]] == ["blind", "twin"]
    assert len(grid.seeds) >= 3
    twin, base = cells[-1], next(c for c in cells if c.name == cells[-1].twin_of)
    assert (twin.config, twin.first) == (base.config, base.first)
    assert not set(twin.seeds) & set(base.seeds)
    blind = get_key(cells[-2].config, f"{RESAMPLER}.class_path")
    assert blind == "bridges.BlindResampler"
    if name.endswith("_small"):
        assert grid.data == "scenes"


def test_adapters_are_every_resampler_with_every_reader():
    for name in ("adapters", "adapters_small"):
        cells = [cell for cell in cells_of(read_grid(name)[1]) if cell.kind == "cell"]
        classes = {
            (
                get_key(cell.config, "model.bridge.class_path"),
                get_key(cell.config, f"{RESAMPLER}.class_path"),
            )
            for cell in cells
        }
        readers = ("bridges.SoftPrefix", "gated_xattn.GatedXAttn")
        resamplers = ("bridges.Projector", "qformer.QFormer", "perceiver.PerceiverResampler")
        assert classes == {(reader, one) for reader in readers for one in resamplers}
        assert len(cells) == 6


def test_a_setting_takes_the_place_of_all_below_its_key():
    config = {"a": {"b": {"class_path": "x.Y", "init_args": {"old": 1}}}}
    set_key(config, "a.b", {"class_path": "x.Z"})
    set_key(config, "a.b.init_args.new", 2)
    set_key(config, "c.d", [1])
    assert config == {"a": {"b": {"class_path": "x.Z", "init_args": {"new": 2}}}, "c": {"d": [1]}}
    assert get_key(config, "a.b.init_args.new") == 2 and get_key(config, "a.z.y") is None


def test_a_class_by_its_path_alone_can_be_given_arguments():
    config = {"resampler": "bridges.Projector"}
    set_key(config, "resampler.init_args.layers", 1)
    assert config["resampler"] == {"class_path": "bridges.Projector", "init_args": {"layers": 1}}


def test_a_key_through_a_number_is_refused():
    with pytest.raises(ValueError, match="expected a mapping there"):
        set_key({"a": 1}, "a.b", 2)


def test_axes_are_combined_in_their_order():
    grid = {
        "base": "perceiver_small",
        "controls": [],
        "overrides": {"model.prompt": "first"},
        "axes": {
            "data.seed": [3, 4],
            "prompt": {"same": {}, "other": {"model.prompt": "later"}},
        },
        "cells": {"more": {"model.prompt": "more"}},
    }
    cells = cells_of(read_grid(grid)[1])
    assert [cell.name for cell in cells] == [
        "seed 3, same",
        "seed 3, other",
        "seed 4, same",
        "seed 4, other",
        "more",
    ]
    assert [get_key(cell.config, "data.seed") for cell in cells] == [3, 3, 4, 4, None]
    assert [get_key(cell.config, "model.prompt") for cell in cells][:2] == ["first", "later"]
    assert cells[1].settings == {"data.seed": "seed 3", "prompt": "other"}
    with pytest.raises(UnfairError, match=r"found data\.seed: 4"):
        check_planned(cells, "steps")


def test_what_is_not_said_is_the_default():
    grid = {"base": "perceiver_small", "cells": {"a": {}, "b": {"data.seed": 0}}}
    check_planned(cells_of(read_grid(grid)[1]), "steps")


def test_a_first_stage_has_no_part_in_a_budget():
    cells = cells_of(read_grid("blip2_stage1_small")[1])
    with pytest.raises(UnfairError, match="found a first stage with match: flops"):
        check_planned(cells, "flops")


def test_no_two_cells_share_a_folder():
    names = ["layer -2", "layer 2", "ITC + ITM", "ITC, ITM", "MLP", "mlp", "..", "/", "a" * 200]
    slugs = [slug(name).lower() for name in names]
    assert len(set(slugs)) == len(names)
    assert all("/" not in one and ".." not in one and len(one) < 80 for one in slugs)


def test_keys_of_the_grid_on_the_command_line():
    given = ["trainer.max_steps=7", "grid.seeds=[5]", "grid.lr=null", "grid.evaluate.pictures=9"]
    _, grid = read_grid("tokens_small", _overrides(given))
    assert grid.seeds == [5] and grid.lr is None and grid.evaluate.pictures == 9
    assert grid.evaluate.max_new_tokens == read_grid("tokens_small")[1].evaluate.max_new_tokens
    assert all(get_key(cell.config, "trainer.max_steps") == 7 for cell in cells_of(grid))


def test_the_first_stage():
    grid = {"base": "blip2_stage2_small", "first": "blip2_stage1_small", "controls": []}
    cells = cells_of(
        read_grid(grid | {"cells": {"a": {"first.model.weights.itg": 0}, "b": {"first": None}}})[1]
    )
    assert get_key(cells[0].first or {}, "model.weights.itg") == 0
    assert cells[1].first is None
    with pytest.raises(ValueError, match=r"found first.x: 1 in 'a'; expected `first: null`"):
        cells_of(read_grid({"base": "perceiver_small", "cells": {"a": {"first.x": 1}}})[1])
    blind = cells_of(read_grid("blip2_stage1_small")[1])[-2]
    assert blind.kind == "blind" and blind.first is None
    assert blind.config["model"]["init_from"] is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bases": "x"}, "found the key 'bases' .* perhaps base"),
        ({"evaluate": {"picture": 9}}, "found the key 'evaluate.picture' .* perhaps pictures"),
        ({"seeds": []}, "expected at least one, and none twice"),
        ({"seeds": [1, 1]}, "expected at least one, and none twice"),
        ({"seeds": "many"}, "cannot be read"),
        ({"match": "luck"}, "cannot be read"),
        ({"lr": {"values": [1e-3]}}, "cannot be read"),
        ({"axes": ["a"]}, "expected a mapping"),
        ({"axes": {"a": 3}}, "found 3 as the axis 'a'"),
        ({"axes": {"a": {"b": 3}}}, "found 3 as a setting of 'b'"),
        ({"baseline": "nobody"}, "found baseline 'nobody'; expected a cell: base"),
        ({"base": "nothing_small"}, "found no config file 'nothing_small'"),
        ({"axes": {"a": {"x": {}}}, "cells": {"x": {}}}, "found the cell 'x' twice"),
        ({"base": "blip2_stage1_small"}, "to be made blind"),
        ({"cells": {"a": {}, "blind": {}}}, "found the cell 'blind' twice"),
        ({"axes": {"seed_everything": [1, 2]}}, "expected no cell to set it: give `seeds`"),
        ({"lr": {"values": [1.0], "steps": 9}, "axes": {"model.optimizer.lr": [1]}}, "leave `lr`"),
        ({"lr": {"values": [], "steps": 9}}, "expected at least one value"),
        ({"evaluate": {"pictures": 1}}, "expected at least 2 pictures"),
        ({"evaluate": {"captions": False, "likelihood": False}}, "captions or likelihood"),
    ],
)
def test_a_grid_that_is_none_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        cells_of(read_grid({"base": "perceiver_small"} | change)[1])


def test_a_grid_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"found no grid 'nothing'; .* adapters_small"):
        read_grid("nothing")
    path = tmp_path / "broken.yaml"
    path.write_text("base: [")
    with pytest.raises(ValueError, match="which is no YAML"):
        read_grid(path)
    path.write_text("- base")
    with pytest.raises(ValueError, match="expected `base` and any of"):
        read_grid(path)


def test_a_dry_run_trains_nothing(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": "perceiver_small", "title": "mine"}))
    assert main(["ablate", str(path), "--out", str(tmp_path / "out"), "--dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert "base (twin): 3 seeds" in said and "3 cells, 9 runs, matched on steps" in said
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_what_cannot_be_read(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    typo = {"model.bridge.init_args.resampler.init_args.dept": 1}
    grid = {"base": "perceiver_small", "controls": [], "cells": {"good": {}, "typo": typo}}
    path.write_text(yaml.safe_dump(grid))
    assert main(["ablate", str(path), "--out", str(tmp_path / "out"), "--dry_run=true"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "typo cannot be trained" in said and "dept" in said
    assert "good cannot be trained" not in said


def test_an_override_as_of_train(tmp_path, capsys):
    arguments = ["ablate", "tokens_small", "--out", str(tmp_path), "--trainer.max_steps=5"]
    assert main(arguments) == 2
    assert "without dashes" in capsys.readouterr().err


def test_an_override_without_a_value(tmp_path, capsys):
    assert main(["ablate", "tokens_small", "--out", str(tmp_path), "=5"]) == 2
    assert "expected KEY=VALUE" in capsys.readouterr().err
