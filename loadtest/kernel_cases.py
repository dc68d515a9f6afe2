"""What `multilora bench kernels` measures: each native kernel at the shapes of two real models, and torch's way of it.

A case's calls rotate over copies of what a step reads once (weights, adapters, keys and values), together larger than
any cache. Activations are small and stay cached, as in a step.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, silu

from kernels.cpu.gemm import Gemm, GemmArgs, PackedWeight, aligned_empty
from kernels.native_library import Library
from kernels.ops import get_backend
from kernels.types import BIAS_OFFSET, TABLE_COLUMNS, Segments, SiteGroup, SlotWeights
from loadtest.attention_bench import Case as AttentionCase
from loadtest.attention_bench import make as make_attention
from loadtest.gpu.shapes import Shape

COLD_BYTES = 256 << 20
ADAPTER_RANKS = (16, 64, 8, 32)  # of the adapters, in turn; a lone one has the first
ALIGNMENT = 64  # elements, of an adapter's matrices
MAX_REFERENCE_PRODUCTS = 1 << 31  # beyond it fp64 loops tell nothing

SHAPES = {"135M": Shape(30, 576, 9, 3, 64, 1536, 49_152), "M": Shape(24, 896, 14, 2, 64, 4864, 151_936)}
"""The demo base, and model M of loadtest/base.py."""


@dataclass
class Case:
    """One kernel at one shape. A call works on copies `first` to `first + calls - 1` of `count`."""

    name: str
    count: int
    num_bytes: int  # that a call must read from memory; 0: all is in caches
    products: int  # multiply-adds of a call
    native: Callable[[int, int], object]
    torch: Callable[[int, int], object]
    reference: Callable[[int, int], object] | None = None


def each(call: Callable[[int], object]) -> Callable[[int, int], None]:
    """`call` for each copy."""

    def run(first: int, calls: int) -> None:
        for index in range(first, first + calls):
            call(index)

    return run


def gemm_cases(library: Library, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """A layer's projections. The native calls are made inside one parallel region, as in a step."""
    for name, (k, widths) in SHAPES[model].projections.items():
        weights = _Weights(library, sum(widths), k)
        for number in rows:
            yield weights.case(f"gemm {model} {name} {weights.n}x{k}, {number} rows", number)


