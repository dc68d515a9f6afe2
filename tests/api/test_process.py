"""The API process stays small: no torch, no transformers, little memory."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import server.api
import server.text

ROOT = Path(__file__).resolve().parents[2]
MAX_RSS_MIB = 300
MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (server.api, server.text)
    for module in pkgutil.iter_modules(package.__path__)
] + ["server.metrics"]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_torch_and_no_transformers():
    imports = "\n".join(f"import {name}" for name in MODULES)
    heavy = "{'torch', 'transformers', 'peft', 'safetensors.torch'}"
    assert run(f"import sys\n{imports}\nprint(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_the_process_is_small(model_dir):
    code = f"""
from pathlib import Path
import uvicorn
from server.api.app import create_app
from server.text.tokenizer import BaseTokenizer
tokenizer = BaseTokenizer(Path({str(model_dir)!r}))
for line in open("/proc/self/status"):
    if line.startswith("VmRSS"):
        print(int(line.split()[1]) // 1024)
"""
    rss_mib = int(run(code))
    assert rss_mib < MAX_RSS_MIB
