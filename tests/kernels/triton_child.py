"""What the Triton kernels promise, run under the interpreter by test_triton_lora.py in a process of its own.

TRITON_INTERPRET=1 must be set before triton is imported, and holds for a whole process.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

import kernels.triton
from kernels import reference
from kernels.triton import lora, plan
from kernels.triton.interpreter import IS_INTERPRETED
from kernels.triton.launch import Gpu
from kernels.triton.plan import DeviceSegments
from kernels.types import Segments, SiteGroup
from tests.kernels.builders import DTYPES, SHAPES, ArenaBuilder, lora_case, pairwise
from tests.kernels.test_lora import run, same_bits
from tests.kernels.test_lora_edges import assert_exact, embedding_case, make_case, plain, two_adapters

FORMS = ("few", "decode", "prefill")
CASES = list(
    pairwise(
        form=FORMS[1:],
        popularity=("distinct", "skewed", "base-mixed"),
        ranks=("all-16", "ragged"),
        dtype=DTYPES,
        shape=tuple(SHAPES),
        phase=("decode", "mixed"),
    )
)
"""A selection that is quickly interpreted: sets and ranks above 64 have their own tests, and a slow test runs all."""

BACKEND = kernels.triton


def name_of(case: dict[str, object]) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch):
    """v is never zeroed: what the expand reads of it, the shrink must have written."""
    assert IS_INTERPRETED

    def poisoned(shape: tuple[int, ...], **options: object) -> torch.Tensor:
        return torch.full(shape, torch.nan, **options)

    monkeypatch.setattr(lora, "torch", SimpleNamespace(empty=poisoned, float32=torch.float32))


def use_form(monkeypatch, form: str) -> None:
    """Every step is of this form, whatever its rows."""
    monkeypatch.setattr(plan, "form_of", lambda rows: form)


@pytest.mark.parametrize("factors", CASES, ids=name_of)
def test_matches_fp64_and_leaves_the_rest_alone(factors, monkeypatch):
    """Against fp64 and the reference; NaN in base rows, other columns, absent sites and between the weights."""
    use_form(monkeypatch, factors["form"])
    case = lora_case(**{name: value for name, value in factors.items() if name != "form"})
    touched = case.touched()
    before = [t.clone() for t in (case.x, case.weights.arena, case.weights.table)]
    got = run(BACKEND, case)
    assert touched.any()
    off = (got.double() - case.exact()).abs() / case.bound(rounds_v=False)
    assert off[touched].max() <= (1 if case.y.dtype == torch.float32 else 1.05), "beyond one rounding of the result"
    difference = (got.double() - run(reference, case).double()).abs() / (case.bound() + case.bound(rounds_v=False))
    assert difference[touched].max() <= 1
    assert same_bits(got[~touched], case.y[~touched])
    after = [case.x, case.weights.arena, case.weights.table]
    assert all(same_bits(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sets_of_ranks_beyond_a_block(form, dtype, monkeypatch):
    """Members whose ranks take several blocks each way, beside small ones, with weights and one bias."""
    use_form(monkeypatch, form)
    builder = two_adapters(dtype, ranks=(130, 3))
    builder.add(3, 2, 24, 32, rank=70, bias=True)
    sets = [((1, 0.5), (3, -1.25)), ((3, 1.0), (2, 1.0), (1, 1.0)), ((1, 1.0),)]
    segments = Segments([0, 1, 8], [1, 6, 12], sets)
    assert_exact(BACKEND, make_case(builder, segments))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [1.0, -0.75])
def test_a_row_s_bits_depend_on_the_form_alone(form, weight, monkeypatch):
    """Each row in a segment of its own, without the others, gives what it gave in the batch; and twice the same."""
    use_form(monkeypatch, form)
    rows = 9 if form == "few" else 30
    case = make_case(two_adapters(torch.float16, ranks=(5, 24)), Segments(), rows=rows)
    members = ((1, weight),) if weight == 1.0 else ((1, weight), (2, 0.5))
    case.segments = Segments([0, 1, 4], [1, 3, rows - 1], [members, ((2, 1.0),), members])
    together = run(BACKEND, case)
    case.weights.scratch.clear()
    assert same_bits(together, run(BACKEND, case))
    bucket = plan.rank_bucket(case.segments, case.weights)
    for row, its in ((0, members), (2, ((2, 1.0),)), (4, members), (rows - 2, members)):
        device = DeviceSegments(rows, 2 * rows, bucket)
        alone = Segments([row], [row + 1], [its], {"triton": device})
        device.fill(alone)
        assert same_bits(run(BACKEND, case, alone)[row], together[row])


def plans(rng: random.Random, rows: int, has_sets: bool) -> list[Segments]:
    """Long ones, short ones and an empty one, in turns; base rows between the segments."""
    found = []
    for share in (0.9, 0.2, 0.0, 1.0):
        segments, row = Segments(), 0
        while row < rows:
            end = min(row + rng.choice([1, 1, 2, 19]), rows)
            if rng.random() < share:
                count = rng.choice([1, 2, 3]) if has_sets else 1
                weights = (1.0, 0.5, -0.75) if has_sets else (1.0,)
                segments.starts.append(row)
                segments.ends.append(end)
                segments.members.append(tuple((slot, rng.choice(weights)) for slot in rng.sample((1, 2, 3), count)))
            row = end
        found.append(segments)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_sets", [False, True])
def test_one_plan_filled_anew_equals_fresh_ones(form, has_sets, monkeypatch):
    """As a graph does it: the launch is frozen with the first step's lists, only the records' content changes."""
    use_form(monkeypatch, form)
    rows, rng = 4 if form == "few" else 24, random.Random(f"{form} {has_sets}")
    case = make_case(two_adapters(torch.float16, ranks=(5, 24)), Segments(), rows=rows)
    steps = plans(rng, rows, has_sets)
    bucket = 64
    device = DeviceSegments(rows, rows * (3 if has_sets else 1), bucket)
    frozen = Segments(steps[0].starts, steps[0].ends, steps[0].members, {"triton": device})
    address = device.records.data_ptr()
    for segments in (*steps, steps[1]):
        device.fill(segments)
        fresh = DeviceSegments(rows, rows * (3 if has_sets else 1), bucket)
        fresh.fill(segments)
        segments.scratch["triton"] = fresh
        got = run(BACKEND, case, frozen)
        assert same_bits(got, run(BACKEND, case, segments))
        case.segments = segments
        touched = case.touched()
        assert ((got.double() - case.exact()).abs() <= case.bound())[touched].all()
        assert same_bits(got[~touched], case.y[~touched])
    assert device.records.data_ptr() == address


def test_a_table_that_changes_under_a_plan_is_read_anew():
    """A graph stays valid while images come and go: no address or rank is kept on the host."""
    big, small = two_adapters(torch.float16, ranks=(13, 8)), two_adapters(torch.float16, ranks=(3, 16))
    case = make_case(big, plain((0, 5, 1), (5, 6, 2), (7, 12, 1)))
    device = DeviceSegments(12, 12, 16)
    device.fill(case.segments)
    case.segments.scratch["triton"] = device
    assert_exact(BACKEND, case)
    weights, after = case.weights, small.weights()
    weights.arena[: len(after.arena)] = after.arena[: len(weights.arena)]
    weights.arena[len(after.arena) :] = torch.nan
    weights.table.copy_(after.table)
    case.dense = small.dense
    assert_exact(BACKEND, case)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_values_of_v_keep_their_digits(form, dtype, monkeypatch):
    """v is fp32: two that cancel but for their last digits leave those, and in fp16 one may be beyond its largest."""
    use_form(monkeypatch, form)
    group = SiteGroup(rows=(1,), offsets=(0,), widths=(32,), in_features=64)
    builder = two_adapters(dtype)
    builder.add(1, 1, 32, 64, rank=2)
    builder.table[2:] = builder.table[0]
    builder.dense = {(1, 1): builder.dense[1, 1]}
    case = make_case(builder, plain((0, 6, 1)), rows=6, group=group)
    a_offset, b_offset = case.weights.table[1, 1, :2].tolist()
    case.weights.arena[a_offset : a_offset + 128] = 1.0
    case.weights.arena[a_offset + 127] = 1.0 + 2.0**-6
    b = case.weights.arena[b_offset : b_offset + 32 * 8].view(32, 8)
    b[:, 0], b[:, 1] = 1.0, -1.0
    case.x[:] = 1.5
    case.y.zero_()
    assert ((run(BACKEND, case).double() + 1.5 * 2.0**-6).abs() <= 1.5 * 2.0**-6 * 2**-7).all()
    if dtype == torch.float16:
        case.x[:] = 1500.0  # v is 96000
        b[:, 0], b[:, 1] = 0.5, 0.0
        assert ((run(BACKEND, case).double() - 48000).abs() <= 48000 * 2**-10).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_in_every_form(form, dtype, monkeypatch):
    use_form(monkeypatch, form)
    builder, segments, ids = embedding_case(dtype)
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(16, 48, generator=generator).to(dtype)
    y[10] = torch.nan  # a base row
    got, want = y.clone(), y.clone()
    BACKEND.segmented_embedding(got, ids, builder.weights(), 3, segments)
    reference.segmented_embedding(want, ids, builder.weights(), 3, segments)
    absent = torch.tensor([row in (6, 7, 10) for row in range(16)])
    assert same_bits(got[absent], y[absent])
    spread = (got.double() - want.double()).abs() / want.double().abs().clamp_min(4.0)  # what is added is some 3
    assert spread[~absent].max() <= torch.finfo(dtype).eps


def test_the_number_of_processors_changes_no_bit_of_a_decode(monkeypatch):
    case = make_case(two_adapters(torch.float16, ranks=(5, 24)), plain((0, 1, 1), (1, 9, 2), (9, 30, 1)), rows=30)
    expected = run(BACKEND, case)
    monkeypatch.setattr(lora, "gpu_of", lambda device: Gpu(processors=132, capability=90))
    assert same_bits(run(BACKEND, case), expected)


@pytest.mark.parametrize(
    ("ranks", "dtype"), [((5, 16), torch.bfloat16), ((40, 1), torch.float16), ((130, 3), torch.float32)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES)
def test_few_rows(shape, ranks, dtype):
    """One row, and four of two adapters around a base row's; x, y and the arena as in the other tests."""
    group = SHAPES[shape]
    builder = ArenaBuilder(dtype, num_slots=3)
    for slot, rank in zip((1, 2), ranks, strict=True):
        for row, width in zip(group.rows, group.widths, strict=True):
            builder.add(slot, row, width, group.in_features, rank)
    for rows, segments in ((1, plain((0, 1, 1))), (4, plain((0, 1, 2), (2, 4, 1)))):
        case = make_case(builder, segments, rows, group)
        case.x[1:2], case.y[1:2] = torch.nan, torch.nan
        assert plan.device_segments(segments, case.weights, rows).tile_rows == rows
        assert_exact(BACKEND, case)


