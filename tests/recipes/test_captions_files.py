"""Captions files with strange content: named, or skipped with a reason, and never a traceback."""

import json
from pathlib import Path

import pytest

from recipes.captions_files import CaptionRow, read_captions
from recipes.samples import MAX_CHARACTERS, text_problem


def rows(tmp_path: Path, name: str, content: object) -> list[CaptionRow]:
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return read_captions(path)


@pytest.mark.parametrize("content", ["[" * 99_999, '{"a.jpg": ' + "9" * 5000 + "}"])
def test_json_that_python_does_not_read_is_named(tmp_path, content):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"captions.json is not valid JSON: .*; mend it or"):
        read_captions(path)


@pytest.mark.parametrize("bad", [[1], {}, None])
def test_coco_ids_of_no_use_are_skipped_rows(tmp_path, bad):
    images = [{"id": bad, "file_name": "a.jpg"}, {"id": 1.0, "file_name": "b.jpg"}]
    annotations = [{"image_id": bad, "caption": "a"}, {"image_id": 1, "caption": "b"}]
    found = rows(tmp_path, "coco.json", {"images": images, "annotations": annotations})
    assert [(row.image, row.caption, row.problem) for row in found] == [
        ("a.jpg", "", "no image id"),
        ("", "", "unknown image id"),
        ("b.jpg", "b", ""),
    ]


def test_an_id_that_cannot_be_written_is_a_skipped_row(tmp_path):
    items = [{"image": f"{id}.jpg", "caption": "a", "id": id} for id in ("x", "\ud800")]
    first, second = rows(tmp_path, "list.json", items)
    assert (first.id, first.problem) == ("x", "")
    assert (second.id, second.problem) == (None, "not valid Unicode")
    assert second.where == r"list.json item 1: id '\ud800'"


@pytest.mark.parametrize("sentences", [5, None, "a text", {"raw": "x"}])
def test_sentences_of_another_form_are_no_caption(tmp_path, sentences):
    images = [{"filename": "a.jpg", "sentences": sentences}]
    (row,) = rows(tmp_path, "karpathy.json", {"images": images})
    assert row.problem == "no caption"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("x" * MAX_CHARACTERS, None),
        ("x" * (MAX_CHARACTERS + 1), "text too long"),
        ("a\0b", "unreadable caption"),
    ],
)
def test_a_text_that_would_not_be_read_has_a_kind(text, kind):
    found = text_problem(text)
    assert (found and found[0]) == kind
