"""Imports go one way, down the list of rooms, and none hides inside a function (except the drawing libraries')."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "raysegment"
ROOMS = ("climate", "archive", "feed", "networks", "learning", "elastic", "applications", "config", "console", "cli")
LIBRARIES = {  # what a room may import besides the standard library and the rooms above it
    "climate": {"numpy", "scipy"},
    "archive": {"numpy", "scipy", "xarray", "netCDF4", "h5py", "pyarrow", "cftime", "isal", "tenacity", "filelock"},
    "feed": {"numpy", "pyarrow", "ray", "torch", "filelock"},
    "networks": {"torch", "numpy"},
    "learning": {"torch", "numpy"},
}
RAY_IN_FEED = {"stage", "stream", "ahead", "session", "nodes", "depots", "traffic", "distribute", "peers"}
ABOVE = {room: set(ROOMS[:index]) for index, room in enumerate(ROOMS)}
ABOVE["applications"] |= {"config", "console"}  # settings and progress are not rooms of the path
ABOVE["config"] = ABOVE["console"] = {"climate"}
DRAWING = {"matplotlib", "landmetrics", "cartopy", "imageio_ffmpeg"}  # slow to load, or not needed
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> list[tuple[str, bool]]:
    """(module, whether inside a function) of every import statement."""
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            found.append((node.module or "", id(node) in inside))
            if node.module == "raysegment":
                found += [(f"raysegment.{alias.name}", id(node) in inside) for alias in node.names]
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_direction(path: Path) -> None:
    room = room_of(path)
    for module, hidden in imported(ast.parse(path.read_text())):
        parts = module.split(".")
        assert not hidden or parts[0] in DRAWING, f"{path.name} imports {module} inside a function"
        if parts[0] == "raysegment" and len(parts) > 1 and room in ROOMS:
            assert parts[1] == room or parts[1] in ABOVE[room], f"{room}/{path.name} imports {module}, which lies below it"


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(p) in LIBRARIES], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_libraries(path: Path) -> None:
    room = room_of(path)
    for module, _ in imported(ast.parse(path.read_text())):
        top = module.split(".")[0]
        if top in sys.stdlib_module_names or top in {"raysegment", "__future__"}:
            continue
        assert top in LIBRARIES[room], f"{room}/{path.name} imports {top}"
        assert top != "ray" or room != "feed" or path.stem in RAY_IN_FEED, f"ray belongs in feed/{RAY_IN_FEED}, not {path.name}"
