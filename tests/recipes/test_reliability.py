"""`bridges reliability`: the summary, the page and the exit code; the harnesses are stand-ins."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes import cli, reliability
from recipes.reliability import BEGIN, END, ROWS

GOOD = {
    "kills": {"runs": 48, "identical": 48, "lost": 0, "repeated": 0, "by_setting": []},
    "faults": {"injected": 200, "named": 200, "good_lost": 0, "by_kind": {"x": 200}},
    "payloads": {"tried": 30, "executed": 0},
    "checkpoints": {"kills": 100, "unloadable": 0, "orphans": 0},
}
PAGE = f"# Title\n\nbefore\n\n{BEGIN}\n\nold\n\n{END}\n\nafter | this\n"


@pytest.fixture
def harnesses(monkeypatch):
    """What each harness will find; a test changes it."""
    found = {name: dict(counts) for name, counts in GOOD.items()}

    def stand_in(module: str):
        name = module.removeprefix("recipes.reliability_")

        def measure(folder: Path, *, quick: bool) -> dict:
            assert folder.is_dir() and not any(folder.iterdir())
            (folder / "log").write_text("evidence")
            return found[name]

        return SimpleNamespace(measure=measure)

    monkeypatch.setattr(reliability, "import_module", stand_in)
    return found


def run(out: Path, *more: str) -> int:
    """The exit code of the command."""
    try:
        return cli.main(["reliability", f"--out={out}", *more])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


def test_the_summary_has_exactly_the_contracts_keys(harnesses, tmp_path):
    assert run(tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {
        "kills": {"runs": 48, "identical": 48, "lost": 0, "repeated": 0},
        "faults": {"injected": 200, "named": 200, "good_lost": 0},
        "payloads": {"tried": 30, "executed": 0},
        "checkpoints": {"kills": 100, "unloadable": 0, "orphans": 0},
    }
    details = json.loads((tmp_path / "details.json").read_text())
    assert details["rows"]["faults"]["by_kind"] == {"x": 200}
    assert details["command"].startswith("bridges reliability --out=")
    assert {"git_revision", "date", "cores", "packages", "machine"} <= details.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "details.json"}


@pytest.mark.parametrize(
    ("row", "counts"),
    [
        ("kills", {"identical": 47}),
        ("kills", {"lost": 1}),
        ("kills", {"repeated": 1}),
        ("kills", {"runs": 0, "identical": 0}),
        ("kills", {"hung": 1}),
        ("kills", {"failures": ["with changed workers: …"]}),
        ("faults", {"named": 199}),
        ("faults", {"good_lost": 1}),
        ("faults", {"miscounted": ["a shard"]}),
        ("payloads", {"executed": 1}),
        ("payloads", {"tried": 0}),
        ("checkpoints", {"unloadable": 1}),
        ("checkpoints", {"orphans": 1}),
    ],
)
def test_what_does_not_hold_fails_and_leaves_its_folder(harnesses, tmp_path, capsys, row, counts):
    harnesses[row] |= counts
    assert run(tmp_path) == 1
    [left] = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert left.name.startswith(row) and (left / "log").read_text() == "evidence"
    assert left.name in capsys.readouterr().out.replace("\n", "")
    assert set(json.loads((tmp_path / "summary.json").read_text())) == set(ROWS)


def test_the_table_alone_is_written_anew(harnesses, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for _ in range(2):
        assert run(tmp_path / "out", f"--docs={page}") == 0
        text = page.read_text()
        assert text.startswith(PAGE.partition("old")[0])
        assert text.endswith(f"\n\n{END}\n\nafter | this\n")
        assert "old" not in text
        assert "| 48 | 48 continued bit for bit; samples lost: 0, repeated: 0 |" in text
        assert text.count("| 100 |") == 1


def test_a_page_without_a_place_is_refused_before_the_work(harnesses, tmp_path, capsys):
    page = tmp_path / "page.md"
    for text in ("# Title\n", PAGE.replace(END, ""), PAGE + f"{BEGIN}\n"):
        page.write_text(text)
        assert run(tmp_path / "out", f"--docs={page}") == 2
        assert "expected lines" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_part_does_not_make_the_table(harnesses, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for part in ("--only=kills", "--quick=true"):
        assert run(tmp_path / "out", f"--docs={page}", part) == 2
        assert "one whole run" in capsys.readouterr().err
    assert page.read_text() == PAGE


def test_only_some_rows(harnesses, tmp_path, capsys):
    assert run(tmp_path, "--only=payloads,faults") == 0
    assert set(json.loads((tmp_path / "summary.json").read_text())) == {"payloads", "faults"}
    assert run(tmp_path, "--only=kill") == 2
    assert "expected some of kills" in capsys.readouterr().err


def test_the_page_has_a_place_and_make_a_target():
    root = Path(reliability.__file__).parents[1]
    assert reliability.page_with(root / "docs/reliability.md", "")
    makefile = (root / "Makefile").read_text()
    assert "bridges reliability --out runs/reliability --docs docs/reliability.md" in makefile
