"""How fast is every kernel on this device, against its byte floor and against others' kernels?

    python -m loadtest.gpu.kernels [--out kernels.json] [--peers DIR] [--only lora attention kv]

About 60 shapes of an 8B model. Microseconds of a call inside a graph, medians; contestants take turns. "us" is with a
cold last cache (calls rotate over sets of inputs, together three times as large), "warm" over one set again and again.

floor   bytes that must move over the copy bandwidth, or multiply-adds over the rate of a large product, both taken in
        this run; the larger
goal    floor + 2.5 us for each launch; 1.5 floors above 40 MB
cuBLAS  two or so products, for one adapter; gather: torch.bmm over gathered matrices; torch: dense
        scaled_dot_product_attention, index_copy; vLLM, SGLang: their Triton kernels (--peers, see peers.py)
CUDA    the fused CUDA C++ kernel (kernels/cuda) where it is the step's and this device has it, in place of ours; with
        programmatic dependent launch and without
lead    the fastest other's time over ours; wanted are 1.5 over vLLM and SGLang where they take over two floors, and
        0.95 over anything

Every contestant's result is compared with fp64 first; one that is wrong is not timed, and ours makes the status 1.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loadtest.gpu import fused
from loadtest.gpu.kernel_cases import OURS, Case, attention_case, attention_cases, lora_case, write_case
from loadtest.gpu.machine import Graph, Machine, in_turns
from loadtest.gpu.oracle import MAX_ERROR
from loadtest.gpu.output import Run, begin, parser
from loadtest.gpu.peers import Peer, load_peers
from loadtest.gpu.shapes import batches
from loadtest.options import count

KINDS = ("lora", "attention", "kv")
COLUMNS = (
    "case",
    "MB",
    "floor",
    "us",
    "goal",
    "met",
    "warm",
    fused.NAME,
    fused.PLAIN,
    "cuBLAS",
    "gather",
    "torch",
    "vLLM",
    "SGLang",
    "lead",
    "ahead",
)
LAUNCH_US = 2.5
LARGE_BYTES = 40e6
WARM_CALLS = 32
PEERS = ("vLLM", "SGLang")
OWN = {OURS, fused.NAME, fused.PLAIN}
MAX_ERROR_OF_ALL = 2 * MAX_ERROR[torch.bfloat16]  # others round v too, or sum in bf16


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    options = _parser().parse_args(arguments)
    run = begin("kernels", options)
    peers: dict[str, Peer] = {}
    if options.peers:
        try:
            peers = load_peers(options.peers)
        except ValueError as error:
            sys.stderr.write(f"python -m loadtest.gpu.kernels: {error}\n")
            return 2
    with torch.inference_mode():
        limits = run.machine.limits()
        for name, make in cases(run, peers):
            run.case(name, lambda make=make: measure(run.machine, make(), limits, options.rounds))
    wrong = sum(bool(OWN.intersection(row["wrong"] or ())) for row in run.rows)
    return run.finish(COLUMNS, summary(run.rows, limits), wrong)


def cases(run: Run, peers: Mapping[str, Peer]) -> Iterator[tuple[str, Callable[[], Case]]]:
    """(name, maker): a case's tensors live while it is measured."""
    machine, backend, seed, kinds = run.machine, run.options.backend, run.seed, run.options.only
    dtype = torch.float32 if run.is_tiny else torch.bfloat16
    if "lora" in kinds:
        for batch in batches(run.is_tiny):
            yield batch.name, lambda batch=batch: lora_case(machine, backend, batch, dtype, seed, peers)
    if "attention" in kinds:
        for name, requests in attention_cases(machine):
            yield (
                f"attention {name}",
                lambda name=name, requests=requests: attention_case(machine, backend, name, requests, dtype, seed),
            )
    if "kv" in kinds:
        for rows in (3,) if run.is_tiny else (32, 128, 2048):
            yield f"KV writes {rows} rows", lambda rows=rows: write_case(machine, backend, rows, dtype, seed)


