"""Every variant of the low-rank kernels compiles for sm_80 and sm_90 without a GPU, and nothing spills.

The launches are those of an 8B model's projections on an H200 and an A100: all forms, buckets of ranks
and parts of K, with sets and without, the head and the embedding.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.triton.launch import Gpu, Launch
from kernels.triton.lora import expand_launch, lora_launches
from kernels.triton.plan import RANK_BUCKETS, WARM_ROWS, DeviceSegments, bucket_of
from kernels.types import SiteGroup, SlotWeights
from tests.kernels.ahead_of_time import SHARED_BYTES, compiled

H200, A100 = Gpu(processors=132, capability=90), Gpu(processors=108, capability=80)
DTYPES = (torch.bfloat16, torch.float16)
TARGETS = list(itertools.product(DTYPES, (H200, A100)))
GROUPS = {
    "qkv": SiteGroup((0, 1, 2), (0, 4096, 5120), (4096, 1024, 1024), 4096),
    "o": SiteGroup((3,), (0,), (4096,), 4096),
    "gate-up": SiteGroup((4, 5), (0, 14336), (14336, 14336), 4096),
    "down": SiteGroup((6,), (0,), (4096,), 14336),
    "head": SiteGroup((7,), (0,), (128256,), 4096),
}
STEPS = {  # padded rows, tiles
    "one row": (1, 1),
    "few": (4, 4),
    "decode": (32, 32),
    "large decode": (128, 128),
    "prefill": (2048, 32),
    "prefill of many": (2048, 64),
    "long prefill": (16384, 300),
}


def launches(
    group: str, plan: DeviceSegments, dtype: torch.dtype, gpu: Gpu = H200, is_embedding: bool = False
) -> tuple[Launch, ...]:
    """On tensors without memory."""
    arena = torch.empty(1 << 33, dtype=dtype, device="meta")
    weights = SlotWeights(arena, torch.empty(64, 225, 5, dtype=torch.int64, device="meta"))
    geometry, rows = GROUPS[group], plan.max_rows
    y = torch.empty(rows, geometry.offsets[-1] + geometry.widths[-1], dtype=dtype, device="meta")
    if is_embedding:
        ids = torch.empty(rows, dtype=torch.int64, device="meta")
        return (expand_launch(y, ids, weights, geometry, plan, gpu, splits=0),)
    x = torch.empty(rows, geometry.in_features, dtype=dtype, device="meta")
    return lora_launches(y, x, weights, geometry, plan, gpu)


def plan_of(step: str, bucket: int, has_sets: bool = False) -> DeviceSegments:
    rows, tiles = STEPS[step]
    return DeviceSegments(rows, rows * (2 if has_sets else 1), bucket, "meta", max_tiles=tiles)


def key_of(launch: Launch) -> tuple[object, ...]:
    """What decides which compiled kernel a launch takes, apart from the divisibility of its integers."""
    return launch.kernel.fn.__name__, *launch.sizes.items(), *launch.options.items()


def variants(dtype: torch.dtype, gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    """All that the groups, the steps and the buckets give, each kernel once."""
    seen = set()
    for bucket in RANK_BUCKETS:
        for step in STEPS:
            plan = plan_of(step, bucket)
            found = [launch for group in GROUPS for launch in launches(group, plan, dtype, gpu)]
            if step in ("few", "decode", "prefill"):
                found += launches("o", plan, dtype, gpu, is_embedding=True)
                found += launches("qkv", plan_of(step, bucket, has_sets=True), dtype, gpu)
            for launch in found:
                if key_of(launch) not in seen:
                    seen.add(key_of(launch))
                    yield f"{step}, bucket {bucket}: {key_of(launch)}", launch


def code_of(launch: Launch) -> tuple[object, ...]:
    """Which lines of the kernel a variant has: variants of one code differ in counts alone."""
    sizes = launch.sizes
    is_long = sizes["BUCKET"] > sizes["BLOCK_R"]
    kind = [sizes.get(name) for name in ("PARTS", "IS_SINGLE", "HAS_SETS", "EMBEDDING", "FEW")]
    return launch.kernel.fn.__name__, *kind, is_long, sizes["BLOCK_M"], sizes["BLOCK_R"], launch.options["num_stages"]


def check(name: str, launch: Launch, dtype: torch.dtype, gpu: Gpu, folder: Path) -> None:
    made = compiled(launch, gpu.capability, folder)
    assert made.stack == 0, f"{name} spills {made.stack} bytes a thread on {gpu} in {dtype}"
    assert made.shared <= SHARED_BYTES[gpu.capability], f"{name} needs {made.shared} bytes of shared memory"
    assert launch.sizes["FEW"] or "mma" in made.ptx, f"{name} uses no tensor cores"


def test_each_code_compiles_and_spills_nothing(tmp_path):
    """One variant of each, in turns for the two architectures and dtypes."""
    codes: dict[tuple[object, ...], dict[int, tuple[str, Launch]]] = {}
    for turn, (dtype, gpu) in enumerate(TARGETS):
        for name, launch in variants(dtype, gpu):
            codes.setdefault(code_of(launch), {}).setdefault(turn, (name, launch))
    for index, made in enumerate(codes.values()):
        turn = index % len(TARGETS) if len(made) == len(TARGETS) else min(made)
        check(*made[turn], *TARGETS[turn], tmp_path)
    assert len(codes) > 30


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("dtype", "gpu"), TARGETS, ids=str)
def test_every_variant_compiles_and_spills_nothing(dtype, gpu, tmp_path):
    for name, launch in variants(dtype, gpu):
        check(name, launch, dtype, gpu, tmp_path)


@pytest.mark.parametrize(("step", "narrow"), [("one row", 2), ("decode", 1), ("prefill", 16)])
def test_weights_are_read_16_bytes_at_a_time(step, narrow, tmp_path):
    """The alignment that an image promises reaches the loads: of x, A, v and B, none is read by single elements.

    `narrow` loads of the expand are of a bias, and of y where a tile is one row.
    """
    for launch, allowed in zip(launches("qkv", plan_of(step, 16), torch.bfloat16), (0, narrow), strict=True):
        made = compiled(launch, 90, tmp_path)
        wide = made.ptx.count("ld.global.v4.b32") + made.ptx.count("cp.async.cg.shared.global")
        assert wide >= 2 and made.ptx.count("ld.global.b16") <= allowed


@settings(max_examples=200, deadline=None, database=None)
@given(st.integers(1, 8192), st.data(), st.integers(1, 200), st.sampled_from(sorted(GROUPS)))
def test_a_warm_up_covers_every_step(rows, data, rank, group):
    """No step up to the largest needs a kernel that the warm-up did not compile."""
    plan = DeviceSegments(rows, rows, bucket_of(rank), "meta", max_tiles=data.draw(st.integers(1, rows)))
    assert {key_of(launch) for launch in launches(group, plan, torch.bfloat16)} <= warm_keys(group)


@functools.cache
def warm_keys(group: str) -> set[tuple[object, ...]]:
    plans = [DeviceSegments(rows, rows, bucket, "meta") for rows in WARM_ROWS for bucket in RANK_BUCKETS]
    return {key_of(launch) for plan in plans for launch in launches(group, plan, torch.bfloat16)}
