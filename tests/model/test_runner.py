"""The runner with adapters in its slots: each row its own delta, base rows untouched, bad rows failing alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters_store.manifest import Site
from adapters_store.ref import AdapterRef
from kernels.types import A_OFFSET, B_OFFSET, BIAS_OFFSET, RANK, STRIDE, TABLE_COLUMNS, SlotWeights
from server.engine.batch import Batch
from server.engine.request import NOT_FINITE, Request
from server.model.kv import KVCache, KVShape
from tests.model.harness import Driver, Served, greedy, make_batch, serve, whole_prompts
from tests.model.test_models import CERTIFIED, UNCERTIFIED, build
from tests.zoo import greedy_tokens, load_oracle_base, random_prompts, tiny_base

RANKS = {1: 3, 2: 8}  # slot -> true rank; both padded to 8


def fill_slots(served: Served) -> dict[int, dict[str, torch.Tensor]]:
    """Adapters on every site in slots 1 and 2, written as the arena lays them out; returns their full deltas [N, K]."""
    generator = torch.Generator().manual_seed(9)
    weights, elements = served.step.weights, []
    table = torch.zeros(3, len(served.manifest.sites), TABLE_COLUMNS, dtype=torch.int64)
    table[..., BIAS_OFFSET] = -1
    deltas: dict[int, dict[str, torch.Tensor]] = {slot: {} for slot in RANKS}
    offset = 0
    for slot, rank in RANKS.items():
        for row, site in enumerate(served.manifest.sites):
            a, b = torch.zeros(8, site.in_features), torch.zeros(site.out_features, 8)
            a[:rank] = torch.randn(rank, site.in_features, generator=generator) / site.in_features**0.5
            b[:, :rank] = torch.randn(site.out_features, rank, generator=generator) * 0.5
            deltas[slot][site.name] = b @ a
            stored = a.T.contiguous() if site.kind == "embedding" else a
            table[slot, row, [A_OFFSET, B_OFFSET, RANK, STRIDE]] = torch.tensor([offset, offset + a.numel(), rank, 8])
            elements += [stored.reshape(-1), b.reshape(-1)]
            offset += a.numel() + b.numel()
    weights.arena, weights.table, weights.version = torch.cat(elements), table, weights.version + 1
    assert isinstance(weights, SlotWeights)
    return deltas


def merged_oracle(path: Path, served: Served, deltas: dict[str, torch.Tensor]) -> torch.nn.Module:
    """transformers' own model with the deltas added to its weights (its head untied first)."""
    model = load_oracle_base(path)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        for site in served.manifest.sites:
            weight = model.get_submodule(site.module).weight
            weight += oriented(site, deltas[site.name])
    return model


def oriented(site: Site, delta: torch.Tensor) -> torch.Tensor:
    """[N, K] as the site's module stores it."""
    if site.kind == "embedding":
        return delta.T / site.output_scale
    return delta.T if site.transposed else delta


def with_slot(request: Request, slot: int) -> Request:
    if slot:
        request.slot = slot
        request.adapter = AdapterRef(f"a{slot}", "v", "d", f"image-{slot}", "", 0, 0, checksum="", max_rank=8)
    return request


def mixed_batch(served: Served, lengths=(5, 9, 3, 14, 7), slots=(0, 1, 2, 0, 1)) -> Batch:
    vocab_size = served.manifest.vocab_size
    prompts = [random_prompts(1, vocab_size, seed=n, lengths=(n, n))[0] for n in lengths]
    requests = [with_slot(greedy(p, str(i), 1), slot) for i, (p, slot) in enumerate(zip(prompts, slots, strict=True))]
    return make_batch(whole_prompts(requests))


def sampled(served: Served, batch: Batch) -> list[int]:
    """The ids that a batch samples, in the order of its sample_items."""
    return list(served.runner.collect(served.runner.dispatch(batch)).tokens.values())


