"""The small native ops against the modules of transformers in bf16, at every level that this machine runs.

Bit for bit where the arithmetic is the same (rotary embedding, SiLU gate, sums, scaling). A norm's sum of
squares has another order than torch's, so now and then a result falls on the other side of a rounding; GELU
is compared with fp64, since torch's own loses digits of small results.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int32, c_int64, c_void_p

import pytest
import torch
from torch.nn.functional import gelu, silu
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from kernels.cpu import build
from kernels.native_library import Library
from tests.kernels.test_lora import same_bits

LEVELS = [level for level in ("portable", "avx512") if build.is_supported(level)]
ROWS = 5
WIDTHS = [1, 15, 16, 17, 64, 80, 576, 901]


@functools.cache
def library_at(level: str) -> Library:
    return build.open_library(level, build.default_cache())


@pytest.fixture(scope="module", params=LEVELS)
def library(request) -> Library:
    return library_at(request.param)


@pytest.fixture(autouse=True)
def threads():
    """Two threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def call(library: Library, name: str, *values: torch.Tensor | int | float | c_int32 | None) -> None:
    """ml_<name> with a structure of these fields in order: pointers, int64, then float and int32."""
    kinds = {int: c_int64, float: c_float, c_int32: c_int32}
    fields = [(f"f{i}", kinds.get(type(value), c_void_p)) for i, value in enumerate(values)]
    args = type("Args", (ctypes.Structure,), {"_fields_": fields})(
        *(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values)
    )
    assert library.function(f"ml_{name}", c_void_p)(ctypes.byref(args)) == 0


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def ulps(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How many bf16 values lie between, element by element."""

    def ordered(values: torch.Tensor) -> torch.Tensor:
        bits = values.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordered(got) - ordered(expected)).abs()


def assert_almost_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Within a bf16 step, and nearly everywhere the same bits."""
    difference = ulps(got, expected)
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


NORMS = [(LlamaRMSNorm, c_int32(0)), (Gemma2RMSNorm, c_int32(1))]


@pytest.mark.parametrize(("module", "kind"), NORMS, ids=["llama", "gemma"])
@pytest.mark.parametrize("n", WIDTHS)
def test_rms_norm(library, module, kind, n):
    norm = module(n, eps=1e-5).bfloat16()
    norm.weight.data = random(n, seed=1)
    x, y = random(ROWS, n + 3, scale=7.0), torch.full((ROWS, n + 2), torch.nan, dtype=torch.bfloat16)
    x[3] = torch.nan
    call(library, "rms_norm", x, norm.weight, y, ROWS, 1, n, n + 3, n + 3, n + 2, n + 2, 1e-5, kind)
    good = [0, 1, 2, 4]
    with torch.no_grad():
        assert_almost_equal(y[good, :n], norm(x[good, :n]))
    assert y[3].isnan().all() and y[:, n:].isnan().all()


@pytest.mark.parametrize(("module", "kind"), NORMS, ids=["llama", "gemma"])
def test_rms_norm_of_heads_in_place(library, module, kind):
    """q and k norms of a packed projection: the columns beside the heads stay."""
    norm = module(48, eps=1e-6).bfloat16()
    norm.weight.data = random(48, seed=1)
    qkv = random(ROWS, 7 * 48)
    expected = qkv.clone()
    with torch.no_grad():
        expected[:, 48 : 4 * 48] = norm(qkv[:, 48 : 4 * 48].unflatten(1, (3, 48))).flatten(1)
    heads = qkv[:, 48:]
    call(library, "rms_norm", heads, norm.weight, heads, ROWS, 3, 48, 336, 48, 336, 48, 1e-6, kind)
    assert_almost_equal(qkv, expected)
    assert same_bits(qkv[:, 4 * 48 :], expected[:, 4 * 48 :]) and same_bits(qkv[:, :48], expected[:, :48])


@pytest.mark.parametrize(("module", "kind"), NORMS, ids=["llama", "gemma"])
@pytest.mark.parametrize("n", WIDTHS)
def test_add_rms_norm(library, module, kind, n):
    norm = module(n, eps=1e-5).bfloat16()
    norm.weight.data = random(n, seed=1)
    x, residual = random(ROWS, n, seed=2), random(ROWS, n, seed=3, scale=30.0)
    total = residual + x
    call(library, "add_rms_norm", x, residual, norm.weight, x, ROWS, n, n, n, n, 1e-5, kind)
    assert same_bits(residual, total)
    with torch.no_grad():
        assert_almost_equal(x, norm(total))


def test_add_without_a_norm(library):
    x, residual = random(ROWS, 33, seed=2), random(ROWS, 33, seed=3)
    total, before = residual + x, x.clone()
    call(library, "add_rms_norm", x, residual, None, None, ROWS, 33, 33, 33, 33, 1e-5, c_int32(0))
    assert same_bits(residual, total) and same_bits(x, before)


@pytest.mark.parametrize(("head_dim", "dims"), [(64, 64), (80, 32), (128, 96), (20, 20), (16, 2)])
@pytest.mark.parametrize("by_position", [False, True])
def test_rope(library, head_dim, dims, by_position):
    positions = torch.tensor([900, 3, 0, 17, 4095])
    angles = torch.arange(4096)[:, None] * (1e4 ** (-torch.arange(0, dims, 2) / dims))[None]
    tables = [torch.cat([f(angles), f(angles)], 1).bfloat16() for f in (torch.cos, torch.sin)]
    cos, sin = (table[positions] for table in tables)
    x = random(ROWS, 3, head_dim)
    expected = apply_rotary_pos_emb(x[None], x[None], cos[None], sin[None], unsqueeze_dim=2)[0][0]
    taken = (*tables, positions) if by_position else (cos, sin, None)
    call(library, "rope", x, *taken, ROWS, 3, dims, 3 * head_dim, head_dim, dims)
    assert same_bits(x, expected)


def every_finite() -> torch.Tensor:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return values[values.isfinite()]


def act_mul(library, gate: torch.Tensor, up: torch.Tensor, activation: int) -> torch.Tensor:
    y, n = torch.empty_like(gate), gate.shape[1]
    call(library, "act_mul", gate, up, y, len(gate), n, n, n, n, c_int32(activation))
    return y


def test_silu_is_torchs_bit_for_bit(library):
    gate = every_finite()[None]
    assert same_bits(act_mul(library, gate, torch.ones_like(gate), 0), silu(gate))


def exact_gelu(x: torch.Tensor, activation: int) -> torch.Tensor:
    """fp64, in the forms that keep the digits of small results: x sigmoid(2 u) and x erfc(-x / sqrt 2) / 2."""
    if activation == 1:
        return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    return x * 0.5 * torch.erfc(-x * 0.5**0.5)


@pytest.mark.parametrize("activation", [1, 2])
def test_gelu_is_a_rounding_of_the_exact_value(library, activation):
    """One bf16 step at most, down to where the result is denormal."""
    gate = every_finite()[None]
    expected = exact_gelu(gate.double(), activation).float().bfloat16()
    torchs = gelu(gate.float(), approximate="tanh" if activation == 1 else "none").bfloat16()
    assert ulps(torchs, expected)[gate.abs() < 1].max() <= 1  # the same function
    got = act_mul(library, gate, torch.ones_like(gate), activation)
    normal = expected.abs() > 1e-37
    assert ulps(got[normal], expected[normal]).max() <= 1
    assert (got[~normal] - expected[~normal]).abs().max() <= 1e-37
    common = normal & (gate.abs() < 2)
    assert (got != expected)[common].float().mean() < 0.002


@pytest.mark.parametrize("n", [1, 17, 255, 256, 257, 1536])
def test_act_mul_rounds_between(library, n):
    """Packed gate and up in one matrix, in rows and columns that don't divide."""
    both = random(ROWS, 2 * n, scale=3.0)
    gate, up = both[:, :n], both[:, n:]
    expected = silu(gate) * up
    call(library, "act_mul", gate, up, gate, ROWS, n, 2 * n, 2 * n, 2 * n, c_int32(0))
    assert same_bits(gate, expected)


@pytest.mark.parametrize("n", [16, 37])
def test_scale_and_add(library, n):
    x, other = random(ROWS, n), random(ROWS, n, seed=1)
    factor = torch.tensor(2304**0.5).bfloat16()
    scaled, total = x * factor, x * factor + other
    call(library, "scale", x, ROWS, n, n, float(factor))
    assert same_bits(x, scaled)
    call(library, "add", x, other, x, ROWS, n, n, n, n)
    assert same_bits(x, total)


def test_softcap(library):
    """Gemma's: divided, tanh, multiplied, each rounded."""
    x = every_finite()[None].clone()
    expected = torch.tanh(x / 30.0) * 30.0
    call(library, "softcap", x, 1, x.shape[1], x.shape[1], 30.0)
    normal = expected.abs() > 1e-36
    assert_almost_equal(x[normal], expected[normal])


def test_rows_do_not_depend_on_threads_or_each_other(library):
    x, residual = random(7, 576), random(7, 576, seed=1)
    weight = random(576, seed=2)

    def run(rows: slice) -> torch.Tensor:
        a, b = x[rows].clone(), residual[rows].clone()
        call(library, "add_rms_norm", a, b, weight, a, len(a), 576, 576, 576, 576, 1e-5, c_int32(0))
        return a

    together = run(slice(0, 7))
    torch.set_num_threads(1)
    assert same_bits(run(slice(0, 7)), together)
    assert all(same_bits(run(slice(i, i + 1)), together[i : i + 1]) for i in range(7))
