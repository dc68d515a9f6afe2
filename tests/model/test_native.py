"""The native forward pass against the modules that it stands for, both measured from the same base in fp32.

Adapters are random ranks at every site, embedding and head too, in a random arena that both dtypes share.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.manifest import BaseManifest
from adapters_store.ref import AdapterRef
from kernels.types import TABLE_COLUMNS, SlotWeights
from server.engine.batch import ScheduledRequest
from server.model.forward import ModuleForward, NativeForward
from server.model.manifest import build_manifest
from server.model.sampler import largest
from tests.model.harness import Served, greedy, make_batch, serve, whole_prompts
from tests.model.test_models import CERTIFIED, LONGROPE
from tests.zoo import random_prompts, tiny_base

NUM_SLOTS = 4
LENGTHS = (1, 3, 9, 26, 40)
SLOTS = (1, 0, 2, 3, 1)  # of the requests: adapters and a base row between them
NUM_DECODES = 6
ADAPTER = AdapterRef("a", "v", "d", "k", "", 0, 0, "", 64)
KINDS = {
    **CERTIFIED,
    "longrope": ("phi3", LONGROPE),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2-tied-window": (
        "qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "wide": ("llama", {"hidden_size": 160, "intermediate_size": 208, "head_dim": 32, "vocab_size": 331}),
}


def arena_of(manifest: BaseManifest, seed: int = 5) -> SlotWeights:
    """Slots 1 to 3 with random ranks at most sites, some absent; fp32 values that bf16 holds."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.zeros(NUM_SLOTS, len(manifest.sites), TABLE_COLUMNS, dtype=torch.int64)
    table[:, :, 2] = -1
    parts, used = [], 0

    def place(rows: int, columns: int, rank: int, is_b: bool) -> int:
        nonlocal used
        scale = 0.5 * columns**-0.5 if not is_b else 0.5 * rank**-0.5
        values = torch.randn(rows, columns, generator=generator) * scale
        if is_b:
            values[:, rank:] = 0
        flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % 64))
        parts.append(flat)
        used += len(flat)
        return used - len(flat)

    for slot in range(1, NUM_SLOTS):
        for row, site in enumerate(manifest.sites):
            rank = int(torch.randint(0, 20, (), generator=generator))
            if rank == 0:
                continue
            stride = -(-rank // 8) * 8
            is_embedding = site.kind == "embedding"
            a = place(*((site.in_features, stride) if is_embedding else (stride, site.in_features)), rank, False)
            b = place(site.out_features, stride, rank, True)
            table[slot, row] = torch.tensor([a, b, -1, rank, stride])
    return SlotWeights(torch.cat(parts).to(torch.bfloat16).float(), table)


def logits_of(served: Served, slots: tuple[int, ...], prompts: list[list[int]]) -> list[torch.Tensor]:
    """The last rows' logits of a prefill of all prompts and of decode steps that feed the same tokens to all."""
    requests = [greedy(prompt, f"r{i}", NUM_DECODES + 1) for i, prompt in enumerate(prompts)]
    for request, slot in zip(requests, slots, strict=True):
        request.slot = slot
        request.adapter = ADAPTER if slot else None
    first = whole_prompts(requests)
    next_block = 1 + max(block for request in requests for block in request.blocks)
    found = [served.runner.logits(make_batch(first)).clone()]
    for number in range(NUM_DECODES):
        items = []
        for request in requests:
            request.num_computed = len(request.token_ids)
            request.token_ids.append(3 + 7 * number % 300)
            if len(request.token_ids) > 4 * len(request.blocks):
                request.blocks.append(next_block)
                next_block += 1
            items.append(ScheduledRequest(request, request.num_computed, 1, samples=True))
        found.append(served.runner.logits(make_batch(items)).clone())
    return found


def rms(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return float(
        torch.cat([(x.float() - y.float()).flatten() for x, y in zip(a, b, strict=True)]).square().mean().sqrt()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_as_exact_as_the_modules(kind: str, tmp_path: Path) -> None:
    """Against fp32 modules the native pass errs no more than the modules in bf16 do, adapters or not."""
    path = tiny_base(tmp_path / "base", KINDS[kind][0], **KINDS[kind][1])
    rounded(path)
    exact = arena_of(build_manifest(path, "float32"))
    narrow = SlotWeights(exact.arena.to(torch.bfloat16), exact.table)
    prompts = prompts_of()
    native = serve(path, "bfloat16", backend="cpu", weights=narrow)
    modules = serve(path, "bfloat16", weights=narrow)
    oracle = serve(path, "float32", weights=exact)
    assert isinstance(native.runner._forward, NativeForward)
    assert isinstance(modules.runner._forward, ModuleForward)
    for slots in (SLOTS, (0,) * len(SLOTS)):
        found, theirs, right = (logits_of(served, slots, prompts) for served in (native, modules, oracle))
        error, limit = rms(found, right), rms(theirs, right)
        assert limit > 0 and error <= 1.15 * limit, (error, limit)


def native_of(tmp_path: Path, kind: str) -> Served:
    path = tiny_base(tmp_path / "base", KINDS[kind][0], **KINDS[kind][1])
    weights = arena_of(build_manifest(path, "float32"))
    return serve(path, "bfloat16", backend="cpu", weights=SlotWeights(weights.arena.to(torch.bfloat16), weights.table))


def prompts_of() -> list[list[int]]:
    return [random_prompts(1, 300, seed=n, lengths=(n, n))[0] for n in LENGTHS]


BATCHED = ("llama", "gemma3", "qwen2-tied-window", "longrope")


@pytest.mark.parametrize("kind", BATCHED)
def test_a_rows_bits_are_its_own(kind: str, tmp_path: Path) -> None:
    """In bf16 too: a request alone gives the bits that it gives in a batch of others with other adapters."""
    served, prompts = native_of(tmp_path, kind), prompts_of()
    together = logits_of(served, SLOTS, prompts)
    for row, (slot, prompt) in enumerate(zip(SLOTS, prompts, strict=True)):
        alone = logits_of(served, (slot,), [prompt])
        for step, logits in enumerate(alone):
            assert torch.equal(logits[0], together[step][row]), (row, step)


@pytest.mark.parametrize("kind", BATCHED)
def test_chunks_change_no_bits(kind: str, tmp_path: Path) -> None:
    """A prompt in one prefill, in chunks, or token by token."""
    served, prompt = native_of(tmp_path, kind), prompts_of()[-1]
    whole = logits_of(served, (2,), [prompt])[0]
    for size in (1, 7):
        request = greedy(prompt, "r", 1)
        request.slot, request.adapter = 2, ADAPTER
        whole_prompts([request])  # its blocks
        for start in range(0, len(prompt), size):
            end = min(start + size, len(prompt))
            chunk = ScheduledRequest(request, start, end - start, samples=end == len(prompt))
            found = served.runner.logits(make_batch([chunk]))
        assert torch.equal(found, whole), size


def test_threads_change_no_bits(tmp_path: Path) -> None:
    served, prompts = native_of(tmp_path, "llama"), prompts_of()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(logits_of(served, SLOTS, prompts))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def rounded(path: Path) -> None:
    """Round the saved weights to bf16, so that both dtypes load the same ones."""
    file = path / "model.safetensors"
    save_file({name: t.to(torch.bfloat16).float() for name, t in load_file(file).items()}, file, {"format": "pt"})


def test_largest_is_the_samplers(tmp_path: Path) -> None:
    """Ties, infinities and NaN as the sampler has them; the id of a row with NaN is nobody's."""
    served = serve(tiny_base(tmp_path / "base", "llama"), "bfloat16", backend="cpu")
    logits = torch.randn(6, 320, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    logits[1, [7, 90, 300]] = logits.max() + 1
    logits[2, 5], logits[3, 319], logits[4] = torch.inf, torch.nan, -torch.inf
    best, tokens = served.runner._forward.largest(logits)
    their_best, their_tokens = largest(logits)
    sound = ~their_best.isnan()
    assert torch.equal(best[sound], their_best[sound]) and torch.equal(tokens[sound], their_tokens[sound])
    assert tokens[1] == 7 and (~sound).tolist() == [False] * 3 + [True] + [False] * 2
