"""loadtest.gpu on the CPU, at tiny shapes: what is right passes, what is wrong is seen, and all is said."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import ops, torch_backend
from loadtest.gpu import check, fused, kernels, output, peers, steps
from loadtest.gpu.adapters import segments_of, spread
from loadtest.gpu.check_attention import attention_recipes
from loadtest.gpu.check_lora import recipes
from loadtest.gpu.contestants import Stacks
from loadtest.gpu.kernel_cases import Case
from loadtest.gpu.shapes import LLAMA_8B, batches
from tests.loadtest.broken_kernels import FAULTS, _nothing, _raises, register

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"check": check, "kernels": kernels, "steps": steps}
KEYS = {"script", "date", "machine", "options", "wrong", "failed", "not_run", "summary", "rows"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """What the scripts set is put back; Triton, if it comes into this process, is not interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(script, tmp_path, *arguments, backend="torch", seed=7):
    """The status and the JSON."""
    out = tmp_path / "found.json"
    status = SCRIPTS[script].main(["--tiny", "--backend", backend, "--seed", str(seed), "--out", str(out), *arguments])
    return status, json.loads(out.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_right_backend_passes_and_the_table_comes_last(script, tmp_path, capsys):
    status, found = run(script, tmp_path, *(["--only", "decode", "prefill"] if script == "steps" else []))
    assert (status, found["wrong"], found["failed"], found["not_run"]) == (0, 0, [], [])
    assert found.keys() >= KEYS and found["script"] == script and found["rows"]
    text = capsys.readouterr().out
    columns = {"check": check.COLUMNS, "kernels": kernels.COLUMNS, "steps": steps.COLUMNS}[script]
    lines = text.splitlines()
    header = next(number for number, line in enumerate(lines) if line.split()[:1] == [columns[0]])
    shown = [line.rstrip() for line in lines[header + 1 : header + 1 + len(found["rows"])]]
    assert all(line.startswith(str(row[columns[0]])) for line, row in zip(shown, found["rows"], strict=True))
    assert lines[-1] == f"{script}: 0 wrong, 0 failed, seed 7"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_sees_a_wrong_kernel(fault, tmp_path, capsys, monkeypatch):
    faulty, kinds = FAULTS[fault]
    status, found = run("check", tmp_path, backend=register(monkeypatch, **faulty))
    assert status == 1 and not found["failed"]
    assert {row["kind"] for row in found["cases"] if not row["right"]} == kinds
    assert found["wrong"] == sum(row["wrong"] for row in found["rows"])
    assert capsys.readouterr().out.count("WRONG ") == found["wrong"]


def test_a_wrong_kernel_has_no_time_and_fails_the_kernels_run(tmp_path, monkeypatch):
    faulty, _ = FAULTS["nothing"]
    status, found = run("kernels", tmp_path, "--only", "lora", backend=register(monkeypatch, **faulty))
    assert status == 1 and found["wrong"] == len(found["rows"]) > 0
    for row in found["rows"]:
        assert row["us"] is None and row["met"] is None and row["wrong"] == ["ours"] and row["gather"] > 0


@pytest.fixture
def beside(monkeypatch):
    """A stand-in for the fused kernel, as if this machine had it: torch's, or what is given."""

    def use(lora=torch_backend.segmented_lora):
        monkeypatch.setattr(fused, "contestants", lambda backend: {fused.NAME: lora, fused.PLAIN: lora})
        monkeypatch.setattr(fused, "does", lambda *step: not any(step[3:]))
        monkeypatch.setattr(fused, "backends_beside", lambda backend: [register(monkeypatch, segmented_lora=lora)])

    return use


def test_the_fused_kernel_is_timed_beside_ours_where_it_is_there(tmp_path, beside):
    _, without = run("kernels", tmp_path, "--only", "lora", "--rounds", "1")
    assert "not measured" in without["summary"]["CUDA C++"] and fused.NAME not in without["rows"][0]
    beside()
    status, found = run("kernels", tmp_path, "--only", "lora", "--rounds", "1")
    assert status == 0 and all(row[fused.NAME] > 0 < row[fused.PLAIN] for row in found["rows"])
    assert f"of {len(found['rows'])} within" in found["summary"]["CUDA C++"]
    assert all(row["lead"] == pytest.approx(row["gather"] / row["us"]) for row in found["rows"] if "cuBLAS" not in row)
    beside(_nothing)
    status, found = run("kernels", tmp_path, "--only", "lora", "--rounds", "1")
    assert status == 1 and found["wrong"] == len(found["rows"])
    assert all(row["wrong"] == [fused.NAME, fused.PLAIN] and row["us"] > 0 for row in found["rows"])


def test_the_fused_kernel_is_checked_beside_ours_where_it_is_there(tmp_path, beside):
    beside()
    status, found = run("check", tmp_path)
    kinds = {row["kind"].partition(", ")[0] for row in found["cases"] if "," in row["kind"]}
    assert status == 0 and kinds == {"adapters", "adapters in a graph"}
    beside(_nothing)
    status, found = run("check", tmp_path)
    wrong = {row["kind"] for row in found["cases"] if not row["right"]}
    assert status == 1 and len(wrong) == 2 and all("," in kind for kind in wrong)


def test_steps_with_the_fused_kernel_are_lines_of_their_own(tmp_path, beside):
    beside()
    status, found = run("steps", tmp_path, "--only", "decode")
    named = [row["case"] for row in found["rows"]]
    assert status == 0 and "decode 2, 2, rank 16" in named
    assert [name for name in named if "CUDA" in name][:2] == ["decode 2, 2, rank 16, CUDA", "decode 2, 2, ragged, CUDA"]


def test_isolation_sees_a_wrong_kernel_and_its_own_faults(tmp_path, monkeypatch):
    status, found = run("steps", tmp_path, "--only", "isolation")
    storms = found["isolation"]
    assert status == 0 and storms["none"]["rows checked"] > 50 and storms["none"]["evictions"] > 10
    assert storms["none"]["wrong"] == 0 < min(storms["refs"]["wrong"], storms["plan"]["wrong"])
    assert storms["none"]["largest error"] < 1e-5 < 1e-2 < storms["none"]["smallest error of another adapter"]
    faulty, _ = FAULTS["neighbour"]
    status, found = run("steps", tmp_path, "--only", "isolation", backend=register(monkeypatch, **faulty))
    assert status == 1 and found["isolation"]["none"]["wrong"] > 0


def test_the_fused_kernel_goes_through_the_isolation_storm_too(tmp_path, beside):
    for lora, is_wrong in ((torch_backend.segmented_lora, False), (_nothing, True)):
        beside(lora)
        status, found = run("steps", tmp_path, "--only", "isolation")
        (other,) = found["isolation"].keys() - {"none", "refs", "plan"}
        assert found["isolation"][other]["rows checked"] > 50 and found["isolation"]["none"]["wrong"] == 0
        assert (status, found["isolation"][other]["wrong"] > 0) == (int(is_wrong), is_wrong)


def test_a_fault_that_goes_unseen_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "measure_isolation", lambda *arguments: {"wrong": int(arguments[-1] == "plan")})
    status, found = run("steps", tmp_path, "--only", "isolation")
    assert status == 1 and found["wrong"] == 1


