"""Who may import whom: a module imports strictly lower layers, or files of its own folder."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "audiosep"

# The table of the design. A folder stands for its files.
LAYERS = {
    "errors": -1,  # every layer raises them
    "audio": 0,
    "stft": 0,
    "mdct": 0,
    "schedules": 0,
    "metrics": 0,
    "distributed": 0,
    "recipe": 0,
    "progress": 0,
    "compiling": 0,
    "mixing": 1,
    "losses": 1,
    "operators": 1,
    "data": 1,
    "report": 1,
    "backbones": 1,
    "longform": 2,
    "prior": 2,
    "supervised": 2,
    "tagger": 2,
    "refiner": 2,
    "baselines": 2,
    "blind": 2,
    "train": 2,
    "guidance": 3,
    "lowrank": 3,
    "samplers": 3,
    "multiview_frames": 3,
    "hub": 3,
    "separator": 4,
    "mixtures": 4,
    "results": 4,
    "multiview_start": 4,
    "direct": 5,
    "batch": 6,
    "evaluate": 6,
    "diagnose": 6,
    "doctor": 6,
    "multiview": 6,
    "multiview_baselines": 6,
    "stems": 7,
    "fit": 7,
    "learn": 7,
    "cli": 8,
    "__main__": 9,
}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def part(module):
    """The entry of LAYERS that a dotted name below audiosep belongs to."""
    return module.split(".")[1]


def imported(path):
    """The audiosep modules that a file imports, in functions too, except for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("audiosep."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "audiosep":
                yield from (f"audiosep.{a.name}" for a in node.names if not a.name.startswith("_"))
            elif (node.module or "").startswith("audiosep."):
                yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_downwards(path):
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    assert own in LAYERS, f"{relative}: not in the table"
    for module in imported(path):
        other = part(module)
        assert other in LAYERS, f"{relative} imports {module}: not in the table"
        if len(relative.parts) > 1 and other == own:
            continue
        assert LAYERS[other] < LAYERS[own], f"{relative} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_separating_needs_no_torchaudio(path):
    """Its wheels don't import beside every torch; only training may use it, and who makes its Conv-TasNet."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if path.stem == "conv_tasnet" else ast.walk(tree)
    names = [
        name
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(a.name for a in node.names)]
    ]
    if path.stem not in ("train", "data"):
        assert not any(name.split(".")[0] == "torchaudio" for name in names)
