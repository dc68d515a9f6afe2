"""What only a GPU can show: a captured graph of the low-rank kernels, with other plans and adapters at each replay."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.ops import backends, get_backend
from kernels.triton.plan import DeviceSegments
from kernels.types import Segments, SiteGroup, SlotWeights
from tests.kernels.builders import ArenaBuilder, LoraCase
from tests.kernels.test_lora import same_bits

pytestmark = pytest.mark.cuda

GROUP = SiteGroup(rows=(0, 1, 2), offsets=(0, 512, 640), widths=(512, 128, 128), in_features=1024)
RANKS = {16: (16, 8, 3, 1), 64: (64, 16, 40, 8)}


def adapters(bucket: int, seed: int) -> ArenaBuilder:
    """Slots 1 to 4; slot 4 lacks the second slice."""
    builder = ArenaBuilder(torch.bfloat16, num_slots=6, seed=seed)
    for slot, rank in enumerate(RANKS[bucket], 1):
        for row, width in zip(GROUP.rows, GROUP.widths, strict=True):
            if (slot, row) != (4, 1):
                builder.add(slot, row, width, GROUP.in_features, rank, bias=slot == 2)
    return builder


def random_segments(rng: random.Random, rows: int) -> Segments:
    segments, row = Segments(), 0
    while row < rows:
        end = min(row + rng.choice([1, 1, 1, 3, 40]), rows)
        if rng.random() < 0.8:
            segments.starts.append(row)
            segments.ends.append(end)
            segments.members.append(((rng.randint(1, 5), 1.0),))  # slot 5 has nothing
        row = end
    return segments


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("bucket", [16, 64])
@pytest.mark.parametrize("rows", [1, 4, 32, 128, 300])
def test_a_graph_follows_plans_and_adapters(rows, bucket, name):
    """Every replay against fp64: other segments, other adapters at the same addresses, NaN wherever nothing is due."""
    if name not in backends():
        pytest.skip("needs nvcc, or a library built elsewhere, and compute capability 8.x or 9.0 (the log says which)")
    ops, rng = get_backend(name), random.Random(rows * bucket)
    builder = adapters(bucket, seed=0)
    host = builder.weights()
    room = torch.full((len(host.arena) + 4096,), torch.nan, dtype=torch.bfloat16, device="cuda")
    weights = SlotWeights(room, host.table.cuda())
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, GROUP.in_features, generator=generator).bfloat16()
    y = torch.randn(rows, 800, generator=generator).bfloat16()
    x_there, y_there = x.cuda(), y.cuda()
    plan = DeviceSegments(rows, rows, bucket, "cuda")
    captured = Segments([0], [1], [((1, 1.0),)], {"triton": plan})

    def step() -> None:
        ops.segmented_lora(y_there, x_there, weights, GROUP, captured)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    for replay in range(12):
        if replay % 3 == 0:  # other adapters where the former were
            builder = adapters(bucket, seed=replay)
            host = builder.weights()
            room.fill_(torch.nan)
            room[: len(host.arena)] = host.arena.cuda()
            weights.table.copy_(host.table)
        segments = random_segments(rng, rows) if replay != 7 else Segments()
        plan.fill(segments)
        case = LoraCase(host, GROUP, segments, x, y.clone(), builder.dense)
        touched = case.touched()
        case.y[~touched] = torch.nan
        y_there.copy_(case.y)
        graph.replay()
        got = y_there.cpu()
        off = (got.double() - case.exact()).abs() / case.bound(rounds_v=False)
        assert not touched.any() or off[touched].max() <= 1.05, (replay, segments)
        assert same_bits(got[~touched], case.y[~touched])
