"""Recipes: a TOML file whose tables are keyword arguments, and `key=value` settings on top of it.

A key that nothing takes is an error that names it: a recipe never says something that is silently left out.
"""

from __future__ import annotations

import difflib
import inspect
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from audiosep.errors import UsageError

__all__ = ["build", "check_tables", "check_type", "load", "override"]

Made = TypeVar("Made")
# Annotations whose values are checked before anything is made: their types in TOML, and their names in messages.
PLAIN = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "text"),
    "bool": ((bool,), "true or false"),
}
# Of lists: of what, how many, and the name.
LISTS = {
    "list[str]": ("str", None, "a list of texts"),
    "Sequence[int]": ("int", None, "a list of whole numbers"),
    "tuple[float, float]": ("float", 2, "a list of two numbers"),
}


def load(path: str | Path, settings: Iterable[str] = ()) -> dict[str, Any]:
    """The tables of a TOML file, changed by settings such as "train.batch_size=8"; UsageError when it can't be had."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such recipe") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: can't be read as TOML: {error}") from error
    for setting in settings:
        override(tables, setting)
    return tables


def override(tables: dict[str, Any], setting: str) -> None:
    """Set one value in place: "a.b=value", the value as TOML writes it; what isn't TOML is text."""
    key, equals, text = setting.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not all([*path, last]):
        raise UsageError(f"a setting is table.key=value, got {setting!r}")
    table = tables
    for name in path:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UsageError(f"{setting}: {name} is a value, not a table")
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text.strip()


def check_tables(tables: Mapping[str, Any], known: Sequence[str]) -> None:
    """UsageError for a table, or a key outside of tables, that is not among `known`."""
    for name, table in tables.items():
        if name not in known:
            raise UsageError(f"{name}: no such table in a recipe{_nearest(name, known)}; it has {', '.join(known)}")
        if not isinstance(table, dict):
            raise UsageError(f"{name} is a table, [{name}], got {table!r}")


def build(make: Callable[..., Made], table: Mapping[str, Any], where: str, **more: Any) -> Made:
    """make(**more, **table), where `table` is the recipe's table `where`; `more` is not the recipe's to set.

    Raises:
        UsageError: a key that `make` does not take or that is missing, or a value that it refuses.
    """
    parameters = inspect.signature(make).parameters
    known = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD and name not in more]
    for key in table:
        if key not in known:
            raise UsageError(
                f"{where}.{key}: no such setting{_nearest(key, known)}; [{where}] takes {', '.join(known)}"
            )
        check_type(parameters[key].annotation, table[key], f"{where}.{key}")
    missing = [name for name in known if parameters[name].default is inspect.Parameter.empty and name not in table]
    if missing:
        raise UsageError(f"[{where}] lacks {', '.join(missing)}")
    try:
        return make(**more, **table)
    except UsageError as error:
        raise UsageError(f"[{where}]: {error}") from error
    except (TypeError, ValueError) as error:
        values = ", ".join(f"{key}={value!r}" for key, value in table.items())
        raise UsageError(f"[{where}]: {error} (with {values})") from error


def check_type(annotation: Any, value: Any, where: str) -> None:
    """UsageError for a value that is not of an annotation such as "int" or "float | None"; others say nothing here."""
    words = (annotation.__name__ if isinstance(annotation, type) else str(annotation)).split(" | ")
    known = [word for word in words if word in {*PLAIN, *LISTS}]
    if not known or not {*words} <= {*known, "None"}:
        return
    if value is None and "None" in words:
        return
    if not any(_is(word, value) for word in known):
        names = [(PLAIN.get(word) or LISTS[word])[-1] for word in known] + ["left out"] * ("None" in words)
        raise UsageError(f"{where} is {' or '.join(names)}, got {value!r}")


def _is(word: str, value: Any) -> bool:
    """Whether a value is of a type that is named as in `PLAIN` and `LISTS`."""
    if word in LISTS:
        one, count, _ = LISTS[word]
        return isinstance(value, list | tuple) and count in (None, len(value)) and all(_is(one, v) for v in value)
    return type(value) in PLAIN[word][0] and value == value  # not isinstance: True is an int to Python


def _nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {match[0]}?)" if match else ""
