"""Is every kernel right on this device?

    python -m loadtest.gpu.check [--out check.json] [--backend triton] [--seed N] [--match TEXT]

Each case runs twice with fresh random inputs against fp64 on the same values. What may not be read is NaN: gaps of the
arena, rows of no segment, columns of no slice, cache positions of nobody, and free memory before every case; what may
not be written must keep its bits. "off" is the worst element's error over what rounding allows (1 is the bound),
"error" the norm of the difference over that of the result. Then the same inside graphs: one capture, a plan of
another step before each replay. Beside Triton the fused CUDA C++ kernel is checked at the steps that are its own, where
this device has it. Ends with status 1 where anything is wrong.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kernels import ops
from kernels.types import SiteGroup
from loadtest.gpu import fused, oracle
from loadtest.gpu.adapters import Members, make_adapters
from loadtest.gpu.check_attention import (
    AttentionCase,
    AttentionRecipe,
    Requests,
    attention_case,
    attention_recipes,
    check_write,
)
from loadtest.gpu.check_lora import (
    GROUPS,
    NUM_TABLE_ROWS,
    TINY_GROUPS,
    LoraCase,
    Recipe,
    group_sites_of,
    lora_case,
    recipes,
    sets,
    short,
)
from loadtest.gpu.output import Run, begin, parser
from loadtest.gpu.plans import AttentionPlan, SegmentsPlan

COLUMNS = ("kind", "cases", "wrong", "error", "off", "kept", "same bits")
REPLAYS = 8
GRAPH_RANKS = {16: (16, 8, 5), 64: (64, 1, 24, 13), 512: (200, 512, 8)}
"""By bucket: a graph is captured for one, and serves all ranks up to it."""

Verdict = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    options = parser("check", __doc__).parse_args(arguments)
    run = begin("check", options)
    with torch.inference_mode():
        for kind, name, measure in cases(run):
            run.case(name, lambda kind=kind, measure=measure: {"kind": kind} | measure())
    each = run.rows
    wrong = [row for row in each if not row["right"]]
    run.rows, run.extra["cases"] = by_kind(each), each
    for row in wrong:
        sys.stdout.write(f"WRONG {row['case']}: error {row['error']:.2g}, off {row['off']:.3g}, kept {row['kept']}\n")
    return run.finish(COLUMNS, {"cases": len(each), "backend": options.backend}, len(wrong))


def cases(run: Run) -> Iterator[tuple[str, str, Callable[[], Verdict]]]:
    """(kind, name, check) of all, cheap and telling ones first."""
    backend, seed, machine, is_tiny = run.options.backend, run.seed, run.machine, run.is_tiny
    dtypes = (torch.float32,) if is_tiny else (torch.bfloat16, torch.float16, torch.float32)
    for rows in (3, 11) if is_tiny else (2, 32, 2048):
        for dtype in dtypes:
            name = f"write_kv, {rows} rows, {short(dtype)}"
            yield (
                "KV writes",
                name,
                lambda rows=rows, dtype=dtype: twice(
                    lambda seed: check_write(machine, backend, rows, dtype, seed), seed
                ),
            )
    for dtype in dtypes[:2]:
        for bucket in (16,) if is_tiny else GRAPH_RANKS:
            name = f"lora in a graph, ranks up to {bucket}, {short(dtype)}"
            yield (
                "adapters in a graph",
                name,
                lambda dtype=dtype, bucket=bucket: lora_graphs(run, dtype, bucket, backend),
            )
        name = f"attention in a graph, {short(dtype)}"
        yield "attention in a graph", name, lambda dtype=dtype: attention_graph(run, dtype)
    for recipe in (*recipes(is_tiny), *attention_recipes(is_tiny)):
        kind = recipe.name.split(maxsplit=1)[0].replace("lora", "adapters").rstrip(",")
        yield kind, recipe.name, lambda recipe=recipe: eager(run, recipe, backend)
    for other in fused.backends_beside(backend):
        yield from fused_cases(run, other)


def fused_cases(run: Run, backend: str) -> Iterator[tuple[str, str, Callable[[], Verdict]]]:
    """Those of `cases` that another backend computes with kernels of its own."""
    for dtype in (torch.bfloat16, torch.float16):
        for bucket in (16,) if run.is_tiny else (16, 64):
            yield (
                f"adapters in a graph, {backend}",
                f"lora in a graph by {backend}, ranks up to {bucket}, {short(dtype)}",
                lambda dtype=dtype, bucket=bucket: lora_graphs(run, dtype, bucket, backend, has_sets=False),
            )
    for recipe in recipes(run.is_tiny):
        members = recipe.who(random.Random(run.seed))
        has_sets = any(len(own) > 1 for own in members)
        if not recipe.vocab and fused.does(len(members), max(recipe.ranks), recipe.dtype, has_sets):
            name = recipe.name.replace("lora", f"lora by {backend}", 1)
            yield f"adapters, {backend}", name, lambda recipe=recipe: eager(run, recipe, backend)


def eager(run: Run, recipe: Recipe | AttentionRecipe, backend: str) -> Verdict:
    """A case as it runs outside of graphs, and once more: the same arguments give the same bits."""

    def check(seed: int) -> Verdict:
        case = recipe.make(run.machine, seed)
        expected = case.expected()
        run.machine.poison(1 << 28 if run.machine.is_cuda else None)
        got, again = case.run(backend), case.run(backend)
        found = oracle.verdict(got, case.y if isinstance(case, LoraCase) else None, expected)
        if isinstance(case, AttentionCase):
            found["right"] = bool(found["right"]) and got.is_contiguous() and got.dtype == case.q.dtype
        return found | {"same bits": oracle.same_bits(got, again)}

    return twice(check, run.seed)


def lora_graphs(run: Run, dtype: torch.dtype, bucket: int, backend: str, has_sets: bool = True) -> Verdict:
    """Two projections captured into one graph, then replayed for steps of other rows, members and inputs."""
    machine = run.machine
    rng, generator = random.Random(run.seed), torch.Generator(machine.device).manual_seed(run.seed)
    machine.poison()
    groups = [_moved(group, 3 * number) for number, group in enumerate(_graph_groups(run.is_tiny))]
    slots, rows = (4, 6) if run.is_tiny else (40, 64)
    sites = {}
    for group in groups:
        sites |= group_sites_of(group, range(1, slots + 1), GRAPH_RANKS[bucket], rng)
    adapters = make_adapters(sites, slots + 1, NUM_TABLE_ROWS, dtype, generator)
    plan = SegmentsPlan(machine, backend, rows, 3 * rows if has_sets else rows, bucket)
    held = [lora_case(group, adapters, [((1, 1.0),)] * rows, dtype, generator) for group in groups]
    plan.fill(held[0].segments)

    def step() -> None:
        for case in held:
            ops.segmented_lora(case.y, case.x, adapters.weights, case.group, plan.segments, backend)

    graph = machine.capture(step)
    verdicts = []
    for members in _changing(rng, rows, slots, 3 if run.is_tiny else REPLAYS, has_sets):
        members = members + [()] * (rows - len(members))  # padding rows belong to no segment
        made = [lora_case(group, adapters, members, dtype, generator) for group in groups]
        for case, new in zip(held, made, strict=True):
            case.y.copy_(new.y)
            case.x.copy_(new.x)
        plan.fill(made[0].segments)
        graph.replay()
        verdicts += [oracle.verdict(case.y, new.y, new.expected()) for case, new in zip(held, made, strict=True)]
    return worst(verdicts)


def attention_graph(run: Run, dtype: torch.dtype) -> Verdict:
    """KV writes and attention of decode rows, captured once, replayed for other requests in other blocks."""
    machine, backend = run.machine, run.options.backend
    rng, generator = random.Random(run.seed), torch.Generator(machine.device).manual_seed(run.seed)
    machine.poison()
    heads, size, most, longest = ((4, 2, 16), 4, 4, 30) if run.is_tiny else ((32, 8, 128), 16, 32, 2000)
    plan = AttentionPlan(machine, backend, most, longest // size + 2, size)
    shape = (most * (longest // size + 1) + 8, size, heads[1], heads[2])
    k_cache, v_cache = (torch.full(shape, torch.nan, dtype=dtype, device=machine.device) for _ in range(2))
    packed = torch.full((most, heads[0] + 2 * heads[1], heads[2]), torch.nan, dtype=dtype, device=machine.device)
    q, k, v = packed.split([heads[0], heads[1], heads[1]], 1)
    out = torch.empty(most, *q.shape[1:], dtype=dtype, device=machine.device)

    def step() -> None:
        ops.write_kv(k, v, k_cache, v_cache, plan.meta.slot_mapping, backend)
        options: dict[str, Any] = {"scale": 1.5 * heads[2] ** -0.5, "sliding_window": None, "softcap": None}
        out.copy_(ops.paged_attention(q, k_cache, v_cache, plan.meta, **options, backend=backend))

    graph = machine.capture(step)
    verdicts = []
    for _ in range(3 if run.is_tiny else REPLAYS):
        requests: Requests = [(rng.randint(1, longest), 1) for _ in range(rng.randint(1, most))]
        case = attention_case(requests, heads, dtype, size, {}, generator, most - len(requests))
        for cache, made in ((k_cache, case.k_cache), (v_cache, case.v_cache)):
            cache.fill_(torch.nan)
            cache[: len(made)] = made
            cache.view(-1, *heads[1:])[case.meta.slot_mapping] = torch.nan  # the step writes these itself
        packed[:, : heads[0]] = case.q
        for new, kept in ((k, case.keys), (v, case.values)):
            new.fill_(torch.nan)
            new[: len(kept)] = torch.stack([own[-1] for own in kept])
        out.fill_(torch.nan)
        plan.fill(case.meta)
        graph.replay()
        verdicts.append(oracle.verdict(out, None, case.expected()))
    return worst(verdicts)


def twice(check: Callable[[int], Verdict], seed: int) -> Verdict:
    """The worse of two fresh draws."""
    return worst([check(seed), check(seed + 1)])


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict of several: the largest errors, and right only if all are."""
    found: Verdict = {}
    for key in dict.fromkeys(key for verdict in verdicts for key in verdict):
        values = [verdict[key] for verdict in verdicts if key in verdict]
        found[key] = all(values) if isinstance(values[0], bool) else max(values)
    found["right"] = found["right"] and found.get("same bits", True)
    return found