@pytest.mark.parametrize("name", [*CERTIFIED, *UNCERTIFIED])
def test_each_row_gets_its_own_delta(name: str, tmp_path: Path) -> None:
    """Logits against merged weights, on every site at once: linears, packed or not, embedding, head."""
    path = build(tmp_path, *(CERTIFIED | UNCERTIFIED)[name])
    served = serve(path)
    deltas = fill_slots(served)
    batch = mixed_batch(served)
    logits = served.runner.logits(batch)
    oracles = {slot: merged_oracle(path, served, deltas[slot]) for slot in RANKS} | {0: load_oracle_base(path)}
    for row, item in enumerate(batch.sample_items):
        with torch.inference_mode():
            expected = oracles[item.request.slot](torch.tensor([item.request.token_ids])).logits[0, -1]
        torch.testing.assert_close(logits[row], expected, atol=2e-3, rtol=2e-3)
        distance = (logits[row] - oracles[0](torch.tensor([item.request.token_ids])).logits[0, -1]).abs().max()
        assert item.request.slot == 0 or distance > 0.1, "the adapter changes nothing: no test"


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "olmo2"])
def test_base_rows_are_the_same_bits_without_adapters(name: str, tmp_path: Path) -> None:
    served = serve(build(tmp_path, *(CERTIFIED | UNCERTIFIED)[name]))
    fill_slots(served)
    batch = mixed_batch(served)
    mixed = served.runner.logits(batch)
    for request in (item.request for item in batch.items):
        request.slot, request.adapter = 0, None
    base = served.runner.logits(replace(batch, row_slots=[0] * len(batch.items)))
    for row, slot in enumerate(batch.row_slots):
        assert torch.equal(mixed[row], base[row]) == (slot == 0)


def test_adapters_in_mixed_steps(tmp_path: Path) -> None:
    """Chunks and decodes of several slots, token for token against merged weights."""
    path = tiny_base(tmp_path, "llama")
    served = serve(path)
    deltas = fill_slots(served)
    slots = (0, 1, 2, 1, 0, 2)
    prompts = random_prompts(len(slots), 320, seed=4, lengths=(2, 25))
    answers = Driver(served).run(
        [with_slot(greedy(p, str(i), 12), slot) for i, (p, slot) in enumerate(zip(prompts, slots, strict=True))]
    )
    oracles = {slot: merged_oracle(path, served, deltas[slot]) for slot in RANKS} | {0: load_oracle_base(path)}
    assert answers == [greedy_tokens(oracles[slot], p, 12) for p, slot in zip(prompts, slots, strict=True)]


def test_a_slot_without_its_adapter_never_runs(tmp_path: Path) -> None:
    served = serve(tiny_base(tmp_path, "llama"))
    fill_slots(served)
    batch = mixed_batch(served)
    batch.items[1].request.adapter = None
    with pytest.raises(RuntimeError, match="does not hold its adapter"):
        served.runner.logits(batch)


# --- failures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_request_that_is_not_finite_fails_alone(bad: float, tmp_path: Path) -> None:
    """One token's embedding is broken: the request that has it gets NOT_FINITE, its neighbours their answers."""
    path = tiny_base(tmp_path, "llama")
    served = serve(path)
    batch = mixed_batch(served, slots=(0,) * 5)
    expected = sampled(served, batch)
    broken = 319
    with torch.no_grad():
        served.base.model.get_input_embeddings().weight[broken] = bad
    row = batch.query_starts[2]
    batch.ids[row] = broken
    tokens = sampled(served, batch)
    assert tokens[2] == NOT_FINITE
    assert tokens[:2] + tokens[3:] == expected[:2] + expected[3:]
    assert NOT_FINITE not in expected


def test_the_dummy_block_stays_zero(tmp_path: Path) -> None:
    served = serve(tiny_base(tmp_path, "llama"))
    prompts = random_prompts(3, 320, seed=6, lengths=(4, 20))
    Driver(served).run([greedy(prompt, str(i), 5) for i, prompt in enumerate(prompts)])
    assert all(bool((cache[0] == 0).all()) for cache in (*served.kv.keys, *served.kv.values))
    batch = mixed_batch(served, slots=(0,) * 5)
    batch.kv_slots[0] = 1
    with pytest.raises(AssertionError, match="block 0"):
        served.runner.logits(batch)


