"""Errors a user can act on. Each message names the value and the remedy."""


class AudiosepError(Exception):
    """Base class of every error that audiosep raises on purpose."""


class AudioError(AudiosepError):
    """A recording can't be read or written (missing, empty, corrupt, not audio, disk full)."""


class ModelError(AudiosepError):
    """A checkpoint can't be had or used (not found, truncated, of another shape, a pickle)."""


class UsageError(AudiosepError, ValueError):
    """An argument is wrong (unknown source name, impossible number, clashing options)."""
