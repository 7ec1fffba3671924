"""Checks what the demo wrote: files, keys, and that both bridges see the picture."""

import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
summary = json.loads((folder / "summary.json").read_text())
page = (folder / "report.html").read_text()
assert "http" not in page.replace("http://www.w3.org", ""), "the report is not self-contained"
assert len(summary["bridges"]) == 2
for name, found in summary["bridges"].items():
    for part in ("object", "relation", "colour"):
        assert found[f"acc_{part}"] >= 0
        assert found[f"acc_{part}_shuffled"] >= 0
    assert found["trainable_parameters"] > 0
    assert found["steps"] > 0
    assert found["seconds"] > 0
    assert found["nll_right"] < found["nll_shuffled"], (name, found)
    assert found["nll_right"] < found["nll_blind"], (name, found)
print("demo:", json.dumps(summary["bridges"], indent=2))