def test_steps_without_a_sample_and_batches_too_large(tmp_path: Path) -> None:
    served = serve(tiny_base(tmp_path, "llama"))
    requests = [greedy(random_prompts(1, 320, seed=1, lengths=(30, 30))[0], "r", 1)]
    items = whole_prompts(requests)
    items[0].num_tokens, items[0].samples = 20, False
    assert sampled(served, make_batch(items)) == []
    too_long = whole_prompts([greedy(random_prompts(1, 320, seed=1, lengths=(200, 200))[0], "r", 1)])
    with pytest.raises(AssertionError, match="200 rows in buffers of 128"):
        served.runner.logits(make_batch(too_long))


# --- attention and memory -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"position_bias": torch.zeros(1)}, "unknown arguments position_bias"),
        ({"indices": torch.zeros(1)}, "unknown arguments indices"),
        ({"output_attentions": True}, "unknown arguments output_attentions"),
        ({"dropout": 0.1}, "dropout 0.1"),
        ({"is_causal": False}, "bidirectional"),
        ({"attention_mask": torch.zeros(1, 1, 2, 2)}, "a mask of its own"),
    ],
)
def test_attention_ignores_nothing(changes, reason: str, tmp_path: Path) -> None:
    served = serve(tiny_base(tmp_path, "llama"))
    module = served.base.model.model.layers[0].self_attn
    attention = type(module).forward.__globals__["ALL_ATTENTION_FUNCTIONS"]["multilora_paged"]
    rows = torch.zeros(1, 4, 2, 16)
    arguments = {"attention_mask": None, "use_cache": False, "position_ids": rows, **changes}
    with pytest.raises(RuntimeError, match=reason):
        attention(module, rows, rows[:, :2], rows[:, :2], step=served.runner._forward._context, **arguments)


def test_kv_memory_is_exact_lazy_and_zero() -> None:
    shape = KVShape(num_layers=3, num_kv_heads=2, head_dim=16)
    assert shape.bytes_per_block(4, torch.bfloat16) == 3 * 2 * 4 * 2 * 16 * 2
    num_blocks = (1 << 30) // shape.bytes_per_block(4, torch.bfloat16)
    before = resident_bytes()
    kv = KVCache(shape, num_blocks, 4, torch.bfloat16, torch.device("cpu"))
    assert kv.keys[2].shape == (num_blocks, 4, 2, 16)
    kv.values[1][7] = 1.0
    assert resident_bytes() - before < 64 << 20, "a KV cache of 1 GiB was touched"
    assert kv.keys[1].data_ptr() % 64 == 0
    assert bool((kv.values[1][6:9].flatten(1) == torch.tensor([[0.0], [1.0], [0.0]])).all())
    assert not kv.keys[1][6:9].any() and not kv.values[2][6:9].any()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_weights_are_our_own_and_counted_once(tmp_path: Path) -> None:
    """Overwriting the file behind the weights changes nothing; packing leaves no second copy."""
    path = tiny_base(tmp_path, "llama", tie_word_embeddings=True)
    served = serve(path)
    batch = mixed_batch(served, slots=(0,) * 5)
    before = served.runner.logits(batch)
    file = path / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(b"\0" * file.stat().st_size)
    assert torch.equal(served.runner.logits(batch), before)
    assert sum(p.nbytes for p in served.base.model.parameters()) == served.base.weights_bytes


def test_eos_ids_of_both_configs(tmp_path: Path) -> None:
    path = tiny_base(tmp_path, "llama", eos_token_id=[7, 2])
    assert serve(path).base.eos_token_ids == (7, 2)
    (path / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    assert serve(path).base.eos_token_ids == (9, 2, 7)
