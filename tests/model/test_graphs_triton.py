"""Graphs over the Triton kernels themselves, in Triton's interpreter (in a child: it is chosen before the import)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_kernels_read_the_buffers_that_graphs_refill(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.triton_graph_child", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0 and "right" in done.stdout, done.stdout + done.stderr
