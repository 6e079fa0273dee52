"""Imports go one way, MLflow is spoken to in one file, and `__init__.py` files are empty."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("schemas", "pipelines", "xdecoder", "jobs")
MAY_IMPORT = {
    "schemas": {"schemas"},
    "pipelines": {"schemas", "pipelines"},
    "xdecoder": {"schemas", "xdecoder"},
    "jobs": {"schemas", "pipelines", "xdecoder", "jobs"},
}
FORBIDDEN = {
    "schemas": {"torch", "ray", "mlflow", "webdataset", "timm", "open_clip"},
    "pipelines": {"mlflow", "timm", "open_clip"},
    "xdecoder": {"ray", "mlflow", "webdataset"},
    "jobs": set(),
}
DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc", "lib"}
FILES = [path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))]


def imported(source: str) -> Iterator[str]:
    """The dotted names of all modules that a source imports, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def broken_rules(package: str, source: str) -> list[str]:
    """What is wrong with the imports of a file of a package."""
    names = {name.partition(".")[0] or "relative import" for name in imported(source)}
    wrong = {n for n in names if n in OURS and n not in MAY_IMPORT[package]} | (names & FORBIDDEN[package])
    return sorted(wrong | (names & {"relative import"}))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert not broken_rules(package, path.read_text(encoding="utf-8"))


def test_the_rules_notice_what_they_forbid() -> None:
    assert broken_rules("xdecoder", "def f():\n    import mlflow.pyfunc") == ["mlflow"]
    assert broken_rules("pipelines", "from xdecoder.prompts import tokenize") == ["xdecoder"]
    assert broken_rules("schemas", "from jobs import store") == ["jobs"]
    assert broken_rules("jobs", "from .store import resolve") == ["relative import"]


def test_mlflow_is_spoken_to_in_one_file() -> None:
    speaking = [
        str(path.relative_to(ROOT))
        for path in FILES
        if any(name.partition(".")[0] == "mlflow" for name in imported(path.read_text(encoding="utf-8")))
    ]
    assert speaking == ["jobs/tracking.py"]


def test_packages_hold_no_code_in_init_and_no_drawers() -> None:
    assert not [path for path in FILES if path.name == "__init__.py" and path.read_text(encoding="utf-8")]
    assert not [path for path in FILES if path.stem in DRAWERS]


def test_learning_needs_neither_ray_nor_mlflow() -> None:
    """What `xdecoder` imports from outside is declared, and neither of the two is among it."""
    outside = {
        name.partition(".")[0]
        for path in FILES
        if path.relative_to(ROOT).parts[0] == "xdecoder"
        for name in imported(path.read_text(encoding="utf-8"))
    }
    known = set(OURS) | {"numpy", "torch", "timm", "open_clip", "scipy", "PIL", "pydantic", "safetensors"}
    assert outside - set(sys.stdlib_module_names) <= known | {"pyarrow", "pycocotools", "torchvision"}
