"""The CUDA C++ low-rank kernel, emulated on the CPU: against fp64, in poisoned memory, in any order of its threads."""

from __future__ import annotations

import ctypes
import random

import pytest
import torch

import kernels.cuda
from kernels import reference, torch_backend
from kernels.cuda.check import is_right
from kernels.cuda.lora import Lora
from kernels.ops import MODULES, get_backend
from kernels.triton.plan import DeviceSegments
from kernels.types import Segments, SiteGroup
from tests.kernels.builders import (
    PHASES,
    POPULARITIES,
    RANKS,
    SHAPES,
    ArenaBuilder,
    Dense,
    LoraCase,
    lora_case,
    pairwise,
)
from tests.kernels.emulated_cuda import AMPERE, BACKWARD, FORWARD, HOPPER, SMALL, Emulated, changed, library
from tests.kernels.test_lora import run, same_bits
from tests.kernels.test_lora_edges import (  # noqa: F401  (the tests among these run here with this file's backend)
    GROUP,
    assert_exact,
    make_case,
    plain,
    test_a_moved_image_and_an_evicted_one,
    test_a_slot_in_several_segments,
    test_a_smaller_adapter_in_a_reused_slot,
    test_bf16_is_no_worse_than_peft,
    test_nan_in_one_segment_stays_there,
    test_prefill_segments_of_any_length,
    test_segments_that_change_in_place_are_seen,
    test_sets,
    test_sites_with_a_bias_only_a_bias_or_nothing,
    test_two_arenas_don_t_meet,
    test_x_and_y_may_be_parts_of_wider_tensors,
    two_adapters,
)

HALVES = (torch.bfloat16, torch.float16)
CASES = list(pairwise(popularity=POPULARITIES, ranks=tuple(RANKS), dtype=HALVES, shape=tuple(SHAPES), phase=PHASES))


def name_of(case: dict[str, object]) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


@pytest.fixture(scope="module")
def backend() -> Emulated:
    return Emulated(library())


def assert_right(backend, case: LoraCase) -> torch.Tensor:
    """Within one rounding of fp64 and as the reference has it; everything else as it was, bit for bit."""
    touched = case.touched()
    before = [t.clone() for t in (case.x, case.weights.arena, case.weights.table)]
    got = run(backend, case)
    off = (got.double() - case.exact()).abs() / case.bound(rounds_v=False)
    assert not touched.any() or off[touched].max() <= 1.05, "beyond one rounding of the result"
    assert same_bits(got[~touched], case.y[~touched])
    after = [case.x, case.weights.arena, case.weights.table]
    assert all(same_bits(a, b) for a, b in zip(after, before, strict=True))
    return got


@pytest.mark.parametrize("factors", CASES, ids=name_of)
def test_matches_fp64_and_leaves_the_rest_alone(backend, factors):
    case = lora_case(**factors)
    own = factors["popularity"] != "sets" and factors["ranks"] != "wide" and len(case.y) <= 256
    got = assert_right(backend, case) if own else run(backend, case)  # torch's rounds more often
    difference = (got.double() - run(reference, case).double()).abs() / (case.bound() + case.bound(rounds_v=False))
    assert difference[case.touched()].max() <= 1
    assert same_bits(got, run(backend, case))


def mixed_case(dtype: torch.dtype = torch.bfloat16, rows: int = 40, width: int = 200) -> LoraCase:
    """Long and short tiles of four adapters with a bias and absent sites, base rows between."""
    group = SiteGroup(rows=(1, 2), offsets=(0, width), widths=(width, 72), in_features=200)
    builder = ArenaBuilder(dtype, num_slots=5)
    for slot, rank in ((1, 16), (2, 5), (3, 13), (4, 8)):
        for row, columns in zip(group.rows, group.widths, strict=True):
            if (slot, row) != (4, 1):
                builder.add(slot, row, columns, group.in_features, 0 if (slot, row) == (3, 2) else rank, bias=slot == 3)
    segments = plain((0, 19, 1), (20, 21, 2), (21, 30, 3), (30, 32, 4), (33, rows, 2))
    segments.members[2:4] = ((3, -0.5),), ((4, 1.3),)
    case = make_case(builder, segments, rows, group)
    untouched = ~case.touched()
    case.y[untouched] = torch.nan
    case.x[untouched.all(1)] = torch.nan
    return case


