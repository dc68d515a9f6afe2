"""A stand-in for a captured graph, on the CPU: the tensor operations of a pass, with the arguments that they had.

As on a device, a replay knows nothing of Python: whatever was no tensor at a fixed address is what it was at capture,
and what a pass computes in between lies in memory that other graphs use too. What would have to wait for the device is
an error at capture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::item",
    "aten::lift_fresh",
}


@dataclass(frozen=True)
class Call:
    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[torch.Tensor]  # that this call made
    places: list[int]  # where they are among the leaves of its result


class RecordedGraph:
    """server.model.graphs.Graph"""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.replays = 0

    def capture(self, run: Callable[[], None]) -> None:
        assert not self.calls, "captured twice"
        with _Recorder(self.calls):
            run()
        self._spoil()

    def replay(self) -> None:
        self.replays += 1
        for call in self.calls:
            result = tree_leaves(call.operation(*call.args, **call.kwargs))
            for output, place in zip(call.outputs, call.places, strict=True):
                output.copy_(result[place])
        self._spoil()

    def _spoil(self) -> None:
        """Another graph of the pool may have run by the next replay."""
        for call in self.calls:
            for output in call.outputs:
                if output.is_floating_point():
                    output.fill_(torch.nan)


class _Recorder(TorchDispatchMode):  # type: ignore[misc]
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func._schema.name not in WAITS, f"{func} waits for the device"
        result = func(*args, **kwargs)
        taken = {address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        leaves = tree_leaves(result)
        made = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and address(leaf) not in taken]
        if made or func._schema.is_mutable:  # else a view: it stays one
            frozen_args, frozen_kwargs = tree_map(lambda leaf: leaf, (args, kwargs))
            self._calls.append(Call(func, frozen_args, frozen_kwargs, [leaves[i] for i in made], made))
        return result


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
