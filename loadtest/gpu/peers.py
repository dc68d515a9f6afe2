"""vLLM's and SGLang's Triton kernels for adapters, from their wheels' files, for measuring only.

    unzip vllm-*.whl   'vllm/lora/ops/triton_ops/*'      -d DIR
    unzip sglang-*.whl 'sglang/kernels/ops/lora/dense/*' -d DIR

    DIR/vllm/lora/ops/triton_ops/lora_shrink_op.py, lora_expand_op.py, ...
    DIR/sglang/kernels/ops/lora/dense/chunked_sgmv_shrink.py, chunked_sgmv_expand.py, ...

(vLLM 0.32, SGLang 0.5.23; any version with these names and signatures). Either may be missing. Nothing of them is
installed, and their packages' own start-up code does not run: the few names that the kernels' files import from the
rest of their packages are given here. Both get what is best for them: as many slots as there are adapters in the batch
and the batch's largest rank as their maximum; tuned files that a wheel has beside its kernels are used, and vLLM's from
DIR/vllm-configs if it is there.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from loadtest.gpu.contestants import Stacks

_VLLM = "vllm.lora.ops.triton_ops"
_SGLANG = "sglang.kernels.ops.lora.dense"


class Peer(Protocol):
    """Makes the call that adds a set's deltas to y."""

    def __call__(self, stacks: Stacks, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]: ...


def load_peers(folder: Path) -> dict[str, Peer]:
    """By name, those whose files are in `folder`. Raises ValueError where there are none."""
    found: dict[str, Peer] = {}
    if (folder / "vllm/lora/ops/triton_ops").is_dir():
        found["vLLM"] = _VLLMKernels(folder)
    if (folder / "sglang/kernels/ops/lora/dense").is_dir():
        found["SGLang"] = _SGLangKernels(folder)
    if not found:
        raise ValueError(f"{folder} has neither vllm/lora/ops/triton_ops nor sglang/kernels/ops/lora/dense")
    return found


