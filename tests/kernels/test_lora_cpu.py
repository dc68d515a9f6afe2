"""What the native low-rank kernels promise beyond tests/kernels/test_lora.py: bits, levels, refusals, the registry."""

from __future__ import annotations

import pytest
import torch

import kernels.cpu
from kernels import ops
from kernels.cpu import build
from kernels.cpu.lora import Lora, LoraWeights, lora_segments
from kernels.types import STRIDE, Segments, SiteGroup
from tests.kernels.builders import DTYPES, POPULARITIES, RANKS, SHAPES, ArenaBuilder, LoraCase, lora_case, pairwise
from tests.kernels.test_lora import run, same_bits
from tests.kernels.test_lora_edges import assert_exact, make_case, plain, two_adapters

LEVELS = [level for level in ("portable", "avx512") if build.is_supported(level)]
CASES = list(pairwise(popularity=POPULARITIES, ranks=tuple(RANKS), shape=tuple(SHAPES), phase=("mixed", "prefill")))


@pytest.fixture(params=LEVELS)
def lora(request) -> Lora:
    library = build.load(request.param)
    assert library is not None, "this machine needs a C++ compiler for its tests"
    return Lora(library)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bf16_case(**factors: str) -> LoraCase:
    return lora_case(**factors, dtype=torch.bfloat16)


def test_every_level_matches_fp64(lora):
    for factors in CASES:
        case = bf16_case(**factors)
        touched, got = case.touched(), run(lora, case)
        off = (got.double() - case.exact()).abs() / case.bound()
        assert off[touched].max() <= 1, factors
        assert same_bits(got[~touched], case.y[~touched]), factors


def test_the_number_of_threads_changes_no_bit(lora):
    for factors in CASES:
        case = bf16_case(**factors)
        torch.set_num_threads(1)
        alone = run(lora, case)
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert same_bits(run(lora, case), alone), (factors, count)


def test_a_row_s_bits_do_not_depend_on_the_batch(lora):
    """Each row in a segment of its own, in a batch without the others, gives what it gave in the whole batch."""
    for factors in CASES[::3]:
        case = bf16_case(**factors)
        together = run(lora, case)
        s = case.segments
        for start, end, members in zip(s.starts, s.ends, s.members, strict=True):
            for row in range(start, end):
                alone = run(lora, case, Segments([row], [row + 1], [members]))
                assert same_bits(alone[row], together[row]), (factors, row)


