"""The packed GEMM against fp64 dense math at every level that this machine runs, and the choice of tokens."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu import build
from kernels.cpu.gemm import Gemm, aligned_empty

LEVELS = [level for level in build.LEVELS if build.is_supported(level)]
SHAPES = [(16, 32), (1, 1), (33, 1), (17, 33), (100, 70), (192, 576), (64, 1300), (15, 4864), (560, 96)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 17, 24, 25, 32, 33, 47, 48, 95, 96, 97, 145, 300]


@functools.cache
def gemm_at(level: str) -> Gemm:
    return Gemm(build.open_library(level, build.default_cache()))


@pytest.fixture(scope="module", params=LEVELS)
def gemm(request) -> Gemm:
    return gemm_at(request.param)


@pytest.fixture(autouse=True)
def threads():
    """Two threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_close(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Within one bf16 rounding of the exact result, and what a chain of fp32 additions may lose."""
    x, w = x.double(), w.double()
    exact, magnitude = x @ w.T, x.abs() @ w.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    bound = exact.abs() * 2**-8 + (x.shape[1] + 3) * 2**-23 * magnitude
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_dense_math_for_any_number_of_rows(gemm, shape):
    n, k = shape
    w, bias = random(n, k, seed=1), random(n, seed=2)
    packed = gemm.pack(w)
    for rows in ROWS:
        x = random(rows, k, seed=rows)
        assert_close(packed.linear(x), x, w)
        assert_close(packed.linear(x, bias), x, w, bias)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 200), st.integers(1, 130), st.integers(0, 2**32), st.integers(1, 3))
def test_small_integers_are_exact(n, k, rows, seed, threads):
    """Sums that fp32 holds exactly leave no choice of bits, whatever the shapes and the level."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-8, 9, (rows, k), generator=generator).bfloat16()
    w = torch.randint(-8, 9, (n, k), generator=generator).bfloat16()
    bias = torch.randint(-8, 9, (n,), generator=generator).bfloat16()
    expected = (x.double() @ w.double().T + bias.double()).bfloat16()
    for level in LEVELS:
        packed = gemm_at(level).pack(w)
        assert torch.equal(packed.linear(x, bias), expected)


@pytest.mark.parametrize("shape", [(100, 70), (192, 2200), (48, 4864)], ids=str)
def test_a_rows_bits_depend_on_that_row_alone(gemm, shape):
    n, k = shape
    packed, x, bias = gemm.pack(random(n, k)), random(300, k, seed=3), random(n, seed=4)
    together = packed.linear(x, bias)
    for rows in ROWS:
        assert torch.equal(packed.linear(x[:rows], bias), together[:rows])
    for threads in (1, 3, 5):
        torch.set_num_threads(threads)
        for rows in (1, 12, 40, 300):
            assert torch.equal(packed.linear(x[:rows], bias), together[:rows])


@pytest.mark.parametrize("rows", [1, 5, 12, 13, 40, 200])
def test_nan_stays_in_its_row(gemm, rows):
    packed, x = gemm.pack(random(50, 70)), random(rows, 70)
    clean = packed.linear(x)
    bad = rows // 2
    x[bad, 69] = torch.nan
    y = packed.linear(x)
    assert y[bad].isnan().all()
    keep = torch.arange(rows) != bad
    assert torch.equal(y[keep], clean[keep])


@pytest.mark.parametrize("rows", [1, 3, 12, 40, 120])
def test_what_lies_between_the_rows_is_neither_read_nor_written(gemm, rows):
    n, k = 40, 70
    w, bias = random(n, k), random(n)
    wide_w = torch.full((n, k + 9), torch.nan, dtype=torch.bfloat16)
    wide_x = torch.full((rows + 1, k + 13), torch.nan, dtype=torch.bfloat16)
    wide_y = torch.full((rows + 1, n + 11), torch.nan, dtype=torch.bfloat16)
    wide_w[:, 5 : k + 5] = w
    x, y = wide_x[:rows, 3 : k + 3], wide_y[:rows, 1 : n + 1]
    x[:] = random(rows, k)
    packed = gemm.pack(wide_w[:, 5 : k + 5])
    assert packed.linear(x, bias, out=y) is y
    assert_close(y, x, w, bias)
    assert wide_y[rows:].isnan().all() and wide_y[:, 0].isnan().all() and wide_y[:, n + 1 :].isnan().all()


def test_results_are_rounded_to_nearest_even(gemm):
    """x = (1, 1), w = (a, b): the only rounding of a + b that fp32 does not do exactly is the last."""
    generator = torch.Generator().manual_seed(5)
    a = torch.randint(0, 2**16, (50_000,), generator=generator, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    b = (a.float() * 2.0 ** -torch.randint(7, 10, a.shape, generator=generator)).bfloat16()
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.38e38, -3.38e38, 0.0, -1.0], dtype=torch.bfloat16)
    a, b = torch.cat([a, special]), torch.cat([b, special.flip(0)])
    is_normal = ((a == 0) | (a.abs() > 1e-30)) & ((b == 0) | (b.abs() > 1e-30)) | a.isnan() | b.isnan()
    a, b = a[is_normal], b[is_normal]
    y = gemm.pack(torch.stack([a, b], 1)).linear(torch.ones(1, 2, dtype=torch.bfloat16))[0]
    expected = (a.float() + b.float()).bfloat16()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[~y.isnan()], expected[~expected.isnan()])


