"""Parts of `multilora bench` without a server: the tables of a step, of kernels, of cold starts."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from kernels.cpu import library
from loadtest import cold
from loadtest.bench import Workload
from loadtest.kernel_cases import SHAPES, Shape, gemm_cases, head_cases, lora_cases, small_cases
from loadtest.kernels import Limits, measure, step_totals
from loadtest.steps import Outside, column, step_table
from loadtest.table import rows_table

PARTS = {"embedding": 1e-3, "GEMM": 10e-3, "adapters": 0.0, "attention": 2e-3, "small ops": 1e-3, "head": 4e-3}
TINY = Shape(2, 32, 4, 2, 16, 64, 160)


def test_a_steps_shares_add_up_to_the_whole_step():
    found = column(20e-3, Outside(all_s=3e-3, sampling_s=1e-3), PARTS)
    whole = found.pop("whole step")
    assert whole == pytest.approx(23) == pytest.approx(sum(found.values()))
    assert found["host"] == pytest.approx(2 + 2)  # outside without sampling, and Python's side of the pass
    assert (found["head and sampling"], found["small ops"]) == (pytest.approx(5), pytest.approx(2))


def test_a_step_without_the_native_pass_still_has_a_table():
    found = column(20e-3, Outside(all_s=3e-3, sampling_s=1e-3), {})
    assert (found["forward pass"], found["host"]) == (pytest.approx(20), pytest.approx(2))


def test_the_steps_table_has_both_kinds_and_their_shares():
    slow = column(40e-3, Outside(3e-3, 1e-3), PARTS | {"adapters": 20e-3})
    rows = step_table({"without": column(20e-3, Outside(3e-3, 1e-3), PARTS), "with": slow})
    assert rows["GEMM"]["without, share"] == pytest.approx(10 / 23)
    assert rows["adapters"]["with adapters, ms"] == pytest.approx(20)
    assert rows["whole step"]["with, share"] == 1


def test_a_table_shows_a_dash_where_a_row_lacks_a_column():
    console = Console(file=io.StringIO(), width=80)
    console.print(rows_table("t", {"one": {"a": 1.0}, "two": {"b": 2}}))
    lines = console.file.getvalue().splitlines()
    assert [line.split("│")[1:-1] for line in lines if "one" in line or "two" in line] == [
        [" one ", " 1 ", " - "],
        [" two ", " - ", " 2 "],
    ]


@pytest.fixture
def small_copies(monkeypatch):
    monkeypatch.setattr("loadtest.kernel_cases.COLD_BYTES", 1 << 14)
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def all_cases(native):
    yield from gemm_cases(native, "tiny", (1, 3))
    yield from head_cases(native, "tiny", (2,))
    yield from lora_cases("tiny", (1, 3), (((16, 64), 5),))
    yield from small_cases(native, "tiny", (2,))


def test_every_kernel_gets_a_row_with_both_contestants(small_copies):
    native = library()
    limits = Limits(native, _buffer=torch.ones(64 << 20, dtype=torch.uint8))
    with torch.inference_mode():
        rows = {case.name: measure(case, limits, 1) for case in all_cases(native)}
    assert len(rows) == 4 * 2 + 1 + 3 + 3
    for row in rows.values():
        assert row["native, us"] > 0 and row["torch over native"] == pytest.approx(row["torch, us"] / row["native, us"])
    assert rows["gemm tiny o 32x64, 3 rows"]["bytes, us"] > 0
    assert rows["rotary tiny, 2 rows"]["bytes, us"] is None
    assert rows["adapters tiny, 3 distinct, ranks 8/16/64, decode"]["reference, us"] > 0


def test_totals_are_sums_over_a_models_matrices(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    row = {"native, us": 3.0, "torch, us": 6.0, "bytes, us": 1.0, "products, us": 2.0}
    rows = {f"gemm tiny {name}, {n} rows": row for name in ("qkv 1x1", "o 1x1") for n in (1, 128)}
    totals = step_totals(rows, ["tiny"], [1])
    assert totals == {
        "all layers' gemm tiny, 1 rows": {
            "native, us": 12.0,
            "torch, us": 24.0,
            "bytes, us": 4.0,
            "products, us": 8.0,
            "over the bytes": 3.0,
            "over the larger": 1.5,
            "torch over native": 2.0,
        }
    }


def test_warm_rounds_ask_the_base_and_each_rank_in_turn_with_prompts_of_their_own(monkeypatch, tmp_path):
    asked = []

    def first_token(http, workload, model, seed):
        asked.append((model, seed))
        return {"total_s": {"b": 0.1, "r": 0.2}[model[0]] * (1 if "8" not in model else 2), "load_s": 0.01}

    def prepare(workload, folder, prefix):
        return [f"{prefix}-{index:03d}" for index in range(workload.num_adapters)]

    class Server:
        url = "http://server"

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(cold, "first_token", first_token)
    monkeypatch.setattr(cold, "prepare_adapters", prepare)
    monkeypatch.setattr(cold, "running_server", Server)
    found = cold.measure_cold(Workload(tmp_path, num_adapters=5, ranks=(4, 8), repeats=1), tmp_path)
    assert len({seed for _, seed in asked}) == len(asked)
    warm = asked[3 + 2 * 5 :]
    assert [name for name, _ in warm[:6]] == [
        *("base", "rank-4-000", "rank-8-000"),
        *("rank-8-001", "rank-4-001", "base"),
    ]
    table = found["first token"]
    assert [row["over the base"] for row in table.values()] == pytest.approx([1, 2, 4])
    never_seen = found["first token of an adapter never seen, ms"]
    assert never_seen["all"] == pytest.approx({"rank 4": 200.0, "rank 8": 400.0})
    assert never_seen["load_s"] == pytest.approx({"rank 4": 10.0, "rank 8": 10.0})
