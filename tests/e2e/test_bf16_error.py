"""bf16: our logits are about as far from the fp32 oracle as PEFT's own in bf16, adapters co-batched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapters_store.manifest import read_manifest
from server.demo import ensure_demo_base
from server.text.tokenizer import BaseTokenizer
from tests.driver import Driver
from tests.zoo import ZooAdapter, load_oracle_base, lora_config, peft_oracle, save_adapter

POSITIONS = 200
NUM_ADAPTERS = 5
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Five adapters of other ranks and targets, and 200 tokens of prose for each."""
    root = tmp_path_factory.mktemp("bf16")
    base = ensure_demo_base()
    oracle = load_oracle_base(base)
    zoo = []
    for index in range(NUM_ADAPTERS):
        path = root / "adapters" / f"zoo-{index}"
        config = lora_config(3 * index, oracle.config.num_hidden_layers)
        save_adapter(oracle, config, path, seed=index, scale=0.3, dtype=torch.bfloat16)
        zoo.append(ZooAdapter(path.name, path))
    ids = BaseTokenizer(base).encode((ROOT / "docs" / "architecture.md").read_text(), add_special_tokens=False)
    texts = [ids[i * POSITIONS : (i + 1) * POSITIONS] for i in range(NUM_ADAPTERS)]
    assert all(len(text) == POSITIONS for text in texts)
    return base, root, zoo, texts, oracle


def oracle_logits(model, zoo, texts) -> list[torch.Tensor]:
    """[positions, V] fp32 for each adapter, by unmerged PEFT in the model's own dtype."""
    found = []
    for adapter, text in zip(zoo, texts, strict=True):
        with peft_oracle(model, adapter) as peft, torch.inference_mode():
            found.append(peft(input_ids=torch.tensor([text])).logits[0].float())
    return found


def served_logits(base, root, zoo, texts) -> list[torch.Tensor]:
    """The same from the engine in bf16: all five requests in the same steps, every row sent to the head."""
    driver = Driver(base, root / "adapters", root / "cache", dtype="bfloat16", max_step_tokens=320)
    assert read_manifest(Path(driver.core.ready.manifest_path)).dtype == "bfloat16"
    runner = driver.core._runner
    original = runner.logits
    rows: dict[str, list[torch.Tensor]] = {}

    def all_rows(batch):
        wanted, batch.sample_rows = batch.sample_rows, torch.arange(batch.num_rows).numpy()
        logits = original(batch)
        batch.sample_rows = wanted
        for item, start in zip(batch.items, batch.query_starts, strict=False):
            part = logits[start : start + item.num_tokens].float()
            rows.setdefault(item.request.request_id, []).append(part)
        return logits[torch.from_numpy(wanted)]

    runner.logits = all_rows
    ids = [driver.submit(text, adapter.name) for adapter, text in zip(zoo, texts, strict=True)]
    while any(sum(map(len, rows.get(i, []))) < POSITIONS for i in ids):
        driver.step()
    runner.logits = original
    driver.finish(ids)
    assert driver.max_distinct_adapters > 1
    driver.close()
    return [torch.cat(rows[i])[:POSITIONS] for i in ids]


def rms_error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    squares = torch.cat([(a.double() - b.double()).square().mean(-1) for a, b in zip(found, exact, strict=True)])
    assert len(squares) == NUM_ADAPTERS * POSITIONS
    return squares.mean().sqrt().item()


def test_logit_error_is_at_most_one_and_a_half_times_that_of_peft(world):
    base, root, zoo, texts, oracle = world
    exact = oracle_logits(oracle, zoo, texts)
    peft = rms_error(oracle_logits(oracle.to(torch.bfloat16), zoo, texts), exact)
    ours = rms_error(served_logits(base, root, zoo, texts), exact)
    print(f"RMS logit error: ours {ours:.4f}, PEFT bf16 {peft:.4f}, ratio {ours / peft:.3f}")
    assert peft > 0
    assert ours <= 1.5 * peft, (ours, peft)
