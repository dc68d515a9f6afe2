"""What an engine process imports: triton only where its kernels are asked for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.zoo import tiny_base

ROOT = Path(__file__).resolve().parents[2]

CHILD = """
import sys
from server.engine.messages import AddRequest, SamplingParams
from server.engine.start import build_core

params = SamplingParams(max_tokens=3, temperature=1.0, top_p=0.5, ignore_eos=True)
core = build_core(sys.argv[1].encode())
core.add(AddRequest(request_id="r", prompt_ids=[5, 6, 7], params=params))
while core.has_work():
    core.step()
core.close()
print("triton:", sum(name.split(".")[0] == "triton" and module is not None for name, module in sys.modules.items()))
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_triton_is_imported_where_it_is_asked_for_alone(backend: str, tmp_path: Path) -> None:
    """Where it isn't installed this says so of the two that need none of it."""
    base = tiny_base(tmp_path / "base", "llama", num_hidden_layers=1)
    config = {
        "model": str(base), "cache_dir": str(tmp_path), "adapter_memory": 1 << 20, "kv_memory": 1 << 20, "threads": 1,
        "max_num_seqs": 2, "max_step_tokens": 4, "max_lora_rank": 8, "enforce_eager": True, "backend": backend,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(config)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        assert done.returncode != 0 and "--backend triton" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert ("triton: 0" in done.stdout) == (backend != "triton"), done.stdout