class _VLLMKernels:
    def __init__(self, folder: Path) -> None:
        import triton
        import triton.language as tl

        configs = folder / "vllm-configs"
        _folders(folder, _VLLM)
        _module(
            "vllm.envs",
            VLLM_BATCH_INVARIANT=False,
            VLLM_TUNED_CONFIG_FOLDER=str(configs) if configs.is_dir() else None,
            VLLM_LORA_ENABLE_DUAL_STREAM=False,
            VLLM_LORA_DISABLE_PDL=True,
        )
        _module("vllm.triton_utils", triton=triton, tl=tl)
        _module("vllm.logger", init_logger=_logger)
        _module("vllm.platforms", current_platform=types.SimpleNamespace(is_cuda=torch.cuda.is_available))
        _module("vllm.utils")
        _module("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)
        _module("vllm.utils.torch_utils", async_tensor_h2d=torch.tensor, direct_register_custom_op=_refuse)
        names = ("lora_shrink_op", "lora_expand_op", "lora_kernel_metadata", "utils")
        self._shrink, self._expand, self._metadata, self._utils = (
            importlib.import_module(f"{_VLLM}.{name}") for name in names
        )

    def __call__(self, stacks: Stacks, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
        self._utils._LORA_A_PTR_DICT.clear()  # by address: an earlier case's memory may be given out again
        self._utils._LORA_B_PTR_DICT.clear()
        meta = self._metadata.LoRAKernelMeta.make(len(stacks.ranks), len(x), x.device)
        meta.prepare_tensors(torch.tensor(stacks.owners, dtype=torch.int32, device=x.device))
        args = meta.meta_args(len(x), True)
        v = torch.empty(len(stacks.a), len(x), stacks.max_rank, dtype=torch.float32, device=x.device)

        def run() -> None:
            self._shrink.lora_shrink(x, stacks.a, v, *args, 1.0)
            self._expand.lora_expand(v, stacks.b, y, *args, offset_start=0, add_inputs=True)

        return run


class _SGLangKernels:
    def __init__(self, folder: Path) -> None:
        _folders(folder, _SGLANG)
        off = types.SimpleNamespace(get=lambda: False)
        flags = types.SimpleNamespace(
            SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=types.SimpleNamespace(get=lambda: True),
            SGLANG_ENABLE_DETERMINISTIC_INFERENCE=off,
        )
        for name in ("sglang.srt", "sglang.srt.lora"):
            _module(name)
        _module("sglang.srt.environ", envs=flags)
        _module("sglang.srt.lora.utils", LoRABatchInfo=_BatchInfo)
        _module("sglang.srt.utils", cached_triton_kernel=lambda _: lambda kernel: kernel, get_device_name=_device_name)
        names = ("chunked_sgmv_shrink", "chunked_sgmv_expand")
        shrink, expand = (importlib.import_module(f"{_SGLANG}.{name}") for name in names)
        self._shrink, self._expand = shrink.chunked_sgmv_lora_shrink_forward, expand.chunked_sgmv_lora_expand_forward

    def __call__(self, stacks: Stacks, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
        slices, most = len(stacks.a), stacks.max_rank
        a = torch.zeros(len(stacks.ranks), slices * most, x.shape[1], dtype=x.dtype, device=x.device)
        for adapter, rank in enumerate(stacks.ranks):  # the slices' ranks lie one after the other, unpadded
            for number, part in enumerate(stacks.a):
                a[adapter, number * rank : (number + 1) * rank] = part[adapter, :rank]
        b = torch.cat(stacks.b, 1)
        info = _BatchInfo.make(stacks, x.device)
        offsets = torch.tensor(stacks.offsets, dtype=torch.int32)
        on_device, widest = offsets.to(x.device), max(part.shape[1] for part in stacks.b)

        def run() -> None:
            v = self._shrink(x, a, info, slices)
            self._expand(v, b, info, on_device, widest, y, slice_offsets_cpu=offsets)

        return run


@dataclasses.dataclass
class _BatchInfo:
    """What SGLang's kernels are told of a batch: runs of one adapter in chunks of at most `max_len` rows."""

    use_cuda_graph: bool
    num_segments: int
    seg_indptr: torch.Tensor
    weight_indices: torch.Tensor
    lora_ranks: torch.Tensor
    scalings: torch.Tensor
    permutation: torch.Tensor
    max_len: int

    @staticmethod
    def make(stacks: Stacks, device: torch.device) -> _BatchInfo:
        owners = stacks.owners
        chunk = 128 if len(owners) >= 256 else 32 if len(owners) >= 64 else 16
        starts = [0]
        for row in range(1, len(owners)):
            if owners[row] != owners[row - 1] or row - starts[-1] == chunk:
                starts.append(row)

        def ints(values: Any) -> torch.Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device=device)

        return _BatchInfo(
            use_cuda_graph=True,
            num_segments=len(starts),
            seg_indptr=ints([*starts, len(owners)]),
            weight_indices=ints(owners[start] for start in starts),
            lora_ranks=ints(stacks.ranks),
            scalings=torch.ones(len(stacks.ranks), device=device),
            permutation=ints(range(len(owners))),
            max_len=chunk,
        )


def _folders(root: Path, name: str) -> None:
    """Packages from `name`'s first part down whose files are found but whose __init__ is not run."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = root.joinpath(*parts[:depth])
        _module(".".join(parts[:depth])).__path__ = [str(path)]


def _module(name: str, **names: object) -> types.ModuleType:
    module = sys.modules.setdefault(name, types.ModuleType(name))
    vars(module).update(names)
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, module)
    return module


def _logger(name: str) -> logging.Logger:
    logger: Any = logging.getLogger(name)
    logger.warning_once = logger.info_once = logger.debug
    return logger


def _refuse(*args: object, **kwargs: object) -> None:
    """As on a build without custom ops: the kernels' files then offer their plain functions."""
    raise AttributeError


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