def test_sums_that_cancel_are_taken_in_one_order(lora):
    """Halves of x and A that nearly cancel: another order of the sum over K would show in many of the results."""
    rank, in_features = 64, 512
    group = SiteGroup(rows=(1,), offsets=(0,), widths=(rank,), in_features=in_features)
    builder = ArenaBuilder(torch.bfloat16, num_slots=2)
    builder.add(1, 1, rank, in_features, rank)
    case = make_case(builder, plain((0, 40, 1)), rows=40, group=group)
    a_offset, b_offset = case.weights.table[1, 1, :2].tolist()
    a = case.weights.arena[a_offset : a_offset + rank * in_features].view(rank, in_features)
    a[:, in_features // 2 :] = a[:, : in_features // 2]
    case.weights.arena[b_offset : b_offset + rank * rank] = torch.eye(rank).flatten().bfloat16()
    half = case.x[:, : in_features // 2]
    case.x[:, in_features // 2 :] = -half * (1 + torch.randint(-1, 2, half.shape) * 2.0**-7)
    case.y.zero_()  # so that y becomes v
    together = run(lora, case)
    for count in (1, 2, 3, 4, 25):
        for first in range(0, 40, count):
            end = min(first + count, 40)
            part = run(lora, case, plain((first, end, 1)))
            assert same_bits(part[first:end], together[first:end]), (count, first)


@pytest.mark.parametrize("rank", [1, 2, 7, 8, 9, 16, 17, 24, 31, 32, 33, 40, 64, 100, 512])
def test_ranks_and_widths_around_every_border(lora, rank):
    """Beyond the last row of A and B there is NaN; a K and an N that no vector divides."""
    for width, in_features in ((1, 8), (15, 31), (16, 32), (17, 33), (47, 70), (130, 97)):
        group = SiteGroup(rows=(1,), offsets=(3,), widths=(width,), in_features=in_features)
        builder = ArenaBuilder(torch.bfloat16, num_slots=3, seed=rank)
        for slot in (1, 2):
            builder.add(slot, 1, width, in_features, rank)
        case = make_case(builder, plain((0, 1, 1), (1, 3, 2), (4, 9, 1), (9, 43, 2)), rows=44, group=group)
        touched, got = case.touched(), run(lora, case)
        assert ((got.double() - case.exact()).abs() <= case.bound())[touched].all(), (width, in_features)
        assert same_bits(got[~touched], case.y[~touched])


def tall_case(rank: int, rows: int, widths: tuple[int, ...] = (70, 33), in_features: int = 72) -> LoraCase:
    """One adapter over all rows but the first and the last; y has values of every kind."""
    offsets = (3, 3 + widths[0] + 5)
    group = SiteGroup(rows=(1, 2), offsets=offsets, widths=widths, in_features=in_features)
    builder = ArenaBuilder(torch.bfloat16, num_slots=2, seed=rank)
    for row, width in zip(group.rows, widths, strict=True):
        builder.add(1, row, width, in_features, rank)
    case = make_case(builder, plain((1, rows - 1, 1)), rows=rows, group=group)
    special = torch.tensor([0.0, 1e-39, -3e-40, 3.3e38, -3.3e38, torch.inf, -torch.inf, torch.nan]).bfloat16()
    case.y[:, ::5] = special[torch.randint(len(special), case.y[:, ::5].shape)]
    case.y[:, 3 + widths[0] : offsets[1]] = torch.nan
    return case


@pytest.mark.parametrize("rank", [3, 8, 13, 16, 24, 32, 40, 64, 72])
def test_many_rows_have_the_bits_of_segments_of_one(lora, rank):
    """Around the numbers of rows at which the work is cut otherwise, for any number of threads."""
    torch.manual_seed(rank)
    for rows in (5, 6, 7, 8, 13, 49, 50, 51, 98, 130, 131, 290):
        case = tall_case(rank, rows)
        torch.set_num_threads(1)
        alone = run(lora, case, plain(*((row, row + 1, 1) for row in range(1, rows - 1))))
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            assert same_bits(run(lora, case), alone), (rows, count)


@pytest.mark.parametrize("rows", [3, 60])
@pytest.mark.parametrize("rank", [8, 16, 64])
def test_a_delta_of_zero_changes_nothing(lora, rank, rows):
    """Denormals, infinities and the largest numbers stay what they are."""
    case = tall_case(rank, rows)
    a_offset = case.weights.table[1, 1:3, 0].tolist()
    for offset in a_offset:
        case.weights.arena[offset : offset + rank * case.group.in_features] = 0
    assert same_bits(run(lora, case), case.y)
    assert ((case.y != 0) & (case.y.abs() < 1e-38)).any()


@pytest.mark.parametrize("rank", [8, 16, 40, 64])
def test_many_rows_are_as_exact_as_one(lora, rank):
    for rows, widths in ((130, (576, 192)), (40, (31, 1)), (200, (32, 64))):
        case = tall_case(rank, rows, widths, in_features=96)
        case.y = torch.where(case.touched(), torch.randn(case.y.shape), torch.nan).bfloat16()
        assert_exact(lora, case)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.bfloat16])
def test_other_dtypes_are_torch_s(lora, dtype):
    case = lora_case("zipf", "ragged", dtype, "qkv", "mixed")
    assert same_bits(run(lora, case)[case.touched()], run(ops.get_backend("torch"), case)[case.touched()])


def test_too_little_scratch_memory_is_refused_before_anything_is_written(lora, monkeypatch):
    case = bf16_case(popularity="sets", ranks="ragged", shape="qkv", phase="mixed")
    enough = LoraWeights.scratch
    monkeypatch.setattr(LoraWeights, "scratch", lambda *args: (enough(*args)[0], 64))
    y = case.y.clone()
    with pytest.raises(RuntimeError, match="scratch memory is too small"):
        lora.segmented_lora(y, case.x, case.weights, case.group, case.segments)
    assert same_bits(y, case.y)


def test_a_padded_rank_that_is_none_is_refused(lora):
    case = bf16_case(popularity="identical", ranks="all-16", shape="single", phase="decode")
    case.weights.table[2, 1, STRIDE] = 12
    y = case.y.clone()
    with pytest.raises(RuntimeError, match="multiple of 8"):
        lora.segmented_lora(y, case.x, case.weights, case.group, case.segments)
    assert same_bits(y, case.y)


def test_the_scratch_memory_follows_the_step_s_slots_alone(lora):
    """Of a table of thousands of slots a step reads its own; a larger rank that comes into one of them is seen."""
    case = make_case(two_adapters(torch.bfloat16, ranks=(3, 8)), plain((0, 5, 1), (5, 6, 2)))
    case.weights.table[3, :, STRIDE] = 1 << 40  # nobody's: its memory would be terabytes
    assert_exact(lora, case)
    larger = two_adapters(torch.bfloat16, ranks=(64, 8))
    case.weights.table.copy_(larger.weights().table)
    case.weights.arena = larger.weights().arena
    case.weights.version += 1
    case.weights.scratch["cpu"].calls.clear()  # they have the former arena's address
    case.dense = larger.dense
    assert_exact(lora, case)


def test_segments_are_flattened_once_and_again_when_they_change():
    segments = plain((0, 2, 1), (2, 3, 2))
    first = lora_segments(segments)
    assert lora_segments(segments) is first
    segments.ends[1] = 5
    second = lora_segments(segments)
    assert second is not first and second.struct.ends[1] == 5 and second.member_rows == 5


def test_this_machine_has_the_backend():
    """A machine that runs the tests has a compiler; a failure here says that it has not."""
    assert "cpu" in ops.backends()
    assert kernels.cpu.is_available()


def test_without_a_library_the_name_is_not_offered(monkeypatch):
    monkeypatch.setattr(kernels.cpu, "library", lambda: None)
    assert "cpu" not in ops.backends() and "torch" in ops.backends()
    with pytest.raises(ValueError, match="'cpu' does not run on this machine"):
        ops.get_backend("cpu")