def test_a_case_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    status, found = run("check", tmp_path, backend=register(monkeypatch, segmented_embedding=_raises))
    assert status == 1 and [failure["error"] for failure in found["failed"]] == ["RuntimeError: no such image"]
    assert {row["kind"] for row in found["rows"]} >= {"adapters", "attention", "KV writes"}
    assert "FAILED embedding" in capsys.readouterr().out


def test_only_what_is_asked_for_runs(tmp_path):
    status, found = run("check", tmp_path, "--match", "embedding", "write_kv, 3")
    assert status == 0 and [row["kind"] for row in found["cases"]] == ["KV writes", "embedding"]


def test_what_no_time_is_left_for_is_named(tmp_path, capsys):
    status, found = run("check", tmp_path, "--seconds", "1e-9")
    assert status == 1 and not found["rows"] and len(found["not_run"]) > 10
    assert "not run, no time left: write_kv" in capsys.readouterr().out


def test_without_a_gpu_only_tiny_runs(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for script in SCRIPTS.values():
        with pytest.raises(SystemExit) as ended:
            script.main([])
        assert ended.value.code == 2 and "--tiny" in capsys.readouterr().err


def test_the_checks_cases_cover_all_pairs():
    loras = [recipe for recipe in recipes(False) if not recipe.vocab]
    attentions = list(attention_recipes(False))
    named = [recipe.name for recipe in (*loras, *attentions)]
    assert len(set(named)) == len(named)
    factors = [[recipe.name.split(", ranks")[0], recipe.group, recipe.ranks, recipe.dtype] for recipe in loras]
    for row in factors:
        row[0] = row[0].partition(", ")[2]  # who is in the batch
    others = [[recipe.dtype, recipe.heads, str(recipe.options)] for recipe in attentions]
    for table, sizes in ((factors, (9, 5, 4, 3)), (others, (3, 6, 4))):
        for (i, m), (j, n) in itertools.combinations(enumerate(sizes), 2):
            assert len({(row[i], row[j]) for row in table}) == m * n


LIMITS = {"copy_bytes_per_s": 4e12, "multiply_adds_per_s": 4e14, "launch_us": 1.0}


def case(num_bytes, products=0):
    return Case("c", num_bytes, products, 2, 1, {}, lambda: torch.zeros(1), lambda name: torch.zeros(1))


@pytest.mark.parametrize(
    ("num_bytes", "us", "floor", "goal", "met", "lead", "ahead"),
    [
        (4e6, {"ours": 6.0}, 1, 6, True, None, None),  # two launches of 2.5 on top
        (80e6, {"ours": 30.5}, 20, 30, False, None, None),  # above 40 MB: half as much again
        (4e6, {"ours": 4.0, "cuBLAS": 4.0}, 1, 6, True, 1.0, True),  # nobody's equal has to be beaten
        (4e6, {"ours": 4.0, "cuBLAS": 3.0, "ours, warm": 1.0}, 1, 6, True, 0.75, False),
        (4e6, {"ours": 4.0, "vLLM": 5.0}, 1, 6, True, 1.25, False),  # a slow peer is to be beaten by half
        (4e6, {"ours": 4.0, "vLLM": 6.0, "SGLang": 7.0}, 1, 6, True, 1.5, True),
        (8e6, {"ours": 4.0, "vLLM": 4.0, "gather": 9.0}, 2, 7, True, 1.0, True),  # a peer within two floors is not
    ],
)
def test_goals(num_bytes, us, floor, goal, met, lead, ahead):
    row = kernels.figures(case(num_bytes), us, LIMITS)
    assert (row["floor"], row["goal"]) == (pytest.approx(floor), pytest.approx(goal))
    assert (row["met"], row["ahead"]) == (met, ahead) and row["lead"] == (lead and pytest.approx(lead))


def test_the_floor_is_the_larger_of_bytes_and_products():
    assert kernels.figures(case(4e6, products=8e9), {"ours": 1.0}, LIMITS)["floor"] == pytest.approx(20)


def test_bytes_of_a_batch_are_each_adapter_once_and_each_row_once():
    by_name = {batch.name: batch for batch in batches(False)}
    assert 48 <= len(by_name) <= 60 and len(by_name) == len(list(batches(False)))
    batch = by_name["qkv 32 rows of 8, rank 16"]
    weights, rows = 8 * 16 * (3 * 4096 + 6144), 32 * (4096 + 2 * 6144)
    assert batch.num_bytes(LLAMA_8B, 2) == 2 * (weights + rows)
    assert batch.products(LLAMA_8B) == 32 * 16 * (3 * 4096 + 6144)


@pytest.mark.parametrize(("rows", "distinct"), [(1, 1), (32, 1), (33, 8), (32, 32), (2048, 32)])
def test_rows_are_spread_in_equal_runs(rows, distinct):
    segments = segments_of(spread(rows, distinct))
    assert segments.members == [((slot, 1.0),) for slot in range(1, distinct + 1)]
    assert segments.starts == [0, *segments.ends[:-1]] and segments.ends[-1] == rows
    lengths = [end - start for start, end in zip(segments.starts, segments.ends, strict=True)]
    assert max(lengths) - min(lengths) <= 1


VLLM = {
    "utils.py": "_LORA_A_PTR_DICT, _LORA_B_PTR_DICT = {}, {}\n",
    "lora_kernel_metadata.py": """
class LoRAKernelMeta:
    @staticmethod
    def make(max_loras, max_num_tokens, device):
        return LoRAKernelMeta()
    def prepare_tensors(self, mapping):
        self.mapping = mapping
    def meta_args(self, tokens, specialize):
        return (self.mapping[:tokens],)
""",
    "lora_shrink_op.py": """
import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.triton_utils import tl, triton
from vllm.utils.torch_utils import direct_register_custom_op
init_logger(__name__).warning_once("x" if envs.VLLM_BATCH_INVARIANT else "y")
def lora_shrink(x, a, v, owners, scale):
    for i, part in enumerate(a):
        v[i] = scale * torch.einsum("trk,tk->tr", part[owners].float(), x.float())
""",
    "lora_expand_op.py": """
import torch
def lora_expand(v, b, y, owners, offset_start, add_inputs):
    assert add_inputs
    for one, part in zip(v, b):
        y[:, offset_start : offset_start + part.shape[1]] += torch.einsum("tnr,tr->tn", part[owners].float(), one)
        offset_start += part.shape[1]
""",
}
SGLANG = {
    "chunked_sgmv_shrink.py": """
import torch
from sglang.srt.environ import envs
from sglang.srt.lora.utils import LoRABatchInfo
from sglang.srt.utils import cached_triton_kernel
def segments(info):
    for s, adapter in enumerate(info.weight_indices.tolist()):
        rows = info.permutation[info.seg_indptr[s] : info.seg_indptr[s + 1]].long()
        assert len(rows) <= info.max_len
        yield rows, adapter, int(info.lora_ranks[adapter])
def chunked_sgmv_lora_shrink_forward(x, weights, info, num_slices):
    v = torch.full((len(x), weights.shape[1]), torch.nan)
    for rows, adapter, rank in segments(info):
        v[rows, : num_slices * rank] = x[rows] @ weights[adapter, : num_slices * rank].T
    return v
""",
    "chunked_sgmv_expand.py": """
from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import segments
def chunked_sgmv_lora_expand_forward(x, weights, info, offsets, widest, y, slice_offsets_cpu):
    ends = slice_offsets_cpu.tolist()
    for rows, adapter, rank in segments(info):
        for i, (lo, hi) in enumerate(zip(ends, ends[1:])):
            y[rows, lo:hi] += x[rows, i * rank : (i + 1) * rank] @ weights[adapter, lo:hi, :rank].T
""",
}


@pytest.fixture
def peers_folder(tmp_path):
    """Plain stand-ins with the names, arguments and layouts of vLLM's and SGLang's kernels."""
    before = set(sys.modules)
    for folder, files in (("vllm/lora/ops/triton_ops", VLLM), ("sglang/kernels/ops/lora/dense", SGLANG)):
        (tmp_path / folder).mkdir(parents=True)
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("vllm", "sglang"):
            del sys.modules[name]


def test_peers_are_given_what_their_kernels_read(peers_folder, tmp_path):
    status, found = run("kernels", tmp_path, "--only", "lora", "--peers", str(peers_folder))
    assert status == 0 and len(found["rows"]) == 3
    for row in found["rows"]:
        assert row["wrong"] is None and row["vLLM"] > 0 and row["SGLang"] > 0
        assert max(row["errors"].values()) < 1e-6 and row["errors"].keys() >= {"ours", "gather", "vLLM", "SGLang"}


def test_a_peer_that_fails_costs_only_itself(peers_folder, tmp_path, capsys):
    (peers_folder / "vllm/lora/ops/triton_ops/lora_expand_op.py").write_text(
        "def lora_expand(*a, **b): raise OSError(1)"
    )
    status, found = run("kernels", tmp_path, "--only", "lora", "--peers", str(peers_folder))
    assert status == 0 and all(row["us"] > 0 and row["SGLang"] > 0 and "vLLM" not in row for row in found["rows"])
    assert "others' errors: vLLM: OSError: 1" in capsys.readouterr().out


def test_long_runs_are_chunked_for_sglang():
    owners = [0] * 200 + [1] * 100
    stacks = Stacks([torch.zeros(2, 8, 4)], [torch.zeros(2, 6, 8)], [8, 3], owners, [0, 6])
    info = peers._BatchInfo.make(stacks, torch.device("cpu"))
    assert info.seg_indptr.tolist() == [0, 128, 200, 300] and info.weight_indices.tolist() == [0, 0, 1]


def test_a_folder_without_peers_is_refused(tmp_path, capsys):
    assert kernels.main(["--tiny", "--backend", "torch", "--peers", str(tmp_path)]) == 2
    assert "vllm/lora/ops/triton_ops" in capsys.readouterr().err


def test_a_table_is_aligned_and_has_a_dash_where_nothing_is():
    text = output.table(
        [{"case": "a", "us": 1234.5, "met": False}, {"case": "long name", "us": 0.01234}], ("case", "us", "met")
    )
    assert text.splitlines() == ["case           us  met", "a            1234   NO", "long name  0.0123    -"]


def test_the_scripts_run_with_the_gpus_backend():
    """Triton in its interpreter where the backend is there; and the small kernels against torch's ops."""
    backend = "triton" if "triton" in ops.MODULES else "torch"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, backend],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