def measure(machine: Machine, case: Case, limits: Mapping[str, float], rounds: int) -> dict[str, Any]:
    """One row of the table, and beside it in the JSON: errors, warm times of all, the spread of ours."""
    exact, errors, refused = case.expected(), {}, dict(case.refused)
    graphs: list[tuple[str, Graph, int]] = []
    for name, call in case.calls.items():
        try:
            errors[name] = _error(case.result(name), exact)
            if errors[name] <= MAX_ERROR_OF_ALL:
                graphs.append((name, *_over(machine, call, range(case.num_sets))))
                graphs.append((f"{name}, warm", *_over(machine, call, [0] * (WARM_CALLS if machine.is_cuda else 2))))
        except Exception as error:  # another project's code: ours is measured all the same
            if name in OWN:
                raise
            refused[name] = f"{type(error).__name__}: {error}"
    times = in_turns(machine, graphs, rounds)
    us = {name: statistics.median(one for own in found for one in own) for name, found in times.items()}
    if pair := [us.pop(name) for name in ("cuBLAS a", "cuBLAS b") if name in us]:
        us["cuBLAS"] = min(pair)
    wrong = [name for name, error in errors.items() if error > MAX_ERROR_OF_ALL]
    return figures(case, us, limits) | {
        "wrong": wrong or None,
        "errors": errors,
        "refused": refused,
        "sets": case.num_sets,
        "microseconds": us,
        "rounds of ours": [statistics.median(own) for own in times.get(OURS, [])],
    }


def figures(case: Case, us: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, Any]:
    """What the table shows of these times."""
    floor = max(case.num_bytes / limits["copy_bytes_per_s"] * 1e6, case.products / limits["multiply_adds_per_s"] * 1e6)
    goal = 1.5 * floor if case.num_bytes > LARGE_BYTES else floor + LAUNCH_US * case.launches
    own = us.get(OURS)
    cold = {name: time for name, time in us.items() if not name.endswith(", warm")}
    others = {name: time for name, time in cold.items() if name not in OWN}
    row: dict[str, Any] = {"MB": case.num_bytes / 1e6, "floor": floor, "us": own, "goal": goal}
    row |= {"met": None if own is None else own <= goal, "warm": us.get(f"{OURS}, warm")} | cold
    if own is None or not others:
        return row | {"lead": None, "ahead": None}
    peers = [others[name] for name in PEERS if name in others]
    wanted = [(min(others.values()), 0.95)]
    if peers and min(peers) > 2 * floor:
        wanted.append((min(peers), 1.5))
    is_ahead = all(time / own >= ratio for time, ratio in wanted)
    return row | {"lead": min(others.values()) / own, "ahead": is_ahead}


def summary(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float]) -> dict[str, Any]:
    """How many goals are met, and the run's limits."""

    def met(key: str) -> str:
        held = [row[key] for row in rows if row[key] is not None]
        return f"{sum(held)} of {len(held)}"

    return {
        "floor + 2.5 us a launch, or 1.5 floors": met("met"),
        "ahead of the others as wanted": met("ahead"),
        "CUDA C++": _fused(rows),
        "copy, GB/s": limits["copy_bytes_per_s"] / 1e9,
        "bf16 product, TFLOP/s": 2 * limits["multiply_adds_per_s"] / 1e12,
        "smallest launch in a graph, us": limits["launch_us"],
        "wrong results": ", ".join(f"{row['case']}: {row['wrong']}" for row in rows if row["wrong"]) or None,
        "others' errors": ", ".join(
            sorted({f"{who}: {told}"[:160] for row in rows for who, told in row["refused"].items()})
        )
        or None,
    }


def _fused(rows: Sequence[Mapping[str, Any]]) -> str:
    """The fused kernel's goals, of one launch, and what it gains over ours."""
    held = [row for row in rows if row.get(fused.NAME) is not None and row["us"] is not None]
    if not held:
        return "not measured: not on this device (see above), or no case of its kind"
    goals = [1.5 * row["floor"] if row["MB"] * 1e6 > LARGE_BYTES else row["floor"] + LAUNCH_US for row in held]
    met = sum(row[fused.NAME] <= goal for row, goal in zip(held, goals, strict=True))
    gain = statistics.median(row["us"] / row[fused.NAME] for row in held)
    return f"{met} of {len(held)} within their goal for one launch; ours over it, median {gain:.3g}"


def _over(machine: Machine, call: Callable[[int], object], sets: Sequence[int]) -> tuple[Graph, int]:
    """A graph of a call on each of these sets, and how many."""

    def run() -> None:
        for index in sets:
            call(index)

    return machine.capture(run), len(sets)


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    error = float((got.double() - exact).norm() / exact.norm())
    return error if error == error else float("inf")


def _parser() -> Any:
    made = parser("kernels", __doc__)
    made.add_argument("--peers", type=Path, help="a folder with the wheels' files of vLLM and SGLang")
    made.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    made.add_argument("--rounds", type=count, default=3)
    return made


if __name__ == "__main__":
    sys.exit(main())
