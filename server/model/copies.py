"""What a step's data takes to the device and back without the host waiting for it: pinned memory and events.

Copies go in the stream of the steps, so they need no fence between themselves and what reads or writes beside them
there. What they do need is host memory that stays as it is until they have happened.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch


class Sent(Protocol):
    """A copy to the device that was started."""

    def synchronize(self) -> None:
        """Wait until it has read all of its source."""


class Stage(Protocol):
    """A tensor on the device, at an address that stays, that the host writes to again and again."""

    target: torch.Tensor

    def begin(self) -> torch.Tensor:
        """Where the host writes what comes next; what the device has stays as it is until `send`."""

    def send(self) -> None:
        """Have it come to the device, in stream order."""


class Fetched(Protocol):
    """Copies to the host that were started together."""

    def wait(self) -> Sequence[torch.Tensor]:
        """The tensors on the host, once all have come."""


class Copies(Protocol):
    """The ways between the host and one device."""

    device: torch.device

    def stage(self, *shape: int, num_steps: int) -> Stage:
        """An int64 tensor that is written once a step, with so many steps in flight at most."""

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetched:
        """Start to bring tensors to the host."""


class CpuCopies:
    """Where the host is the device: everything is there at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def stage(self, *shape: int, num_steps: int) -> Stage:
        return _Direct(torch.zeros(shape, dtype=torch.int64))

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetched:
        return _Here(tensors)


class CudaCopies:
    """Those of an NVIDIA device, in the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def stage(self, *shape: int, num_steps: int) -> Stage:
        buffers = [torch.zeros(shape, dtype=torch.int64, pin_memory=True) for _ in range(num_steps)]
        return Ring(torch.zeros(shape, dtype=torch.int64, device=self.device), buffers, self._send)

    def fetch(self, tensors: Sequence[torch.Tensor]) -> Fetched:
        pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for target, source in zip(pinned, tensors, strict=True):
            target.copy_(source, non_blocking=True)
        return _OnTheWay(pinned, self._mark())

    def _send(self, target: torch.Tensor, source: torch.Tensor) -> Sent:
        target.copy_(source, non_blocking=True)
        return self._mark()

    def _mark(self) -> Sent:
        event: Sent = torch.cuda.current_stream(self.device).record_event()
        return event


class Ring:
    """A Stage with host buffers that take turns: the copy out of one may not have happened when the next is written.

    With one for each step in flight it never waits, since the step that had the buffer before was collected.
    """

    def __init__(
        self,
        target: torch.Tensor,
        buffers: list[torch.Tensor],
        start: Callable[[torch.Tensor, torch.Tensor], Sent],
    ) -> None:
        self.target = target
        self._start = start
        self._buffers: deque[tuple[torch.Tensor, Sent | None]] = deque((buffer, None) for buffer in buffers)

    def begin(self) -> torch.Tensor:
        buffer, sent = self._buffers[0]
        if sent is not None:
            sent.synchronize()
        return buffer

    def send(self) -> None:
        buffer, _ = self._buffers.popleft()
        self._buffers.append((buffer, self._start(self.target, buffer)))


class _Direct:
    """A Stage whose target the host writes to itself."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def begin(self) -> torch.Tensor:
        return self.target

    def send(self) -> None:
        pass


class _Here:
    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors

    def wait(self) -> Sequence[torch.Tensor]:
        return self._tensors


class _OnTheWay:
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