def by_kind(rows: Sequence[Verdict]) -> list[Verdict]:
    """The table: one line a kind of case."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    table = []
    for kind in kinds:
        own = [row for row in rows if row["kind"] == kind]
        found = worst(
            [{key: row[key] for key in ("error", "off", "kept", "right", "same bits") if key in row} for row in own]
        )
        table.append({"kind": kind, "cases": len(own), "wrong": sum(not row["right"] for row in own)} | found)
    return table


def _changing(rng: random.Random, rows: int, slots: int, count: int, has_sets: bool) -> Iterator[list[Members]]:
    """Steps of very different sizes one after the other: a plan that isn't taken on wholly shows."""
    yield [((1 + row % slots, 1.0),) for row in range(rows)]
    yield [((slots, 1.0),)]
    yield sets(rng, rows, slots) if has_sets else [()] * rows
    for _ in range(count - 3):
        used = rng.randint(1, rows)
        own = sorted(rng.randint(0, slots) for _ in range(used))
        yield [((slot, 1.0),) if slot else () for slot in own]


def _graph_groups(is_tiny: bool) -> list[SiteGroup]:
    return [TINY_GROUPS["qkv"]] if is_tiny else [GROUPS["qkv"], GROUPS["down"]]


def _moved(group: SiteGroup, first: int) -> SiteGroup:
    """The same with table rows from `first` on."""
    rows = tuple(first + number for number in range(len(group.rows)))
    return SiteGroup(rows, group.offsets, group.widths, group.in_features)


if __name__ == "__main__":
    sys.exit(main())
