"""Recipes: tables are keyword arguments, settings change them, nothing is silently left out."""

from collections.abc import Sequence

import pytest

from audiosep import distributed, recipe
from audiosep.errors import UsageError


def make(width: int = 4, *, depth=(1, 2), name="net", device=None):
    if width < 1:
        raise ValueError(f"width is at least 1, got {width}")
    return width, tuple(depth), name, device


def test_a_table_is_keyword_arguments(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("[net]\nwidth = 8\n[train]\nrate = 1e-3\n")
    settings = ["net.depth=[3, 4]", "train.rate=2e-3", "net.name=a name", "data.manifest = data/x.csv", "data.on=true"]
    tables = recipe.load(path, settings)
    assert tables["train"] == {"rate": 2e-3}
    assert tables["data"] == {"manifest": "data/x.csv", "on": True}
    assert recipe.build(make, tables["net"], "net", device="cpu") == (8, (3, 4), "a name", "cpu")


def test_errors_name_the_key(tmp_path):
    with pytest.raises(UsageError, match=r"net\.widht: no such setting \(did you mean width\?\)"):
        recipe.build(make, {"widht": 3}, "net")
    with pytest.raises(UsageError, match=r"net\.device: no such setting"):
        recipe.build(make, {"device": "cpu"}, "net", device="cuda")
    with pytest.raises(UsageError, match=r"\[net\]: width is at least 1, got 0"):
        recipe.build(make, {"width": 0}, "net")
    with pytest.raises(UsageError, match=r"\[net\].*depth=3"):
        recipe.build(make, {"depth": 3}, "net")
    with pytest.raises(UsageError, match=r"\[x\] lacks path"):
        recipe.build(lambda path, other=1: 0, {}, "x")
    with pytest.raises(UsageError, match=r"trian: no such table in a recipe \(did you mean train\?\)"):
        recipe.check_tables({"trian": {}}, ["train", "data"])
    with pytest.raises(UsageError, match="train is a table"):
        recipe.check_tables({"train": 3}, ["train", "data"])
    path = tmp_path / "r.toml"
    with pytest.raises(UsageError, match="no such recipe"):
        recipe.load(path)
    path.write_text("[net\n")
    with pytest.raises(UsageError, match="as TOML"):
        recipe.load(path)
    path.write_text("[net]\nwidth = 1\n")
    for setting, said in (
        ("width", "table.key=value"),
        (".=1", "table.key=value"),
        ("net.width.a=1", "width is a value"),
    ):
        with pytest.raises(UsageError, match=said):
            recipe.load(path, [setting])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("width", 4.5, r"net\.width is a whole number, got 4\.5"),
        ("width", True, r"net\.width is a whole number, got True"),
        ("width", "wide", r"net\.width is a whole number, got 'wide'"),
        ("rate", "fast", r"net\.rate is a number or left out, got 'fast'"),
        ("rate", float("nan"), r"net\.rate is a number or left out, got nan"),
        ("rate", False, r"net\.rate is a number"),
        ("name", 3, r"net\.name is text, got 3"),
        ("on", "no", r"net\.on is true or false, got 'no'"),
        ("names", 5, r"net\.names is text or a list of texts or left out, got 5"),
        ("names", ["a", 5], r"net\.names is text or a list of texts or left out, got \['a', 5\]"),
        ("sizes", 3, r"net\.sizes is a list of whole numbers, got 3"),
        ("span", [1], r"net\.span is a list of two numbers, got \[1\]"),
        ("span", [1, True], r"net\.span is a list of two numbers"),
    ],
)
def test_values_of_another_type_are_refused(key, value, message):
    def made(
        width: int = 4,
        rate: float | None = None,
        name: str = "",
        on: bool = False,
        more: dict | str = "",
        names: "str | list[str] | None" = None,
        sizes: "Sequence[int]" = (),
        span: "tuple[float, float]" = (0, 1),
    ):
        return width, rate, name, on, more

    recipe.build(made, {"names": ["a", "b"], "sizes": [1, 2], "span": [1, 2.5]}, "net")
    recipe.build(made, {"names": "a", "sizes": (), "span": (1, 2)}, "net")
    assert recipe.build(made, {"rate": 3, "width": 2, "on": True, "more": 5}, "net") == (2, 3, "", True, 5)
    with pytest.raises(UsageError, match=message):
        recipe.build(made, {key: value}, "net")


def test_shards_cover_a_list_once(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.shard("abcde") == list("abcde")
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(distributed.shard("abcde"))
    assert parts == [["a", "d"], ["b", "e"], ["c"]]
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UsageError, match="RANK"):
        distributed.rank()
