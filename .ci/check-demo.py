"""Checks what the demo wrote: files, keys, and that both bridges see the picture."""

import json
import re
import sys
from pathlib import Path

folder = Path(sys.argv[1])
summary = json.loads((folder / "summary.json").read_text())
page = (folder / "report.html").read_text()
loads = re.findall(r"""\b(?:src|href)=["'](?!data:|#)[^"']*""", page)
assert not loads, f"the report is not self-contained: {loads[:3]}"
assert len(summary["bridges"]) == 2
for name, found in summary["bridges"].items():
    for part in ("object", "relation", "colour"):
        assert found[f"acc_{part}"] >= 0
        assert found[f"acc_{part}_shuffled"] >= 0
    assert found["trainable_parameters"] > 0
    assert found["steps"] > 0
    assert found["seconds"] > 0
    assert found["nll_right"] < 0.85 * found["nll_shuffled"], (name, found)
    assert found["nll_right"] < found["nll_blind"], (name, found)
    assert found["acc_object"] > found["acc_object_shuffled"], (name, found)
    assert found["acc_colour"] >= 2 * found["acc_colour_shuffled"], (name, found)
print("demo:", json.dumps(summary["bridges"], indent=2))
