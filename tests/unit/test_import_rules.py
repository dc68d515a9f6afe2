"""The arrows of docs/architecture.md, checked on the source: who may import whom, and who stays torch-free."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Prefixes a package may not import.
FORBIDDEN = {
    "adapters_store": ("server", "loadtest", "kernels"),
    "kernels": ("server", "adapters_store", "loadtest"),
    "server/api": (
        "server.model",
        "server.adapters",
        "server.engine.core",
        "server.engine.scheduler",
        "kernels",
    ),
    "server/text": ("server.model", "server.adapters", "server.engine", "server.api", "kernels"),
    "server/engine": ("server.api", "server.text"),
    "server/model": ("server.api", "server.text", "server.engine.core", "server.engine.scheduler"),
    "server/adapters": ("server.api", "server.text", "server.model"),
    "loadtest": (),
}

TORCH_FREE = (
    "adapters_store.worker",
    "adapters_store.store",
    "adapters_store.catalog",
    "adapters_store.disk",
    "server.engine.scheduler",
    "server.engine.blocks",
    "server.engine.request",
    "server.engine.messages",
    "server.engine.batch",
    "server.engine.client",
    "server.engine.transport",
    "server.engine.streams",
    "server.engine.process",
    "server.engine.loop",
    "server.engine.inproc",
    "server.adapters.slots",
    "server.api.app",
    "server.text.tokenizer",
    "server.cli",
    "server.launch",
)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows_never_go_back(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imports_of(path)
        if any(name == prefix or name.startswith(prefix + ".") for prefix in FORBIDDEN[package])
    ]
    assert not wrong


def test_torch_stays_out_of_the_api_process_and_the_pure_modules():
    lines = "\n".join(
        f"import {name}; heavy = [m for m in ('torch', 'transformers') if m in sys.modules]; "
        f"assert not heavy, ({name!r}, heavy)"
        for name in TORCH_FREE
    )
    subprocess.run([sys.executable, "-c", "import sys\n" + lines], check=True, cwd=ROOT, timeout=120)
