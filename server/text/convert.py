"""A base without tokenizer.json: transformers makes one in a child process, once, into the cache.

    python -m server.text.convert MODEL_DIR TARGET_DIR      (the child)

Only the child imports transformers; it ends before the server starts to serve.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from server.errors import ConfigError

TOKENIZER_FILE = "tokenizer.json"
_TIMEOUT_S = 600
# What a tokenizer can be made of, and what changes it; the cache key covers these files.
_SOURCES = ("*token*", "vocab*", "merges*", "*.model", "*.tiktoken", "chat_template.jinja", "config.json")
_CHECKOUT = Path(__file__).resolve().parents[2]


def ensure_tokenizer_json(model_dir: Path, cache_dir: Path) -> Path:
    """The folder to read the tokenizer from: the base's own, or a converted copy under `cache_dir`.

    Raises ConfigError, with what transformers said, when there is nothing to convert.
    """
    if (model_dir / TOKENIZER_FILE).is_file():
        return model_dir
    target = cache_dir / "tokenizers" / _source_key(model_dir)
    if not (target / TOKENIZER_FILE).is_file():
        _convert_in_child(model_dir, target)
    return target


def _source_key(model_dir: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _SOURCES for path in model_dir.glob(pattern) if path.is_file()}):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _convert_in_child(model_dir: Path, target: Path) -> None:
    """Convert into a scratch folder and rename it to `target`, so that it is never half there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
        made = Path(scratch) / "tokenizer"
        command = [sys.executable, "-m", "server.text.convert", str(model_dir.resolve()), str(made)]
        environment = {**os.environ, "PYTHONPATH": str(_CHECKOUT), "HF_HUB_OFFLINE": "1"}
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment
            )
        except subprocess.CalledProcessError as error:
            reason = error.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise ConfigError(
                f"{model_dir} has no {TOKENIZER_FILE}, and none can be made: {reason[0]}"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise ConfigError(f"{model_dir}: making {TOKENIZER_FILE} took over {_TIMEOUT_S} s") from error
        _publish(made, target)


def _publish(made: Path, target: Path) -> None:
    """Rename into place; what another process put there meanwhile is as good."""
    try:
        made.rename(target)
    except OSError:
        if not (target / TOKENIZER_FILE).is_file():
            raise


def main(model_dir: str, target_dir: str) -> None:
    """What the child does."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(model_dir).save_pretrained(target_dir)
    if not (Path(target_dir) / TOKENIZER_FILE).is_file():
        sys.exit("transformers has no fast tokenizer for it")


if __name__ == "__main__":
    main(*sys.argv[1:])
