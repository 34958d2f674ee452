"""Errors a user can act on. Each message names the value and the remedy."""


class AudiosepError(Exception):
    """Base class of every error that audiosep raises on purpose."""


class AudioError(AudiosepError):
    """A recording can't be read or written (missing, empty, corrupt, not audio, disk full)."""


class ModelError(AudiosepError):
    """A checkpoint can't be had or used (not found, truncated, of another shape, a pickle)."""


class UsageError(AudiosepError, ValueError):
    """An argument is wrong (unknown source name, impossible number, clashing options)."""


def at_least(least: int, **numbers: int) -> None:
    """UsageError that names the first of these numbers which is less."""
    for name, number in numbers.items():
        if number < least:
            raise UsageError(f"{name} is at least {least}, got {number}")