CHILD = """
import sys
from dataclasses import replace
from loadtest.gpu import check, kernels, steps
tiny = ["--tiny", "--seed", "3", "--backend", sys.argv[1]]
assert check.main([*tiny, "--match", "in a graph", "write_kv, 3", "gaps, 3 rows", "embedding"]) == 0
assert kernels.main([*tiny, "--rounds", "1", "--match", "rows of 1", "KV writes"]) == 0
short = steps.TINY_ISOLATION
steps.TINY_ISOLATION = replace(short, shape=replace(short.shape, layers=1), num_steps=4)
assert steps.main([*tiny, "--only", "isolation", "--match", "fault none"]) == 0
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"server", "adapters_store", "msgspec", "fastapi", "transformers"}, "a bare GPU machine lacks them"

import torch
from loadtest.gpu.small import TorchOps, rope_angles
from loadtest.gpu.small_triton import TritonOps
one, other, angles = TorchOps(), TritonOps(), rope_angles(9, 20, torch.device("cpu"))
x, y, weight = torch.randn(3, 70), torch.randn(3, 70), torch.randn(70)
for added in (y, None):
    kept = [x.clone(), x.clone()]
    normed = [ops.add_norm(held, added, weight) for ops, held in zip((one, other), kept)]
    torch.testing.assert_close(*normed)
    torch.testing.assert_close(*kept)
packed, positions = torch.randn(3, 5, 20), torch.tensor([8, 0, 3])
turned = [packed.clone(), packed.clone()]
for ops, held in zip((one, other), turned):
    ops.rope(held[:, :4], positions, angles)
torch.testing.assert_close(*turned)
assert not torch.equal(turned[0][:, :4], packed[:, :4]) and torch.equal(turned[1][:, 4], packed[:, 4])
torch.testing.assert_close(one.swiglu(x), other.swiglu(x))
"""


def test_the_small_kernels_compile_for_gpus(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from loadtest.gpu import small_triton as small
pointer, whole, real = "*bf16", "i32", "fp32"
kernels = (
    (small._add_norm, dict.fromkeys(("residual", "x", "weight", "out"), pointer) | {"hidden": whole, "eps": real},
     {"ADDS": True, "BLOCK": 4096}),
    (small._rope, {"heads": pointer, "positions": "*i64", "angles": "*fp32"}
     | dict.fromkeys(("row_stride", "head_stride"), whole), {"HALF": 64, "BLOCK": 64}),
    (small._swiglu, {"gate_up": pointer, "out": pointer, "width": whole}, {"BLOCK": 1024}),
)
for kernel, signature, constants in kernels:
    signature = signature | dict.fromkeys(constants, "constexpr")
    made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert made.asm["cubin"]
"""
