"""Where the model runs, as the command line has it: what is there, and how work is given to it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from server.adapters.streams import CudaStreams, Streams
from server.errors import ConfigError
from server.model.graphs import CudaGraph, Graph

MIN_CAPABILITY = (8, 0)  # of NVIDIA devices: bfloat16 and asynchronous copies


@dataclass(frozen=True, slots=True)
class Device:
    """`streams` None: a step has ended when its call returns. `new_graph` None: there are no graphs."""

    where: torch.device
    facts: tuple[tuple[str, str], ...] = ()  # for the start banner
    streams: Streams | None = None
    new_graph: Callable[[], Graph] | None = None


def open_device(name: str) -> Device:
    """The device called "cpu", "cuda" or "cuda:N". Raises ConfigError where there is no such device.

    A CUDA device becomes the calling thread's current one, as kernels are launched on that.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ConfigError(f"--device {name}: there are cpu, cuda and cuda:N")
    if name == "cpu":
        return Device(torch.device("cpu"))
    where = torch.device("cuda", int(match[1] or 0))
    reason = _refusal(where.index)
    if reason is not None:
        raise ConfigError(f"--device {name}: {reason}; use another device, or --device cpu")
    torch.cuda.set_device(where)
    pool = torch.cuda.graph_pool_handle()
    facts = (("device", f"{where}: {torch.cuda.get_device_name(where)}"),)
    return Device(where, facts, CudaStreams(where), lambda: CudaGraph(pool))


def _refusal(index: int) -> str | None:
    """Why the CUDA device can't be used; None when it can."""
    if not torch.backends.cuda.is_built():
        return f"this build of torch ({torch.__version__}) has no CUDA"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA device, or no driver for it"
    if index >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} CUDA devices, counted from 0"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        return f"{torch.cuda.get_device_name(index)} has compute capability {found}, {needed} is needed"
    return None
