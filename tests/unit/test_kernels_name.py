"""Our package is called `kernels`, like a Hugging Face package that transformers probes for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def in_fresh_python(code: str) -> str:
    """What `code` prints when the checkout comes first on the path."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_kernels_and_transformers_import_side_by_side():
    """transformers reads a version from our metadata or `__version__`; one in its range would make it import
    that package's names from ours. So a release number of this project must stay out of the range too."""
    code = (
        "import kernels, transformers; transformers.PreTrainedModel; "  # imports transformers' kernel integration
        "from transformers.utils.import_utils import is_kernels_available as probe; "
        "print(kernels.__file__, probe(), 'transformers.integrations.hub_kernels' in sys.modules)"
    )
    assert in_fresh_python(code) == f"{ROOT / 'kernels' / '__init__.py'} False True"


def test_kernels_has_no_version_and_imports_no_torch():
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""
    loaded = "import kernels; print(hasattr(kernels, '__version__'), 'torch' in sys.modules)"
    assert in_fresh_python(loaded) == "False False"
