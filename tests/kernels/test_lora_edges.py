"""What the factors of test_lora.py don't reach: empty plans, slot reuse, poison, sets, embeddings, caching."""

from __future__ import annotations

import gc

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from kernels import ops
from kernels.torch_backend.views import MAX_SLOTS
from kernels.types import Segments, SiteGroup
from tests.kernels.builders import ArenaBuilder, LoraCase, lora_case
from tests.kernels.test_lora import run, same_bits

GROUP = SiteGroup(rows=(1, 2), offsets=(0, 40), widths=(40, 24), in_features=32)
DTYPES = (torch.float32, torch.bfloat16)


def make_case(builder: ArenaBuilder, segments: Segments, rows: int = 12, group: SiteGroup = GROUP) -> LoraCase:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, group.in_features, generator=generator).to(builder.dtype)
    y = torch.randn(rows, group.offsets[-1] + group.widths[-1], generator=generator).to(builder.dtype)
    return LoraCase(builder.weights(), group, segments, x, y, builder.dense)


def two_adapters(dtype: torch.dtype = torch.float32, ranks: tuple[int, int] = (8, 8)) -> ArenaBuilder:
    """Slots 1 and 2, whole."""
    builder = ArenaBuilder(dtype, num_slots=4)
    for slot, rank in zip((1, 2), ranks, strict=True):
        for row, width in zip(GROUP.rows, GROUP.widths, strict=True):
            builder.add(slot, row, width, GROUP.in_features, rank)
    return builder


def plain(*spans: tuple[int, int, int]) -> Segments:
    """Segments (start, end, slot)."""
    return Segments([s for s, _, _ in spans], [e for _, e, _ in spans], [((slot, 1.0),) for _, _, slot in spans])


def assert_exact(backend, case: LoraCase) -> None:
    touched = case.touched()
    got = run(backend, case)
    off = (got.double() - case.exact()).abs() / case.bound()
    assert off[touched].max() <= 1
    assert same_bits(got[~touched], case.y[~touched])


@pytest.mark.parametrize("segments", [Segments(), plain((3, 3, 1), (5, 5, 2)), Segments([2], [6], [()])])
def test_no_segment_no_rows_and_no_members_change_nothing(backend, segments):
    case = make_case(two_adapters(), segments)
    case.x.fill_(torch.nan)
    assert same_bits(run(backend, case), case.y)