@pytest.mark.parametrize("shape", [SMALL, HOPPER, AMPERE], ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_order_of_the_threads_gives_the_same_bits(shape, dtype):
    """And every number of clusters that share the work."""
    case = mixed_case(dtype)
    ours = Emulated(library(shape))
    expected = assert_right(ours, case)
    for order in (BACKWARD, 2, 3) if shape == SMALL else (BACKWARD, 2):
        with ours.order(order):
            assert same_bits(run(ours, case), expected)
    for resident in (1, 7, 1000):
        assert same_bits(run(Emulated(library(shape), resident=resident), case), expected)


BARRIERS = {
    "warps' sums are kept": ("            block_wait();\n            if (is_read)", "            if (is_read)"),
    "others have read": ("            if (is_read) cluster_wait();\n", ""),
    "blocks' sums are kept": ("            cluster_arrive();\n            cluster_wait();\n", ""),
    "v is whole": ("            block_wait();\n        } else", "        } else"),
    "a block stays for the others": ("    if (is_read) cluster_wait();  // a block's", "    // a block's"),
    "x and y are made": ("    grid_wait();\n", ""),
}
"""Each barrier of the kernel, and the source without it."""


def outcome(backend: Emulated, case: LoraCase, order: int) -> str:
    """What an early launch gives: x and y are there when the kernel waits for them, and not before."""
    y, x = case.y.clone(), case.x.clone()
    contents = [backend.late(tensor) for tensor in (y, x)]
    touched = case.touched()
    with backend.order(order):
        try:
            backend.segmented_lora(y, x, case.weights, case.group, case.segments)
        except RuntimeError as error:
            return str(error)
    del contents
    return "right" if ((y.double() - case.exact()).abs() <= case.bound())[touched].all() else "wrong"


def test_an_early_launch_reads_x_and_y_when_they_are_there(backend):
    assert {outcome(backend, mixed_case(), order) for order in (FORWARD, BACKWARD, 2)} == {"right"}


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_barrier_that_is_missing_shows(tmp_path, barrier):
    """As wrong numbers in some order, or as an error of the emulation."""
    broken = Emulated(changed(tmp_path, *BARRIERS[barrier]), resident=1)
    case = mixed_case()
    assert {outcome(broken, case, order) for order in (FORWARD, BACKWARD, 2, 3)} != {"right"}


def views_of(case: LoraCase) -> list[torch.Tensor]:
    """Memory that a call may touch: its rows and slices, sites to their true rank (B with its padding), the plan."""
    weights, group, segments = case.weights, case.group, case.segments
    plan = DeviceSegments(len(case.y), len(case.y), 16)
    plan.fill(segments)
    segments.scratch["triton"] = plan
    views = [plan.records, weights.table]
    for start, end, ((slot, _),) in zip(segments.starts, segments.ends, segments.members, strict=True):
        views += [case.x[row] for row in range(start, end)]
        for row, offset, width in zip(group.rows, group.offsets, group.widths, strict=True):
            a, b, bias, rank, stride = weights.table[slot, row].tolist()
            if rank or bias >= 0:
                views += [y[offset : offset + width] for y in case.y[start:end]]
            views += [
                weights.arena[a : a + rank * group.in_features],
                weights.arena[b : b + bool(rank) * width * stride],
            ]
            views += [weights.arena[bias : bias + width]] if bias >= 0 else []
    return [view for view in views if view.numel()]


@pytest.mark.parametrize("width", [200, 203])
def test_no_other_memory_is_touched(backend, width):
    """Base rows, other columns, absent sites, ranks beyond the true one, what is behind a tensor's end."""
    case = mixed_case(width=width)
    views = views_of(case)
    backend.segmented_lora(case.y.clone(), case.x, case.weights, case.group, case.segments)  # makes the geometry
    views.append(case.weights.scratch["triton geometry"][case.group])
    with backend.only(*views):
        backend.segmented_lora(case.y, case.x, case.weights, case.group, case.segments)
    for left_out in (
        0,
        1,
        2,
        21,
        40,
        len(views) - 1,
    ):  # the records, the table, a row of x and of y, an A, the geometry
        fewer = views[:left_out] + views[left_out + 1 :]
        with backend.only(*fewer), pytest.raises(RuntimeError, match="memory outside of what is allowed"):
            backend.segmented_lora(case.y, case.x, case.weights, case.group, case.segments)


def test_one_plan_filled_anew_equals_fresh_ones(backend):
    """As a graph does it: the launch is frozen with the first step's lists, only the records' content changes."""
    rows, rng = 48, random.Random(5)
    case = make_case(two_adapters(torch.float16, ranks=(5, 24)), Segments(), rows=rows)
    device = DeviceSegments(rows, rows, 64)
    frozen = Segments([0], [1], [((1, 1.0),)], {"triton": device})
    for share in (0.9, 0.2, 0.0, 1.0, 0.5):
        case.segments = random_segments(rng, rows, share)
        device.fill(case.segments)
        got = run(backend, case, frozen)
        assert same_bits(got, run(backend, case, Segments(*lists_of(case.segments))))
        touched = case.touched()
        assert ((got.double() - case.exact()).abs() <= case.bound())[touched].all()
        assert same_bits(got[~touched], case.y[~touched])


class Capturing:
    """The library, which also keeps the launches' arguments as a graph does: a copy of their bytes."""

    def __init__(self) -> None:
        self.launches: list[tuple[object, ...]] = []
        self._launch = None

    def function(self, name: str, *types: object, result: object = ctypes.c_int):
        found = library().function(name, *types, result=result)
        if name != "ml_cuda_lora":
            return found
        self._launch = found

        def launch(args, *others):
            structure = args._obj
            self.launches.append((type(structure).from_buffer_copy(structure), *others))
            return found(args, *others)

        return launch

    def replay(self) -> None:
        for args, *others in self.launches:
            assert self._launch(ctypes.byref(args), *others) == 0


@pytest.mark.parametrize("bucket", [16, 64])
def test_a_launch_that_is_repeated_follows_plans_and_adapters(bucket):
    """A captured graph's: the very bytes of the launch again, over other segments, adapters, inputs in their places."""
    rows, rng = 40, random.Random(bucket)
    capturing = Capturing()
    lora = Lora(capturing, torch_backend, is_early=False)
    plan = DeviceSegments(rows, rows, bucket)
    case = make_case(adapters(rng, bucket), Segments([], [], [], {"triton": plan}), rows)
    arena = torch.full((1 << 17,), torch.nan, dtype=torch.bfloat16)
    case.weights.arena = arena
    plan.fill(case.segments)  # captured when no adapter was there
    lora.segmented_lora(case.y, case.x, case.weights, case.group, case.segments)
    assert len(capturing.launches) == 1
    for share in (0.9, 0.2, 0.0, 1.0):
        builder = adapters(rng, bucket)
        host = builder.weights()
        arena.fill_(torch.nan)
        arena[: len(host.arena)] = host.arena
        case.weights.table.copy_(host.table)
        case.dense = builder.dense
        case.segments = random_segments(rng, rows, share)
        plan.fill(case.segments)
        case.x.normal_(generator=torch.Generator().manual_seed(rng.randrange(99)))
        case.y.normal_(generator=torch.Generator().manual_seed(rng.randrange(99)))
        touched, before = case.touched(), case.y.clone()
        case.y[~touched] = torch.nan
        expected, bound = case.exact(), case.bound(rounds_v=False)
        capturing.replay()
        assert ((case.y.double() - expected).abs() <= 1.05 * bound)[touched].all()
        assert case.y[~touched].isnan().all() and bool(touched.any()) != same_bits(case.y[touched], before[touched])


def adapters(rng: random.Random, bucket: int) -> ArenaBuilder:
    """Slots 1 to 3 of any ranks up to the bucket; some lack a slice, some have biases."""
    builder = ArenaBuilder(torch.bfloat16, num_slots=4, seed=rng.randrange(1 << 30))
    for slot in (1, 2, 3):
        for row, width in zip(GROUP.rows, GROUP.widths, strict=True):
            if rng.random() < 0.8:
                builder.add(slot, row, width, GROUP.in_features, rng.randint(1, bucket), bias=rng.random() < 0.3)
    return builder


def random_segments(rng: random.Random, rows: int, share: float) -> Segments:
    segments, row = Segments(), 0
    while row < rows:
        end = min(row + rng.choice([1, 1, 2, 19]), rows)
        if rng.random() < share:
            segments.starts.append(row)
            segments.ends.append(end)
            segments.members.append(((rng.choice([1, 2, 3]), rng.choice([1.0, -0.75])),))
        row = end
    return segments


def lists_of(segments: Segments) -> tuple[list[int], list[int], list]:
    return segments.starts, segments.ends, segments.members


def test_a_table_that_changes_under_a_plan_is_read_anew(backend):
    big, small = two_adapters(torch.float16, ranks=(13, 8)), two_adapters(torch.float16, ranks=(3, 16))
    case = make_case(big, plain((0, 5, 1), (5, 6, 2), (7, 12, 1)))
    device = DeviceSegments(12, 12, 16)
    device.fill(case.segments)
    case.segments.scratch["triton"] = device
    assert_exact(backend, case)
    weights, after = case.weights, small.weights()
    weights.arena[: len(after.arena)] = after.arena[: len(weights.arena)]
    weights.arena[len(after.arena) :] = torch.nan
    weights.table.copy_(after.table)
    case.dense = small.dense
    assert_exact(backend, case)


@pytest.mark.parametrize("dtype", HALVES)
def test_large_values_of_v_keep_their_digits(backend, dtype):
    """v is fp32: two that cancel but for their last digits leave those, and in fp16 one may be beyond its largest."""
    group = SiteGroup(rows=(1,), offsets=(0,), widths=(32,), in_features=64)
    builder = ArenaBuilder(dtype, num_slots=2)
    builder.add(1, 1, 32, 64, rank=2)
    case = make_case(builder, plain((0, 6, 1)), rows=6, group=group)
    a_offset, b_offset = case.weights.table[1, 1, :2].tolist()
    case.weights.arena[a_offset : a_offset + 128] = 1.0
    case.weights.arena[a_offset + 127] = 1.0 + 2.0**-6
    b = case.weights.arena[b_offset : b_offset + 32 * 8].view(32, 8)
    b[:, 0], b[:, 1] = 1.0, -1.0
    case.x[:] = 1.5
    case.y.zero_()
    assert ((run(backend, case).double() + 1.5 * 2.0**-6).abs() <= 1.5 * 2.0**-6 * 2**-7).all()
    if dtype == torch.float16:
        case.x[:] = 1500.0  # v is 96000
        b[:, 0], b[:, 1] = 0.5, 0.0
        assert ((run(backend, case).double() - 48000).abs() <= 48000 * 2**-10).all()


def test_an_absent_site_is_not_written(backend):
    """A sum with a delta of zero would turn -0 into 0."""
    case = mixed_case()
    case.y[30:32, :200] = -0.0
    assert not case.touched()[30:32, :200].any()
    assert same_bits(run(backend, case)[30:32, :200], case.y[30:32, :200])


def test_a_rank_beyond_the_plan_s_is_cut_off(backend):
    """No memory is read for it: what a graph was captured for stays its bound."""
    case = make_case(two_adapters(torch.bfloat16, ranks=(24, 8)), plain((0, 12, 1)))
    plan = DeviceSegments(12, 12, 16)
    plan.fill(case.segments)
    case.segments.scratch["triton"] = plan
    for (slot, row), site in case.dense.items():
        case.dense[slot, row] = Dense(site.a[:16], site.b[:, :16], None)
    assert_right(backend, case)


def test_an_infinite_row_stays_alone(backend):
    case = mixed_case()
    clean = run(backend, case)
    case.x[2, 7] = torch.inf
    got = run(backend, case)
    assert not got[2].isfinite().any()
    others = torch.arange(len(got)) != 2
    assert same_bits(got[others], clean[others])


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_few_rows(backend, rows):
    case = make_case(two_adapters(torch.bfloat16, ranks=(5, 16)), plain((rows - 1, rows, 2)), rows)
    case.x[: rows - 1], case.y[: rows - 1] = torch.nan, torch.nan
    assert_right(backend, case)


class Noting:
    """A backend that only notes that it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def segmented_lora(self, *arguments: object) -> None:
        self.calls += 1


@pytest.mark.parametrize(
    ("dtype", "ranks", "rows", "members", "calls"),
    [
        (torch.bfloat16, (8, 64), 256, ((1, 1.0),), 0),
        (torch.bfloat16, (8, 65), 30, ((2, 1.0),), 1),
        (torch.bfloat16, (8, 8), 257, ((1, 1.0),), 1),
        (torch.float32, (8, 8), 30, ((1, 1.0),), 1),
        (torch.bfloat16, (8, 8), 30, ((1, 1.0), (2, 1.0)), 1),
        (torch.bfloat16, (8, 8), 3, ((1, 1.0),), 0),
    ],
)
def test_what_the_kernel_does_not_do_goes_to_the_others(dtype, ranks, rows, members, calls):
    noting = Noting()
    lora = Lora(library(), noting, is_early=False)
    case = make_case(two_adapters(dtype, ranks), Segments([0], [rows], [members]), rows)
    before = case.y.clone()
    lora.segmented_lora(case.y, case.x, case.weights, case.group, case.segments)
    assert noting.calls == calls
    assert same_bits(case.y, before) == bool(calls)


def test_a_step_without_segments_changes_nothing(backend):
    for segments in (Segments(), plain((3, 3, 1)), Segments([2], [6], [()])):
        case = make_case(two_adapters(torch.bfloat16), segments)
        device = DeviceSegments(12, 12, 16)
        device.fill(segments)
        assert same_bits(run(backend, case), case.y)
        assert same_bits(run(backend, case, Segments(*lists_of(segments), {"triton": device})), case.y)


class Silent:
    """A library whose launches do nothing."""

    def function(self, name: str, *types: object, result: object = ctypes.c_int):
        return library().function(name, *types, result=result) if name != "ml_cuda_lora" else lambda *arguments: 0


def test_the_proof_at_start_knows_right_from_wrong(tmp_path):
    device = torch.device("cpu")
    assert is_right(Emulated(library()).lora, device)
    without_weights = changed(tmp_path, "total.second * weight", "total.second")
    for wrong in (without_weights, Silent()):
        assert not is_right(Lora(wrong, torch_backend, is_early=False), device)


def test_it_is_no_backend_without_a_gpu(monkeypatch):
    """Not for want of a compiler: what is not there is the device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels.cuda, "lora", kernels.cuda.lora.__wrapped__)
    assert "cuda" in MODULES and not kernels.cuda.is_available()
    with pytest.raises(ValueError, match="cuda"):
        get_backend("cuda")
    with pytest.raises(RuntimeError, match="triton"):
        kernels.cuda.segmented_lora(*(None,) * 5)
