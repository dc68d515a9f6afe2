"""A whole step of a decoder as one native call: the model as data, its weights packed once, its buffers kept.

csrc/forward.h has the shapes and the order of operations; the ctypes structures here mirror it field by
field, and their sizes are compared when a model is made.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kernels.cpu.gemm import Gemm
from kernels.cpu.lora import LoraGroup, lora_group, lora_segments, lora_weights
from kernels.native_library import Library
from kernels.types import AttentionMetadata, Segments, SiteGroup, SlotWeights

NORM_KINDS = {"llama": 0, "gemma": 1}
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu": 2}


@dataclass(slots=True)
class Projection:
    """A linear of the base: weight bf16 [N, K] and bias [N] if any, and its sites in the slot table."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    group: SiteGroup


@dataclass(slots=True)
class Rotary:
    """One set of rotary frequencies, fp32 [dims / 2]; requests longer than `limit` take `long_frequencies`."""

    frequencies: torch.Tensor
    scaling: float = 1.0
    long_frequencies: torch.Tensor | None = None
    limit: int = 0


@dataclass(slots=True)
class Layer:
    """One decoder layer. Norm weights are bf16 [hidden], per-head ones [head_dim]; caches as in kernels/ops.py."""

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    input_norm: torch.Tensor
    mlp_norm: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    post_attention_norm: torch.Tensor | None = None
    post_mlp_norm: torch.Tensor | None = None
    window: int | None = None
    rotary: int = 0  # index into DecoderSpec.rotaries


@dataclass(slots=True)
class DecoderSpec:
    """A decoder-only transformer in bf16, as csrc/forward.h computes it."""

    layers: list[Layer]
    rotaries: list[Rotary]
    embedding: torch.Tensor  # [vocab, hidden]; the head's own weight where they are tied
    embedding_row: int  # in the slot table
    final_norm: torch.Tensor
    head: Projection
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    norm: str  # of NORM_KINDS
    activation: str  # of ACTIVATIONS
    attention_scale: float
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float = 1.0

    @property
    def hidden(self) -> int:
        return int(self.embedding.shape[1])

    @property
    def intermediate(self) -> int:
        return self.layers[0].down.group.in_features

    @property
    def rotary_dims(self) -> int:
        return 2 * len(self.rotaries[0].frequencies)


class StepArrays(Protocol):
    """The rows of one step; int64, contiguous, on the CPU."""

    @property
    def ids(self) -> torch.Tensor: ...  # [rows]

    @property
    def positions(self) -> torch.Tensor: ...  # [rows]

    @property
    def rope_lengths(self) -> torch.Tensor: ...  # [rows]: known length of each row's request

    @property
    def head_rows(self) -> torch.Tensor: ...  # rows whose logits are wanted


class _Projection(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("n", c_int64), ("k", c_int64), ("group", LoraGroup)]


class _Rotary(ctypes.Structure):
    _fields_ = [
        ("frequencies", c_void_p),
        ("long_frequencies", c_void_p),
        ("limit", c_int64),
        ("scaling", c_float),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Projection) for name in ("qkv", "out", "gate_up", "down")),
        *((name, c_void_p) for name in ("input_norm", "q_norm", "k_norm", "post_attention_norm")),
        *((name, c_void_p) for name in ("mlp_norm", "post_mlp_norm", "keys", "values")),
        *((name, c_int64) for name in ("window", "rotary")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", c_void_p),
        ("rotaries", c_void_p),
        *((name, c_int64) for name in ("num_layers", "num_rotaries", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, c_int64) for name in ("intermediate", "rotary_dims", "vocab")),
        ("embedding", c_void_p),
        ("embedding_is_packed", c_int64),
        ("embedding_group", LoraGroup),
        ("final_norm", c_void_p),
        ("head", _Projection),
        ("block_size", c_int64),
        *((name, c_int32) for name in ("norm_kind", "activation")),
        *((name, c_float) for name in ("eps", "embedding_scale", "attention_scale")),
        *((name, c_float) for name in ("attention_softcap", "logits_softcap")),
    ]