def test_zero_length_segments_among_others(backend):
    assert_exact(backend, make_case(two_adapters(), plain((0, 0, 1), (0, 4, 2), (4, 4, 1), (6, 8, 1), (12, 12, 2))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slot_in_several_segments(backend, dtype):
    spans = [(0, 1, 1), (1, 2, 2), (2, 3, 1), (4, 5, 1), (6, 9, 2), (9, 10, 1), (10, 12, 1)]
    assert_exact(backend, make_case(two_adapters(dtype), plain(*spans)))


def test_nan_in_one_segment_stays_there(backend):
    """Rows that share a batched product must not see each other, nor another adapter's weights."""
    case = make_case(two_adapters(), plain((0, 1, 1), (1, 2, 2), (2, 3, 1), (3, 6, 2), (6, 9, 1)))
    clean = run(backend, case)
    case.x[1] = torch.nan
    case.y[4] = torch.inf
    a_offset = int(case.weights.table[2, 1, 0])
    case.weights.arena[a_offset : a_offset + 8 * GROUP.in_features] = torch.nan  # all of slot 2, slice 0
    got = run(backend, case)
    assert same_bits(got[[0, 2, 6, 7, 8]], clean[[0, 2, 6, 7, 8]])
    assert same_bits(got[3:4, 40:], clean[3:4, 40:])  # slot 2's other slice
    assert got[3, :40].isnan().all() and got[1].isnan().all()


def test_a_smaller_adapter_in_a_reused_slot(backend):
    """Rank 64 leaves, rank 8 comes into the same slot and memory: nothing of the former may remain."""
    big, small = two_adapters(ranks=(64, 8)), two_adapters(ranks=(3, 8))
    segments = plain((0, 5, 1), (5, 6, 2), (6, 7, 1))
    case = make_case(big, segments)
    assert_exact(backend, case)
    weights, after = case.weights, small.weights()
    weights.arena[: len(after.arena)] = after.arena
    weights.arena[len(after.arena) :] = torch.nan
    weights.table.copy_(after.table)
    weights.version += 1
    case.dense = small.dense
    assert_exact(backend, case)


def test_a_moved_image_and_an_evicted_one(backend):
    """Slot 1 moves, slot 2 is cleared; only the table's version says so."""
    case = make_case(two_adapters(), plain((0, 1, 1), (1, 2, 2), (2, 4, 1)))
    assert_exact(backend, case)
    weights = case.weights
    entry = weights.table[1, 1]
    start, count = int(entry[0]), 8 * GROUP.in_features
    free = len(weights.arena) - 900
    weights.arena[free : free + count] = weights.arena[start : start + count]
    weights.arena[start : start + count] = torch.nan
    entry[0] = free
    weights.table[2] = 0
    weights.table[2, :, 2] = -1
    weights.version += 1
    case.dense = {key: dense for key, dense in case.dense.items() if key[0] == 1}
    assert_exact(backend, case)


def test_two_arenas_don_t_meet(backend):
    segments = plain((0, 2, 1), (2, 3, 2))
    other = ArenaBuilder(torch.float32, num_slots=4, seed=99)
    for slot in (1, 2):
        for row, width in zip(GROUP.rows, GROUP.widths, strict=True):
            other.add(slot, row, width, GROUP.in_features, rank=5)
    first, second = make_case(two_adapters(), segments), make_case(other, segments)
    for case in (first, second, first):
        assert_exact(backend, case)


def test_segments_that_change_in_place_are_seen(backend):
    """The batch builder reuses its buffers from step to step."""
    case = make_case(two_adapters(), plain((0, 2, 1), (2, 3, 2)))
    assert_exact(backend, case)
    case.segments.ends[1] = 5
    assert_exact(backend, case)
    case.segments.members[0] = ((2, 1.0),)
    assert_exact(backend, case)
    case.segments.starts[1] = 3
    assert_exact(backend, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "members",
    [((1, 0.5),), ((1, 1.0), (2, 1.0)), ((2, -1.25), (1, 0.3)), ((1, 1.0), (3, 1.0)), ((1, 1.0), (1, -1.0))],
    ids=str,
)
def test_sets(backend, members, dtype):
    """Weights of either sign, members of different ranks, one that lacks the sites, one that cancels itself."""
    segments = Segments([0, 3, 4], [3, 4, 9], [members, ((2, 1.0),), members])
    assert_exact(backend, make_case(two_adapters(dtype, ranks=(5, 24)), segments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sites_with_a_bias_only_a_bias_or_nothing(backend, dtype):
    builder = ArenaBuilder(dtype, num_slots=5)
    builder.add(1, 1, 40, 32, rank=4, bias=True)
    builder.add(1, 2, 24, 32, rank=4)
    builder.add(2, 1, 40, 32, rank=0, bias=True)
    builder.add(3, 2, 24, 32, rank=12)
    spans = [(0, 1, 1), (1, 2, 2), (2, 3, 3), (3, 4, 4), (4, 7, 1), (7, 9, 2), (9, 12, 3)]
    assert_exact(backend, make_case(builder, plain(*spans)))


def test_more_weights_than_one_batch_gathers(backend, monkeypatch):
    monkeypatch.setattr("kernels.torch_backend.plan.MAX_BATCH_BYTES", 16_384)  # four of these segments, so 4 + 4 + 3
    assert_exact(backend, make_case(two_adapters(), plain(*[(i, i + 1, 1 + i % 2) for i in range(11)])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_segments_of_any_length(backend, dtype):
    """Around and beyond what a backend may batch; some of one length."""
    spans, row = [], 0
    for i, rows in enumerate([63, 64, 64, 65, 130, 70, 70]):
        spans.append((row, row + rows, 1 + i % 2))
        row += rows + i % 3
    assert_exact(backend, make_case(two_adapters(dtype, ranks=(8, 24)), plain(*spans), rows=row + 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_x_and_y_may_be_parts_of_wider_tensors(backend, dtype):
    case = make_case(two_adapters(dtype), plain((0, 1, 1), (1, 2, 2), (3, 4, 1), (4, 9, 2)))
    wide_x, wide_y = torch.full((12, 50), torch.nan).to(dtype), torch.full((12, 99), torch.nan).to(dtype)
    wide_x[:, 8:40], wide_y[:, 9:73] = case.x, case.y
    want = run(backend, case)
    backend.segmented_lora(wide_y[:, 9:73], wide_x[:, 8:40], case.weights, GROUP, case.segments)
    assert ((wide_y[:, 9:73].double() - want.double()).abs() <= case.bound()).all()
    assert wide_y[:, :9].isnan().all() and wide_y[:, 73:].isnan().all()


def test_bf16_is_no_worse_than_peft(backend):
    """RMS error against fp64 over decode and prefill segments, next to unmerged PEFT in bf16."""
    generator = torch.Generator().manual_seed(3)
    rank, alpha, features = 16, 27, 512
    config = LoraConfig(target_modules=["0"], r=rank, lora_alpha=alpha)
    model = inject_adapter_in_model(config, torch.nn.Sequential(torch.nn.Linear(features, features, bias=False)))
    layer = model.bfloat16()[0]
    a, b = (torch.randn(*s, generator=generator).bfloat16() for s in ((rank, features), (features, rank)))
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a / 16, b / 4
    x = torch.randn(200, features, generator=generator).bfloat16()
    with torch.no_grad():
        peft = layer(x)
        y = layer.base_layer(x)
        exact = layer.double()(x.double())

    builder = ArenaBuilder(torch.bfloat16, num_slots=2)
    builder.add(1, 0, features, features, rank)
    weights = builder.weights()
    a_offset, b_offset = weights.table[1, 0, :2].tolist()
    folded = (b / 4).float() * (alpha / rank)  # as the compiler folds the scale: in fp32, cast once
    weights.arena[a_offset : a_offset + a.numel()] = (a / 16).flatten()
    weights.arena[b_offset : b_offset + b.numel()] = folded.bfloat16().flatten()
    group = SiteGroup(rows=(0,), offsets=(0,), widths=(features,), in_features=features)
    backend.segmented_lora(y, x, weights, group, plain(*[(i, i + 1, 1) for i in range(40)], (40, 200, 1)))
    ours, theirs = ((t.double() - exact).pow(2).mean().sqrt().item() for t in (y, peft))
    assert ours <= theirs


def embedding_case(dtype: torch.dtype) -> tuple[ArenaBuilder, Segments, torch.Tensor]:
    """Slots 1 to 4: rank 8, rank 5, only a bias, none. Ids include the first and the last of the vocabulary."""
    builder = ArenaBuilder(dtype, num_slots=5)
    builder.add(1, 3, 48, 0, rank=8, vocab=100)
    builder.add(2, 3, 48, 0, rank=5, vocab=100, bias=True)
    builder.add(3, 3, 48, 0, rank=0, vocab=100, bias=True)
    members = [((1, 1.0),), ((1, 1.0),), ((2, 1.0),), ((3, 1.0),), ((4, 1.0),), ((1, -0.5), (2, 2.0)), ((1, 1.0),)]
    segments = Segments([0, 1, 2, 5, 6, 8, 11], [1, 2, 5, 6, 8, 10, 16], members)
    ids = torch.randint(0, 100, (16,), generator=torch.Generator().manual_seed(1))
    ids[0], ids[15], ids[2] = 0, 99, 99
    return builder, segments, ids


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(backend, dtype):
    builder, segments, ids = embedding_case(dtype)
    y = torch.randn(16, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    want, bound = y.double(), torch.finfo(dtype).eps * y.double().abs()
    y[10], want[10] = torch.nan, torch.nan  # a base row
    got = y.clone()
    for start, end, members in zip(segments.starts, segments.ends, segments.members, strict=True):
        for slot, weight in members:
            site = builder.dense.get((slot, 3))
            if site is None:
                continue
            v = site.a[ids[start:end]]
            bias = 0 if site.bias is None else site.bias
            want[start:end] += weight * (v @ site.b.T + bias)
            bound[start:end] += 2 * torch.finfo(dtype).eps * abs(weight) * (v.abs() @ site.b.abs().T + abs(bias))
    backend.segmented_embedding(got, ids, builder.weights(), 3, segments)
    changed = torch.tensor([row not in (6, 7, 10) for row in range(16)])
    assert ((got.double() - want).abs() <= bound)[changed].all()
    assert same_bits(got[~changed], y[~changed])


def test_a_backend_keeps_no_copy_of_weights(backend):
    """What stays in scratch after a step is views of the arena, row numbers, and the table's copy."""
    case = lora_case("distinct", "ragged", torch.bfloat16, "qkv", "mixed")
    run(backend, case)
    arena = case.weights.arena.untyped_storage().data_ptr()
    kept = [t for t in _tensors_under(case.weights.scratch) if t.dtype == case.weights.arena.dtype]
    assert all(t.untyped_storage().data_ptr() == arena for t in kept)


def test_views_of_few_slots_are_kept(backend):
    slots = 3 * MAX_SLOTS
    builder = ArenaBuilder(torch.float32, num_slots=slots + 1)
    for slot in range(1, slots + 1):
        builder.add(slot, 1, 40, 32, rank=8)
    group = SiteGroup(rows=(1,), offsets=(0,), widths=(40,), in_features=32)
    case = make_case(builder, Segments(), rows=10, group=group)
    for first in range(2, slots - 9, 9):  # slot 1 is in every step, and the longest known
        run(backend, case, plain((0, 1, 1), *[(1 + i, 2 + i, first + i) for i in range(9)]))
    assert len(_tensors_under(case.weights.scratch)) <= 3 * MAX_SLOTS
    case.segments = plain(*[(i, i + 1, 1 + i) for i in range(10)])
    assert_exact(backend, case)


def _tensors_under(root: object) -> list[torch.Tensor]:
    """Every tensor reachable from `root` through containers and plain objects."""
    seen, found, queue = set(), [], [root]
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, dict | list | tuple | set) or type(item).__module__.startswith("kernels"):
            queue.extend(gc.get_referents(item))
    return found


def valid_call() -> dict[str, object]:
    case = make_case(two_adapters(), plain((0, 2, 1), (4, 5, 2)))
    return {"y": case.y, "x": case.x, "weights": case.weights, "group": GROUP, "segments": case.segments}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(12, 31)}, "x is"),
        ({"x": torch.zeros(11, 32)}, "x is"),
        ({"x": torch.zeros(12, 32, dtype=torch.bfloat16)}, "x is"),
        ({"x": torch.zeros(32, 12).T}, "contiguous"),
        ({"y": torch.zeros(12, 64, dtype=torch.bfloat16)}, "y must be"),
        ({"y": torch.zeros(64, 12).T}, "y must be"),
        ({"y": torch.zeros(12, 63)}, "does not fit"),
        ({"group": SiteGroup((1, 8), (0, 40), (40, 24), 32)}, "does not fit"),
        ({"segments": plain((0, 2, 1), (1, 3, 2))}, "ascending"),
        ({"segments": plain((3, 2, 1))}, "ascending"),
        ({"segments": plain((0, 13, 1))}, "end at row 13"),
        ({"segments": plain((0, 1, 0))}, "no adapter"),
        ({"segments": plain((0, 1, -1))}, "slots"),
        ({"segments": plain((0, 1, 4))}, "slots"),
        ({"backend": "fpga"}, "unknown kernel backend 'fpga'; there are .*torch"),
    ],
)
def test_dispatch_refuses_what_does_not_fit(change, message):
    ops.segmented_lora(**valid_call())
    with pytest.raises(ValueError, match=message):
        ops.segmented_lora(**valid_call() | change)


def test_embedding_dispatch_checks_ids_and_row():
    builder, segments, ids = embedding_case(torch.float32)
    y, weights = torch.zeros(16, 48), builder.weights()
    ops.segmented_embedding(y, ids, weights, 3, segments, backend="reference")
    with pytest.raises(ValueError, match="ids are"):
        ops.segmented_embedding(y, ids.int(), weights, 3, segments)
    with pytest.raises(ValueError, match="row 8"):
        ops.segmented_embedding(y, ids, weights, 8, segments)
