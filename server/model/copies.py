"""What a step's data takes to the device and back without the host waiting for it: pinned memory and events.

Copies go in the stream of the steps, so they need no fence between themselves and what reads or writes beside them
there. What they do need is host memory that stays as it is until they have happened: `Sent` says when.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch


class Sent(Protocol):
    """A copy to the device that was started."""

    def synchronize(self) -> None:
        """Wait until it has read all of its source."""


class Fetched(Protocol):
    """Copies to the host that were started together."""

    def wait(self) -> Sequence[torch.Tensor]:
        """The tensors on the host, once all have come."""


class Copies(Protocol):
    """The ways between the host and one device."""

    device: torch.device
    is_shared: bool
    """whether host memory is the device's own, so that nothing is ever in flight between them"""

    def buffer(self, *shape: int) -> torch.Tensor:
        """int64 zeros on the host that the device can copy from by itself."""

    def send(self, target: torch.Tensor, source: torch.Tensor) -> Sent:
        """Start to copy a `buffer` to the device."""

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetched:
        """Start to bring tensors to the host."""


class CpuCopies:
    """Where the host is the device: everything is there at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_shared = True

    def buffer(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    def send(self, target: torch.Tensor, source: torch.Tensor) -> Sent:
        target.copy_(source)
        return _Done(())

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetched:
        return _Done(tensors)


class CudaCopies:
    """Those of an NVIDIA device, in the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_shared = False

    def buffer(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, pin_memory=True)

    def send(self, target: torch.Tensor, source: torch.Tensor) -> Sent:
        target.copy_(source, non_blocking=True)
        return self._mark()

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetched:
        pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for target, source in zip(pinned, tensors, strict=True):
            target.copy_(source, non_blocking=True)
        return _InFlight(pinned, self._mark())

    def _mark(self) -> Sent:
        event: Sent = torch.cuda.current_stream(self.device).record_event()
        return event


class _Done:
    """Of either direction, and done already."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors

    def synchronize(self) -> None:
        pass

    def wait(self) -> Sequence[torch.Tensor]:
        return self._tensors


class _InFlight:
    def __init__(self, pinned: Sequence[torch.Tensor], end: Sent) -> None:
        self._pinned = pinned
        self._end = end

    def wait(self) -> Sequence[torch.Tensor]:
        self._end.synchronize()
        return self._pinned


def copies_of(device: torch.device) -> Copies:
    """Those of a device."""
    return CpuCopies(device) if device.type == "cpu" else CudaCopies(device)


def is_near(device: torch.device) -> bool:
    """Whether the host can look at a tensor there without waiting for all that was asked of the device before."""
    return str(device.type) == "cpu"


def to_device(values: Sequence[Any] | npt.NDArray[Any], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A new tensor of host values, in stream order; they may be changed as soon as this returns, except on the CPU,
    where an array's memory is taken as it is."""
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values, dtype=dtype)
    if is_near(device):
        return host.to(dtype)
    # torch gives pinned memory back to its pool only when the copies out of it have ended
    return host.to(dtype).pin_memory().to(device, non_blocking=True)