def test_no_rows_is_no_work(gemm):
    assert gemm.pack(random(20, 40)).linear(random(0, 40)).shape == (0, 20)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_layout_is_the_one_described(gemm, shape):
    """[panel of 16 n][tile of 32 k][16 k-pairs][16 n][2 k], zero padded."""
    n, k = shape
    w = random(n, k)
    padded = np.zeros((-(-n // 16) * 16, -(-k // 32) * 32), dtype=np.int16)
    padded[:n, :k] = w.view(torch.int16).numpy()
    expected = padded.reshape(-1, 16, padded.shape[1] // 32, 16, 2).transpose(0, 2, 3, 1, 4).ravel()
    packed = gemm.pack(w)
    assert packed.data.data_ptr() % 64 == 0
    assert np.array_equal(packed.data.view(torch.int16).numpy(), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_come_back_from_the_packed_form(gemm, shape):
    n, k = shape
    w = random(n, k)
    ids = torch.randint(0, n, (77,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(gemm.pack(w).rows(ids), w[ids])
    assert torch.equal(gemm.pack(w).rows(torch.arange(n)), w)


def test_weights_of_a_model_may_share_one_allocation(gemm):
    first, second = random(20, 40), random(30, 50)
    sizes = gemm.packed_size(20, 40), gemm.packed_size(30, 50)
    memory = aligned_empty(sum(sizes))
    parts = memory.split(sizes)
    packed = [gemm.pack(w, out) for w, out in zip((first, second), parts, strict=True)]
    x = random(3, 40)
    assert_close(packed[0].linear(x), x, first)
    assert packed[1].data.data_ptr() == memory.data_ptr() + sizes[0] * 2


def test_what_does_not_fit_is_refused(gemm):
    packed = gemm.pack(random(20, 40))
    with pytest.raises(ValueError, match=r"x is \(3, 41\)"):
        packed.linear(random(3, 41))
    with pytest.raises(ValueError, match="float32"):
        packed.linear(random(3, 40).float())
    with pytest.raises(ValueError, match="out is"):
        packed.linear(random(3, 40), out=random(3, 21))
    with pytest.raises(ValueError, match="bias is"):
        packed.linear(random(3, 40), random(19))
    with pytest.raises(ValueError, match="contiguous"):
        packed.linear(random(40, 3).T)
    with pytest.raises(ValueError, match="2-D bf16"):
        gemm.pack(random(20, 40).float())
    with pytest.raises(ValueError, match="64-byte aligned"):
        gemm.pack(random(20, 40), torch.empty(7, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="k = 6 of 5"):
        gemm.topk(random(2, 5), 6)


def ranked(row: np.ndarray, k: int) -> list[int]:
    return np.argsort(-row, kind="stable")[:k].tolist()


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(1, 700), st.integers(0, 2**32), st.booleans())
def test_the_best_logits_are_found_in_order(rows, n, seed, few_values):
    rng = np.random.default_rng(seed)
    values = (
        rng.choice([-np.inf, -2.0, -0.0, 0.0, 1.5, np.inf], (rows, n)) if few_values else rng.normal(size=(rows, n))
    )
    logits = torch.tensor(values).bfloat16()
    exact = logits.float().numpy() + 0.0  # -0 becomes 0
    k = int(rng.integers(1, n + 1))
    for level in LEVELS:
        gemm = gemm_at(level)
        assert gemm.argmax(logits).tolist() == [ranked(row, 1)[0] for row in exact]
        assert gemm.topk(logits, k).tolist() == [ranked(row, k) for row in exact]


def test_a_row_with_nan_has_no_best(gemm):
    logits = random(5, 1000)
    logits[1, 999] = torch.nan
    logits[3, 0] = -torch.tensor(torch.nan)
    assert [i >= 0 for i in gemm.argmax(logits).tolist()] == [True, False, True, False, True]
    assert [(row >= 0).all() for row in gemm.topk(logits, 3).numpy()] == [True, False, True, False, True]
    assert gemm.topk(logits, 3)[1].tolist() == [-1, -1, -1]


def test_columns_of_a_wider_tensor_are_not_read(gemm):
    logits = random(3, 40)
    logits[:, 30:] = torch.inf
    assert (gemm.argmax(logits[:, :30]) < 30).all()