@pytest.mark.parametrize("form", FORMS)
def test_an_absent_site_is_not_written(form, monkeypatch):
    """A sum with a delta of zero would turn -0 into 0."""
    use_form(monkeypatch, form)
    builder = two_adapters(torch.float16)
    del builder.dense[2, 1]
    builder.table[2, 1] = builder.table[0, 1]
    case = make_case(builder, Segments([0, 3], [2, 9], [((2, 1.0),), ((2, 0.5), (3, 1.0))]))
    case.y[:, :40] = -0.0
    assert_exact(BACKEND, case)
    assert not case.touched()[:, :40].any()


@pytest.mark.parametrize("form", FORMS)
def test_no_more_than_a_site_s_true_rank_is_read(form, monkeypatch):
    """What lies behind a short A is another's: it reaches not even the parts of v that nobody reads."""
    use_form(monkeypatch, form)
    made = []

    def marked(shape: tuple[int, ...], **options: object) -> torch.Tensor:
        made.append(torch.full(shape, 777.0, **options))
        return made[-1]

    monkeypatch.setattr(lora, "torch", SimpleNamespace(empty=marked, float32=torch.float32))
    case = make_case(two_adapters(torch.float16, ranks=(5, 3)), plain((0, 4, 1), (4, 9, 2)))
    assert_exact(BACKEND, case)
    (v,) = made
    for rows, rank in ((slice(0, 4), 5), (slice(4, 9), 3)):
        beyond = v[:, rows].unflatten(2, (2, 16))[..., rank:]
        assert ((beyond == 0) | (beyond == 777)).all()
        assert not (v[:, rows].unflatten(2, (2, 16))[..., :rank] == 777).any()
