"""The demo's promise, checked with PEFT as it is: every adapter does what the base alone does not."""

import json

import pytest

from deploy.demo.evaluate import DemoModel
from deploy.demo.scoring import accuracy, read_heldout
from deploy.demo.tasks import TASKS
from server.demo import demo_adapters_dir, ensure_demo_base

NUM_PROMPTS = 12
MIN_ADAPTER = 0.5  # RESULTS.json has 0.82 or more on 60 prompts; these 12 give 0.75 or more on one CPU
MAX_BASE = 0.1  # RESULTS.json has 0


@pytest.fixture(scope="module")
def demo():
    return DemoModel(ensure_demo_base(), demo_adapters_dir(), list(TASKS))


@pytest.mark.parametrize("name", list(TASKS))
def test_an_adapter_does_what_the_base_does_not(demo, name):
    examples = [example for example in read_heldout() if example.task == name][:NUM_PROMPTS]
    prompts = [example.prompt for example in examples]
    assert accuracy(examples, demo.answers(prompts, name)) >= MIN_ADAPTER
    assert accuracy(examples, demo.answers(prompts, None)) <= MAX_BASE


def test_the_base_is_an_ordinary_instruct_model(demo):
    """Vocabulary, tied embeddings, chat template and end mark are what the server takes them for."""
    config = json.loads((ensure_demo_base() / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"], config["eos_token_id"]) == (49152, True, 2)
    assert demo.tokenizer.eos_token == "<|im_end|>"
    assert "Paris" in demo.answers(["What is the capital of France?"], None, max_new_tokens=16)[0]


def test_the_adapters_are_small_and_say_nothing_of_the_machine():
    num_bytes = [path.stat().st_size for path in demo_adapters_dir().glob("*/adapter_model.safetensors")]
    assert max(num_bytes) <= 10e6
    assert sum(num_bytes) <= 25e6
    for path in demo_adapters_dir().glob("*/adapter_config.json"):
        assert json.loads(path.read_text())["base_model_name_or_path"].startswith("HuggingFaceTB/")
