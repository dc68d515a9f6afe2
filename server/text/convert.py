"""The tokenizer as transformers loads it, in a form that `tokenizers` alone reads.

A tokenizer.json is read as it is where transformers does so too. For many classes (LlamaTokenizer,
GemmaTokenizer, Qwen2Tokenizer, ...) transformers takes the vocabulary alone from it and builds the rest
itself, with other answers for some texts; and some bases have no such file. There, transformers loads the
tokenizer once in a child process and saves it into the cache:

    python -m server.text.convert MODEL_DIR TARGET_DIR

Only the child imports transformers; it ends before the server starts to serve.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from server.errors import ConfigError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_TIMEOUT_S = 600
_VOCABULARIES = (TOKENIZER_FILE, "vocab*", "*.model", "*.tiktoken", "tekken.json")  # what one can be made from
_SOURCES = (*_VOCABULARIES, "*token*", "merges*", "chat_template.jinja", "config.json")  # the cache key covers these
_CHECKOUT = Path(__file__).resolve().parents[2]

# Classes for which transformers reads tokenizer.json as it is, except for bases of these types, where it
# overrides the declared class (AutoTokenizer, MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS).
_VERBATIM_CLASSES = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})
_REBUILT_TYPES = frozenset(
    {
        "hyperclovax_vision_v2",
        "qwen2",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen4_exp",
        "siglip2",
    }
)

logger = logging.getLogger(__name__)


class _ConversionFailed(Exception):
    """The child made no tokenizer; the message is its last word."""


def ensure_tokenizer(model_dir: Path, cache_dir: Path) -> Path:
    """The folder to read the tokenizer from: the base's own, or a converted copy under `cache_dir`.

    A file that transformers can't load is used as it is, with a warning. Raises ConfigError, with what
    transformers said, when there is no file either.
    """
    if _is_verbatim(model_dir):
        return model_dir
    if not any(path.is_file() for pattern in _VOCABULARIES for path in model_dir.glob(pattern)):
        raise ConfigError(f"{model_dir} has no {TOKENIZER_FILE}, and no vocabulary to make one from")
    target = cache_dir / "tokenizers" / _source_key(model_dir)
    if (target / TOKENIZER_FILE).is_file():
        return target
    try:
        _convert_in_child(model_dir, target)
    except _ConversionFailed as error:
        if not (model_dir / TOKENIZER_FILE).is_file():
            raise ConfigError(f"{model_dir} has no {TOKENIZER_FILE}, and none can be made: {error}") from error
        logger.warning("%s: %s is used as it is; transformers can't load it: %s", model_dir, TOKENIZER_FILE, error)
        return model_dir
    return target


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; an empty one if there is no such file. Raises ConfigError."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return content


def _is_verbatim(model_dir: Path) -> bool:
    """Whether transformers would read the base's tokenizer.json as it is."""
    declared = read_json_object(model_dir / TOKENIZER_CONFIG_FILE).get("tokenizer_class")
    model_type = read_json_object(model_dir / "config.json").get("model_type")
    return (model_dir / TOKENIZER_FILE).is_file() and declared in _VERBATIM_CLASSES and model_type not in _REBUILT_TYPES


def _source_key(model_dir: Path) -> str:
    digest = hashlib.sha256(f"transformers {version('transformers')}\n".encode())
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
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment)
        except subprocess.CalledProcessError as error:
            raise _ConversionFailed(*(error.stderr.strip().splitlines()[-1:] or ["no reason given"])) from error
        except subprocess.TimeoutExpired as error:
            raise _ConversionFailed(f"it took over {_TIMEOUT_S} s") from error
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
