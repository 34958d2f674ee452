"""torch.compile in place: names of weights stay, and what can't be compiled is refused before the work begins."""

from __future__ import annotations

import logging
import types
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from audiosep.errors import UsageError

VERSIONS = 64  # of one piece of code, by width, precision and shape; beyond torch's own limit it would run uncompiled


def compile_network(network: nn.Module, device: torch.device, length: int) -> None:
    """Compile a network for signals (B, length) on a device; the first pass of each B waits. Others run as they did.

    Each length would be compiled anew, and recordings end in pieces of any length.

    Raises:
        UsageError: torch can't compile for this device here.
    """
    _prepare()
    try:
        torch.compile(lambda x: x.sin() + x.cos(), dynamic=False)(torch.zeros(64, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"torch can't compile for {device} here, go without: {reason}") from error
    plain = types.MethodType(type(network).forward, network)
    compiled = torch.compile(plain, dynamic=False)

    def forward(x_t: Tensor, *rest: Any) -> Any:
        return (compiled if x_t.shape[-1] == length else plain)(x_t, *rest)

    network.forward = forward


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
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it wonders where CUDA is
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VERSIONS)
