"""The source as a whole: imports point one way, and nothing in it runs what it reads."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "bridges": set(),
    "qformer": {"bridges"},
    "perceiver": {"bridges"},
    "gated_xattn": {"bridges"},
    "recipes": {"bridges", "qformer", "perceiver", "gated_xattn"},
}

SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """First names of everything imported in a file, inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and called(node).endswith("import_module"):
            names |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
    return {name.split(".")[0] for name in names}


def called(node: ast.Call) -> str:
    """``torch.load`` of ``torch.load(…)``."""
    return ast.unparse(node.func)


def test_all_sources_are_found():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(MAY_IMPORT)
    assert len(SOURCES) > 30


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str):
    allowed = {package} | MAY_IMPORT[package]
    for path in (ROOT / package).rglob("*.py"):
        ours = imported(ast.parse(path.read_text(encoding="utf-8"))) & set(MAY_IMPORT)
        assert ours <= allowed, f"{path} imports {sorted(ours - allowed)}"
        assert "tests" not in imported(ast.parse(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_are_typed(package: str):
    assert (ROOT / package / "py.typed").is_file()


def test_nothing_runs_what_it_reads():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names]
                modules.append(getattr(node, "module", "") or "")
                for forbidden in ("pickle", "dill", "cloudpickle", "marshal", "shelve"):
                    assert forbidden not in modules, f"{path}:{node.lineno} imports {forbidden}"
            if not isinstance(node, ast.Call):
                continue
            where, name = f"{path}:{node.lineno}", called(node)
            options = {o.arg: ast.unparse(o.value) for o in node.keywords}
            assert name not in ("eval", "exec", "os.system", "os.popen"), where
            assert not name.endswith("pickle.load") and not name.endswith("pickle.loads"), where
            assert options.get("shell", "False") == "False", where
            assert options.get("trust_remote_code", "False") == "False", where
            if name == "torch.load":
                assert options.get("weights_only") == "True", where
            if name in ("np.load", "numpy.load"):
                assert options.get("allow_pickle", "False") == "False", where


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_says_what_it_holds(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} has no docstring"
