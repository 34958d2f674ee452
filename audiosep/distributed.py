"""Several processes, one run: who am I, and which part is mine, from what torchrun and `accelerate launch` set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

from audiosep.errors import UsageError

__all__ = ["local_rank", "rank", "shard", "world_size"]

Element = TypeVar("Element")


def rank() -> int:
    """This process's number, 0 when it is alone."""
    return _number("RANK", 0)


def local_rank() -> int:
    """This process's number on its machine."""
    return _number("LOCAL_RANK", 0)


def world_size() -> int:
    """How many processes there are, 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def shard(items: Sequence[Element]) -> list[Element]:
    """This process's share of a sequence: every `world_size`-th, from `rank`."""
    return list(items[rank() :: world_size()])


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "") or str(default)
    if not text.isdecimal():
        raise UsageError(f"the environment variable {name} is a whole number, got {text!r}")
    return int(text)
