"""The order of work on a device: the stream of the steps, one beside it for copies, and events between them.

    step's stream:  step n | table row | move |          step n+1
                                    mark ─┘╲
    beside it:                              └─▶ copy of an image ─▶ event: the loader waits for it

Whoever writes to memory that a step may read asks here, so that a stand-in can check what came before what.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kernels.memory import lazy_zeros


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Hold the calling thread until the device has come to it."""


class Streams(Protocol):
    """`mark`, `copy` and `upload` are the engine thread's, `copy_beside` the loader's."""

    def mark(self) -> Event:
        """The end of what the step's stream was given so far."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy within the device, in the step's stream. The two don't overlap."""

    def upload(self, target: torch.Tensor, array: npt.NDArray[Any]) -> None:
        """Bring an array to the device, in the step's stream; it may be changed as soon as this returns."""

    def copy_beside(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> Event:
        """Copy `source`, pinned, to the device beside the steps, behind `after`; the event is its end."""

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] of host memory that the device copies from by itself; to be called at start."""

    def is_pinned(self, memory: torch.Tensor) -> bool:
        """Whether all of a host tensor is such memory."""


class CudaStreams:
    """Those of an NVIDIA device. The step's stream is the engine thread's current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._beside = torch.cuda.Stream(device)

    def mark(self) -> Event:
        event: Event = torch.cuda.current_stream(self._device).record_event()
        return event

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def upload(self, target: torch.Tensor, array: npt.NDArray[Any]) -> None:
        # torch gives pinned memory back to its pool only when the copies out of it have ended
        pinned = torch.from_numpy(np.ascontiguousarray(array)).pin_memory()
        target.copy_(pinned, non_blocking=True)

    def copy_beside(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> Event:
        end = torch.cuda.Event(blocking=True)  # the loader sleeps until then: a spinning thread would hold a core
        with torch.cuda.stream(self._beside):
            self._beside.wait_event(after)
            target.copy_(source, non_blocking=True)
            end.record(self._beside)
        waited: Event = end
        return waited

    def pinned(self, num_bytes: int) -> torch.Tensor:
        memory = lazy_zeros(num_bytes)  # torch's own pinned memory comes in powers of two
        if num_bytes:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), num_bytes, 0))
        return memory

    def is_pinned(self, memory: torch.Tensor) -> bool:
        return bool(memory.is_pinned())