class _Buffers(ctypes.Structure):
    _fields_ = [
        (name, c_void_p) for name in ("residual", "normed", "qkv", "attended", "gate_up", "hidden", "cos", "sin")
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "requests", "max_blocks", "num_head_rows")),
        *((name, c_void_p) for name in ("ids", "positions", "lengths", "slot_mapping", "head_rows")),
        *((name, c_void_p) for name in ("query_starts", "context_lens", "block_tables", "attention_scratch")),
        *((name, c_void_p) for name in ("arena", "table")),
        ("table_rows", c_int64),
        ("lora_scratch", c_void_p),
        ("lora_scratch_size", c_int64),
        *((name, c_void_p) for name in ("body", "head", "logits", "nanoseconds")),
    ]


PARTS = ("embedding", "GEMM", "adapters", "attention", "small ops", "head")
"""Of a step's time: csrc/forward.h's Part. The head's deltas count as adapters."""

STRUCTURES = (_Projection, _Rotary, _Layer, _Model, _Buffers, _Step)
_ALIGNMENT = 64  # bytes, of buffers


class Decoder:
    """A DecoderSpec ready to run steps of up to `max_rows` rows.

    Packs every projection's weight and frees the original, one at a time: the weights are resident once.
    A tied embedding is read from the packed head. One thread calls it.
    """

    def __init__(self, library: Library, spec: DecoderSpec, weights: SlotWeights, max_rows: int) -> None:
        self._weights = weights
        self._vocab = int(spec.head.weight.shape[0])
        self._max_slices = max(len(layer.qkv.group.rows) for layer in spec.layers)
        self._run = library.function("ml_forward", c_void_p, c_void_p, c_void_p)
        self._scratch_bytes = library.function("ml_forward_scratch", c_void_p, c_void_p, result=c_int64)
        self._keep: list[object] = []  # what the structures point to
        _check_sizes(library)
        self._buffers = self._make_buffers(spec, max_rows)
        self._model = self._make_model(library, spec)
        self._attention_scratch = _aligned(0)
        self._step = _Step(
            arena=weights.arena.data_ptr(), table=weights.table.data_ptr(), table_rows=weights.table.shape[1]
        )

    def run(
        self, arrays: StepArrays, meta: AttentionMetadata, body: Segments | None, head: Segments | None
    ) -> torch.Tensor:
        """Logits bf16 [head rows, vocab]. Writes the rows' KV. Segments may be None or empty."""
        step = self._step
        starts = np.asarray(meta.query_starts, np.int32)
        contexts = np.asarray(meta.context_lens, np.int32)
        tables = np.ascontiguousarray(meta.block_tables, np.int32)
        logits = torch.empty(len(arrays.head_rows), self._vocab, dtype=torch.bfloat16)
        step.rows, step.requests, step.max_blocks = len(arrays.ids), len(contexts), tables.shape[1]
        step.num_head_rows = len(arrays.head_rows)
        step.ids, step.positions = arrays.ids.data_ptr(), arrays.positions.data_ptr()
        step.lengths, step.head_rows = arrays.rope_lengths.data_ptr(), arrays.head_rows.data_ptr()
        step.slot_mapping = meta.slot_mapping.data_ptr()
        step.query_starts, step.context_lens = starts.ctypes.data, contexts.ctypes.data
        step.block_tables = tables.ctypes.data
        step.logits = logits.data_ptr()
        step.lora_scratch_size = 0
        step.body, step.head = self._place(body), self._place(head)
        num_bytes = self._scratch_bytes(ctypes.byref(self._model), ctypes.byref(step))
        if num_bytes > self._attention_scratch.nbytes:
            self._attention_scratch = _aligned(num_bytes)
        step.attention_scratch = self._attention_scratch.data_ptr()
        status = self._run(ctypes.byref(self._model), ctypes.byref(self._buffers), ctypes.byref(step))
        assert status == 0, f"the native forward pass ended with LoraStatus {status}"
        return logits

    def profile(self) -> np.ndarray:
        """From now on the nanoseconds of each of PARTS, int64, summed up over the steps that follow."""
        spent = np.zeros(len(PARTS), np.int64)
        self._keep.append(spent)
        self._step.nanoseconds = spent.ctypes.data
        return spent

    def _place(self, segments: Segments | None) -> int | None:
        """The address of the segments in C's form, and room for their rank vectors; None where there are none."""
        if not segments:
            return None
        flat = lora_segments(segments)
        step = self._step
        # one memory for body and head, which follow each other: the later address has room for both
        step.lora_scratch, elements = lora_weights(self._weights).scratch(self._weights, flat, self._max_slices)
        step.lora_scratch_size = max(step.lora_scratch_size, elements)
        return ctypes.addressof(flat.struct)

    def _make_buffers(self, spec: DecoderSpec, max_rows: int) -> _Buffers:
        q_width = spec.num_heads * spec.head_dim
        widths = {
            "residual": spec.hidden,
            "normed": spec.hidden,
            "qkv": q_width + 2 * spec.num_kv_heads * spec.head_dim,
            "attended": q_width,
            "gate_up": 2 * spec.intermediate,
            "hidden": spec.intermediate,
            "cos": len(spec.rotaries) * spec.rotary_dims,
            "sin": len(spec.rotaries) * spec.rotary_dims,
        }
        buffers = {name: _aligned(2 * max_rows * width) for name, width in widths.items()}
        self._keep.append(buffers)
        return _Buffers(**{name: buffer.data_ptr() for name, buffer in buffers.items()})

    def _make_model(self, library: Library, spec: DecoderSpec) -> _Model:
        is_tied = spec.embedding is spec.head.weight
        hidden, intermediate = spec.hidden, spec.intermediate  # before the weights go
        block_size = spec.layers[0].keys.shape[1]
        embedding_group = SiteGroup((spec.embedding_row,), (0,), (hidden,), 0)
        gemm = Gemm(library)
        layers = (_Layer * len(spec.layers))(*(self._layer(layer, gemm) for layer in spec.layers))
        rotaries = (_Rotary * len(spec.rotaries))(*map(self._rotary, spec.rotaries))
        head = self._projection(spec.head, gemm)
        self._keep += [layers, rotaries]
        return _Model(
            layers=ctypes.addressof(layers),
            rotaries=ctypes.addressof(rotaries),
            num_layers=len(layers),
            num_rotaries=len(rotaries),
            hidden=hidden,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            intermediate=intermediate,
            rotary_dims=spec.rotary_dims,
            vocab=self._vocab,
            embedding=head.weight if is_tied else self._pointer(spec.embedding),
            embedding_is_packed=is_tied,
            embedding_group=self._group(embedding_group),
            final_norm=self._pointer(spec.final_norm),
            head=head,
            block_size=block_size,
            norm_kind=NORM_KINDS[spec.norm],
            activation=ACTIVATIONS[spec.activation],
            eps=spec.eps,
            embedding_scale=spec.embedding_scale,
            attention_scale=spec.attention_scale,
            attention_softcap=spec.attention_softcap or 0.0,
            logits_softcap=spec.logits_softcap or 0.0,
        )

    def _layer(self, layer: Layer, gemm: Gemm) -> _Layer:
        names = ("input_norm", "q_norm", "k_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")
        return _Layer(
            **{name: self._projection(getattr(layer, name), gemm) for name in ("qkv", "out", "gate_up", "down")},
            **{name: self._pointer(getattr(layer, name)) for name in (*names, "keys", "values")},
            window=layer.window or 0,
            rotary=layer.rotary,
        )

    def _projection(self, projection: Projection, gemm: Gemm) -> _Projection:
        n, k = projection.weight.shape
        packed = gemm.pack(projection.weight).data
        self._keep.append(packed)
        projection.weight.data = projection.weight.new_empty(0)
        return _Projection(
            weight=packed.data_ptr(),
            bias=self._pointer(projection.bias),
            n=n,
            k=k,
            group=self._group(projection.group),
        )

    def _rotary(self, rotary: Rotary) -> _Rotary:
        return _Rotary(
            frequencies=self._pointer(rotary.frequencies.float()),
            long_frequencies=self._pointer(
                None if rotary.long_frequencies is None else rotary.long_frequencies.float()
            ),
            limit=rotary.limit,
            scaling=rotary.scaling,
        )

    def _group(self, group: SiteGroup) -> LoraGroup:
        made = lora_group(group)
        self._keep.append(made)
        return made

    def _pointer(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        assert tensor.is_contiguous(), "the native pass reads contiguous tensors"
        self._keep.append(tensor)
        address: int = tensor.data_ptr()
        return address


def _check_sizes(library: Library) -> None:
    sizes = (c_int64 * len(STRUCTURES))()
    library.function("ml_forward_sizes", c_void_p, result=None)(ctypes.byref(sizes))
    ours = [ctypes.sizeof(structure) for structure in STRUCTURES]
    assert list(sizes) == ours, f"structures of {list(sizes)} bytes in the library, of {ours} here"


def _aligned(num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes]; torch aligns to 64 bytes, which is checked."""
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    assert memory.data_ptr() % _ALIGNMENT == 0
    return memory
