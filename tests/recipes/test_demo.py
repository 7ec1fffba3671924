"""The demo from shards to report, on tiny models."""

import json
import re
from html.parser import HTMLParser

import pytest

from recipes import cli
from recipes.demo import BRIDGES, demo

SCORES = ("nll_right", "nll_shuffled", "nll_blind")
SHARES = ("acc_object", "acc_relation", "acc_colour")


@pytest.fixture(scope="module")
def overrides(on_disk, tmp_path_factory):
    kept = on_disk.arguments(tmp_path_factory.mktemp("unused"))
    return [a for a in kept if not a.startswith(("--config", "--data=", "--run"))]


@pytest.fixture(scope="module")
def finished(on_disk, overrides, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRIDGES_CACHE", str(tmp_path_factory.mktemp("cache")))
        demo(out, on_disk.shards, overrides=overrides)
    return out


def test_the_summary_has_every_figure_of_both_bridges(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["bridges"].keys() == BRIDGES.keys()
    for found in summary["bridges"].values():
        assert found["trainable_parameters"] > 0
        assert found["steps"] == 4
        assert found["seconds"] > 0
        assert found["held_out_pictures"] == 6
        assert all(found[key] > 0 for key in SCORES)
        # Held-out scenes here have one object: there is no relation to be right about.
        assert found["acc_relation"] is None
        for key in (k for k in SHARES if k != "acc_relation"):
            assert 0 <= found[key] <= 1
            assert 0 <= found[f"{key}_shuffled"] <= 1


def test_the_report_is_one_page_with_its_pictures(finished):
    page = (finished / "report.html").read_text()
    parser = HTMLParser()
    parser.feed(page)
    assert page.count("<figure>") == 6
    assert page.count("data:image/jpeg;base64,") == 6
    assert "<svg" in page
    # Self-contained: nothing is fetched.
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page.replace("xlink:href", "x"))


def test_the_same_data_is_not_encoded_twice(on_disk, overrides, finished, tmp_path, monkeypatch):
    """A second demo finds features, replaces its own runs, and gives the same figures."""
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path / "cache"))
    names = ["soft_prefix"]
    first = demo(tmp_path / "out", on_disk.shards, names, overrides)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.tar")}
    second = demo(tmp_path / "out", on_disk.shards, names, overrides)
    assert written
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.tar")} == written
    same = [f"acc_{p}" for p in ("object", "colour")] + list(SCORES)
    for key in same:
        assert first["bridges"]["soft_prefix"][key] == second["bridges"]["soft_prefix"][key]


def test_what_an_interrupted_run_left_is_replaced(on_disk, overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("BRIDGES_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "out" / "soft_prefix"
    (run / "csv-0").mkdir(parents=True)
    (run / ".bridge.safetensors.123").write_text("half")
    demo(tmp_path / "out", on_disk.shards, ["soft_prefix"], overrides)
    assert not (run / ".bridge.safetensors.123").exists()


def test_other_data_than_is_scored_is_refused(on_disk, tmp_path):
    with pytest.raises(ValueError, match="override"):
        demo(tmp_path, on_disk.shards, overrides=["--data.val_shards=elsewhere"])


def test_a_folder_that_is_no_run_is_left_alone(on_disk, overrides, tmp_path, capsys):
    kept = tmp_path / "out" / "soft_prefix" / "thesis.tex"
    kept.parent.mkdir(parents=True)
    kept.write_text("years of work")
    arguments = ["demo", "--out", str(tmp_path / "out"), "--data", str(on_disk.shards)]
    assert cli.main(arguments) == 2
    assert "--out" in capsys.readouterr().err
    assert kept.read_text() == "years of work"
