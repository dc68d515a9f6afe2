"""Every certified architecture, token for token against unmodified `generate`, in mixed batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model.harness import Driver, Served, greedy, make_batch, serve, whole_prompts
from tests.zoo import greedy_tokens, load_oracle_base, random_prompts, tiny_base

NUM_TOKENS = 20
LENGTHS = (1, 3, 9, 26, 40)  # shorter and longer than a chunk, a block, a window

SWITCH = 32
LONGROPE = {
    "max_position_embeddings": 128,
    "original_max_position_embeddings": SWITCH,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.7 * i for i in range(8)],
        "original_max_position_embeddings": SWITCH,
    },
}

CERTIFIED: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama-tied-llama3-rope": (
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral-window": ("mistral", {"sliding_window": 12}),
    # untied: with the large scale of Gemma's embeddings, a tied tiny model only echoes its input
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 12,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 12,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 7,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": ("phi3", {"sliding_window": 30}),
}

UNCERTIFIED: dict[str, tuple[str, dict[str, object]]] = {
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"logits_scaling": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7}),
    "gpt2": ("gpt2", {"n_layer": 2, "n_head": 4, "n_embd": 64}),
}


def build(folder: Path, kind: str, fields: dict[str, object]) -> Path:
    """A tiny base; GPT-2 takes none of the usual fields but those two."""
    if kind != "gpt2":
        return tiny_base(folder, kind, **fields)
    return tiny_base(folder, kind, **fields, hidden_size=64, num_attention_heads=4, num_hidden_layers=2)


def expect_same(path: Path, served: Served, driver: Driver, lengths=LENGTHS, answer=greedy_tokens) -> None:
    """All prompts in one run of mixed batches against each alone in `generate`."""
    oracle = load_oracle_base(path)
    vocab_size = served.manifest.vocab_size
    prompts = [random_prompts(1, vocab_size, seed=n, lengths=(n, n))[0] for n in lengths]
    expected = [answer(oracle, prompt, NUM_TOKENS) for prompt in prompts]
    answers = driver.run([greedy(prompt, f"r{i}", NUM_TOKENS) for i, prompt in enumerate(prompts)])
    assert answers == expected
    assert len({token for answer in expected for token in answer}) > 20, "the oracle repeats itself: no test"
    assert any(0 < decodes < rows for decodes, rows in driver.batches), "no step mixed decode and prefill"


@pytest.mark.parametrize("name", CERTIFIED)
def test_certified_packed(name: str, tmp_path: Path) -> None:
    path = build(tmp_path, *CERTIFIED[name])
    served = serve(path)
    kinds = {line.now for line in served.replacements}
    assert ("PackedSlice" in kinds) == (not name.startswith("phi3"))
    expect_same(path, served, Driver(served))


@pytest.mark.parametrize("name", UNCERTIFIED)
def test_uncertified_unpacked(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = build(tmp_path, *UNCERTIFIED[name])
    with caplog.at_level("INFO", logger="server.model.surgery"):
        served = serve(path)
    assert "PackedSlice" not in {line.now for line in served.replacements}
    assert "not a certified model type" in caplog.text
    expect_same(path, served, Driver(served))


def test_longrope_by_row(tmp_path: Path) -> None:
    """Short and long rows in one batch, one request crossing the switch, one landing exactly on it."""
    path = tiny_base(tmp_path, "phi3", **LONGROPE)
    served = serve(path)
    assert served.base.rope_switch == SWITCH
    assert "PerRowRotary" in {line.now for line in served.replacements}
    # 5 stays short, 20 crosses, 13 ends with all but its last token at the switch, 32 and 33 start at it
    expect_same(path, served, Driver(served, stagger=1), (5, 20, 13, 32, 33, 50), recomputed)


def recomputed(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    """`generate` without a cache: transformers before 5.23 drops it at the switch but feeds one token only."""
    fields = {"do_sample": False, "max_new_tokens": num_tokens, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(torch.tensor([prompt]), use_cache=False, **fields)
    return out[0, len(prompt) :].tolist()


def test_longrope_ignores_neighbours(tmp_path: Path) -> None:
    """Two requests of one length, one side of the switch each: whose rows come first changes neither's logits."""
    path = tiny_base(tmp_path, "phi3", **LONGROPE)
    served = serve(path)
    short, long = (random_prompts(1, 320, seed=n, lengths=(n, n))[0] for n in (SWITCH, SWITCH + 1))
    alone = [first_logits(served, [prompt])[0] for prompt in (short, long)]
    together = first_logits(served, [short, long])
    torch.testing.assert_close(torch.stack(alone), together, atol=1e-4, rtol=1e-4)


def first_logits(served: Served, prompts: list[list[int]]) -> torch.Tensor:
    """The logits after each prompt, all prompts in one step, [prompts, V]."""
    requests = [greedy(prompt, str(i), 1) for i, prompt in enumerate(prompts)]
    return served.runner.logits(make_batch(whole_prompts(requests)))


def test_chunks_and_budget_change_nothing(tmp_path: Path) -> None:
    path = tiny_base(tmp_path, "llama")
    served = serve(path)
    prompts = random_prompts(4, 320, seed=3, lengths=(5, 30))
    answers = [
        Driver(served, row_budget=budget, stagger=stagger, seed=budget).run(
            [greedy(prompt, str(i), 10) for i, prompt in enumerate(prompts)]
        )
        for budget, stagger in ((1, 0), (5, 3), (64, 0))
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_logits_are_close(dtype: str, tmp_path: Path) -> None:
    """The same weights in half precision: logits of a prompt within a few roundings of the eager model's."""
    path = tiny_base(tmp_path, "llama", initializer_range=0.05)
    served = serve(path, dtype)
    prompt = random_prompts(1, 320, seed=5, lengths=(20, 20))[0]
    logits = first_logits(served, [prompt])
    with torch.inference_mode():
        expected = load_oracle_base(path, getattr(torch, dtype))(torch.tensor([prompt])).logits[0, -1:]
    assert logits.dtype == getattr(torch, dtype)
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.05)
