"""The Triton low-rank kernels under Triton's interpreter, in a process of its own: it is on for all kernels or none.

What runs there is triton_child.py, and test_lora_edges.py with the backend "triton".
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = "views_of_few_slots or keeps_no_copy or gathers"  # about the torch backend's own caches and batches


def interpreted(folder: Path, *selection: str, timeout: int) -> int:
    """Run tests in a process that interprets kernels; how many there were. All must pass, none be skipped."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *selection]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    suite = next(ElementTree.parse(report).iter("testsuite"))
    assert suite.attrib["skipped"] == "0"
    return int(suite.attrib["tests"])


@pytest.mark.timeout(900)  # half a minute on a free processor
def test_the_kernels_promises(tmp_path):
    assert interpreted(tmp_path, "tests/kernels/triton_child.py", timeout=850) > 50


@pytest.mark.timeout(900)
def test_the_edges_of_every_backend(tmp_path):
    selection = ("-k", f"triton and not ({LEFT_OUT})", "tests/kernels/test_lora_edges.py")
    assert interpreted(tmp_path, *selection, timeout=850) > 25


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_suite_of_backends(tmp_path):
    selection = ("-k", "triton", "tests/kernels/test_lora.py", "tests/kernels/test_lora_edges.py")
    assert interpreted(tmp_path, *selection, timeout=3500) > 200


def test_without_triton_the_rest_imports_and_the_backend_is_not_there():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import kernels.triton, kernels.triton.plan, server.cli\n"
        "from kernels.ops import backends, get_backend\n"
        "assert 'triton' not in backends()\n"
        "try: get_backend('triton')\n"
        "except ValueError as error: assert 'triton' in str(error)\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)
