"""torch.compile in place: names of weights stay, and what can't be compiled is refused before the work begins."""

from __future__ import annotations

import os
import shutil
import warnings

import torch
from torch import nn

from audiosep.errors import UsageError

VERSIONS = 64  # of one piece of code, by width, precision and shape; beyond torch's own limit it would run uncompiled


def compile_network(network: nn.Module, device: torch.device) -> None:
    """Compile the whole of a network for one device; the first pass of each batch size and length waits.

    Raises:
        UsageError: torch can't compile for this device here.
    """
    compilers = (os.environ.get("CXX", "g++"), "clang++", "cl")
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UsageError("compiling needs a C++ compiler, and none is installed: install g++, or go without")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"compiling is for CUDA and CPUs: go without it on {device.type}")
    _prepare()
    network.compile(dynamic=False)


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the members of every ModuleList that have parts of their own: blocks of one class share compiled code."""
    _prepare()
    for parent in model.modules():
        if isinstance(parent, nn.ModuleList):
            for block in parent:
                if any(True for _ in block.children()):
                    block.compile(backend=backend, dynamic=False)


def _prepare() -> None:
    # The cached tables of windows and rotary positions are computed in the compiled code, complex numbers outside it.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex operators")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VERSIONS)