def head_cases(library: Library, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """The head and the largest logit of each row."""
    shape = SHAPES[model]
    weights = _Weights(library, shape.vocab, shape.hidden)
    gemm = weights.gemm
    for number in rows:
        x = torch.randn(number, weights.k).bfloat16()
        logits = torch.empty(number, weights.n).bfloat16()

        def native(i: int, x: torch.Tensor = x, logits: torch.Tensor = logits) -> object:
            return gemm.argmax(weights.packed[i].linear(x, out=logits))

        def torchs(i: int, x: torch.Tensor = x) -> object:
            return linear(x, weights.plain[i]).max(-1)

        name = f"head and argmax {model} {weights.n}x{weights.k}, {number} rows"
        yield Case(name, weights.count, weights.num_bytes, number * weights.n * weights.k, each(native), each(torchs))


class _Weights:
    """Copies of one matrix, packed and plain."""

    def __init__(self, library: Library, n: int, k: int) -> None:
        self.gemm = Gemm(library)
        self.n, self.k, self.num_bytes = n, k, 2 * n * k
        self.count = -(-COLD_BYTES // self.num_bytes)
        plain = torch.randn(n, k).bfloat16()
        size = self.gemm.packed_size(n, k)
        memory = aligned_empty(size * self.count)
        self.packed: list[PackedWeight] = [self.gemm.pack(plain, out) for out in memory.split(size)]
        self.plain = [plain.clone() for _ in range(self.count)]
        self._gemms = library.function("ml_gemms", c_void_p, c_int64)

    def case(self, name: str, rows: int) -> Case:
        x, y = torch.randn(rows, self.k).bfloat16(), torch.empty(rows, self.n).bfloat16()
        inputs, output = (x.data_ptr(), self.k), (y.data_ptr(), self.n, rows, self.n, self.k)
        args = (GemmArgs * self.count)(*(GemmArgs(*inputs, w.data.data_ptr(), None, *output) for w in self.packed))

        def native(first: int, calls: int) -> None:
            assert len(x) == len(y) == rows  # kept alive with the arguments
            self._gemms(ctypes.addressof(args[first]), calls)

        torchs = each(lambda i: linear(x, self.plain[i]))
        return Case(name, self.count, self.num_bytes, rows * self.n * self.k, native, torchs)


def lora_cases(model: str, distinct: Sequence[int], prefills: Sequence[tuple[Sequence[int], int]]) -> Iterator[Case]:
    """Deltas of one layer's projections: rows of distinct adapters, and prompts as (adapters' ranks, rows of each)."""
    decodes = (([ADAPTER_RANKS[i % len(ADAPTER_RANKS)] for i in range(count)], 1) for count in distinct)
    for ranks, rows in [*decodes, *prefills]:
        kind = "decode" if rows == 1 else f"prefill of {rows} rows each"
        shown = "/".join(map(str, sorted(set(ranks))))
        name = f"adapters {model}, {len(ranks)} distinct, ranks {shown}, {kind}"
        yield _lora_case(name, SHAPES[model], list(ranks), rows)


def _lora_case(name: str, shape: Shape, ranks: list[int], rows: int) -> Case:
    width = sum(len(widths) * k + sum(widths) for k, widths in shape.projections.values())
    num_bytes = 2 * width * sum(ranks)
    layers = _layer_groups(shape, max(4, min(shape.layers, COLD_BYTES // num_bytes)))
    weights = _arena(layers, ranks)
    starts = [index * rows for index in range(len(ranks))]
    ends = [start + rows for start in starts]
    segments = Segments(starts, ends, [((slot + 1, 1.0),) for slot in range(len(ranks))])
    total = len(ranks) * rows
    xs = [torch.randn(total, k).bfloat16() for k, _ in shape.projections.values()]
    ys = [torch.zeros(total, sum(widths)).bfloat16() for _, widths in shape.projections.values()]

    def layer(backend: str) -> Callable[[int, int], None]:
        lora = get_backend(backend).segmented_lora

        def call(i: int) -> None:
            for y, x, group in zip(ys, xs, layers[i], strict=True):
                lora(y, x, weights, group, segments)

        return each(call)

    products = width * sum(ranks) * rows
    reference = layer("reference") if products <= MAX_REFERENCE_PRODUCTS else None
    return Case(name, len(layers), num_bytes, products, layer("cpu"), layer("torch"), reference)


def _layer_groups(shape: Shape, layers: int) -> list[list[SiteGroup]]:
    rows = itertools.count()

    def group(in_features: int, widths: tuple[int, ...]) -> SiteGroup:
        offsets = (0, *itertools.accumulate(widths[:-1]))
        return SiteGroup(tuple(next(rows) for _ in widths), offsets, widths, in_features)

    return [[group(*sizes) for sizes in shape.projections.values()] for _ in range(layers)]


def _arena(layers: list[list[SiteGroup]], ranks: list[int]) -> SlotWeights:
    """One image per slot, scattered as after some evictions."""
    num_rows = sum(len(group.rows) for layer in layers for group in layer)
    table = torch.zeros(len(ranks) + 1, num_rows, TABLE_COLUMNS, dtype=torch.int64)
    table[:, :, BIAS_OFFSET] = -1
    used = 0
    for slot in random.Random(0).sample(range(1, len(ranks) + 1), len(ranks)):
        rank = ranks[slot - 1]
        for group in itertools.chain(*layers):
            for row, width in zip(group.rows, group.widths, strict=True):
                up = used + _aligned(rank * group.in_features)
                table[slot, row] = torch.tensor([used, up, -1, rank, rank])
                used = up + _aligned(rank * width)
    arena = torch.empty(used, dtype=torch.bfloat16)
    pattern = torch.randn(1 << 20).mul_(0.02).bfloat16()  # drawing all of them would take longer than the rest
    for start in range(0, used, len(pattern)):
        arena[start : start + len(pattern)] = pattern[: used - start]
    return SlotWeights(arena, table)


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def attention_cases(model: str, steps: dict[str, list[tuple[int, int]]]) -> Iterator[Case]:
    """One layer; `steps` have (context, rows) of each request."""
    shape = SHAPES[model]
    for name, requests in steps.items():
        made = make_attention(requests, shape.heads, shape.kv_heads, shape.head_dim)
        keys = sum(rows * context - rows * (rows - 1) // 2 for context, rows in requests)
        products = 2 * keys * shape.heads * shape.head_dim

        def attend(backend: str, made: AttentionCase = made) -> Callable[[int, int], None]:
            attention = get_backend(backend).paged_attention

            def call(i: int) -> object:
                return attention(made.q, *made.caches[i], made.meta, scale=0.125, sliding_window=None, softcap=None)

            return each(call)

        reference = attend("reference") if products <= MAX_REFERENCE_PRODUCTS else None
        label = f"attention {model}, {name}"
        yield Case(label, len(made.caches), made.num_bytes, products, attend("cpu"), attend("torch"), reference)


def small_cases(library: Library, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """The ops between the GEMMs; torch's are the modules of transformers."""
    for number in rows:
        yield from (make(library, f"{model}, {number} rows", SHAPES[model], number) for make in (_norm, _rope, _act))


def _norm(library: Library, label: str, shape: Shape, rows: int) -> Case:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm, n = LlamaRMSNorm(shape.hidden, eps=1e-5).bfloat16(), shape.hidden
    x, residual = torch.randn(rows, n).bfloat16(), torch.randn(rows, n).bfloat16()
    y = torch.empty_like(x)
    native = _op(library, "add_rms_norm", y, residual, norm.weight, y, rows, n, n, n, n, 1e-5, c_int32(0))
    return Case(f"add and norm {label}", 64, 0, 0, native, each(lambda _: norm(residual + x)))


def _rope(library: Library, label: str, shape: Shape, rows: int) -> Case:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, dims = shape.heads + shape.kv_heads, shape.head_dim
    cos, sin = torch.randn(rows, dims).cos().bfloat16(), torch.randn(rows, dims).sin().bfloat16()
    x, plain = torch.zeros(rows, heads, dims).bfloat16(), torch.randn(1, rows, heads, dims).bfloat16()
    q, k = plain.split([shape.heads, shape.kv_heads], 2)
    native = _op(library, "rope", x, cos, sin, None, rows, heads, dims, heads * dims, dims, dims)
    torchs = each(lambda _: apply_rotary_pos_emb(q, k, cos[None], sin[None], unsqueeze_dim=2))
    return Case(f"rotary {label}", 64, 0, 0, native, torchs)


def _act(library: Library, label: str, shape: Shape, rows: int) -> Case:
    n = shape.intermediate
    both, y = torch.randn(rows, 2 * n).bfloat16(), torch.empty(rows, n).bfloat16()
    gate, up = both.split(n, 1)
    native = _op(library, "act_mul", gate, up, y, rows, n, 2 * n, 2 * n, n, c_int32(0))
    return Case(f"SwiGLU {label}", 64, 0, 0, native, each(lambda _: silu(gate) * up))


def _op(
    library: Library, name: str, *values: torch.Tensor | int | float | c_int32 | None
) -> Callable[[int, int], None]:
    """Calls of ml_<name> with a structure of these fields (csrc/elementwise.h), made once."""
    kinds = {int: c_int64, float: c_float, c_int32: c_int32}
    fields = [(f"f{number}", kinds.get(type(value), c_void_p)) for number, value in enumerate(values)]
    args = type("Args", (ctypes.Structure,), {"_fields_": fields})(
        *(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values)
    )
    function, kept = library.function(f"ml_{name}", c_void_p), (args, values)
    return each(lambda _: function(ctypes.byref(kept[0])))
