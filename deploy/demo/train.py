"""Train the demo adapters with PEFT on the CPU: `python -m deploy.demo.train [NAME ...]`.

An adapter takes 10 to 17 minutes on one of two shared cores; two trainings side by side use both.

Every adapter has another rank and other targets on purpose: together they exercise what a multi-LoRA server
must batch: mixed ranks and targets, a rank that is no power of two, rank patterns, rank-stabilised scaling.
"""

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.demo.tasks import TASKS, Example, generate
from server.demo import BASE_NAME, demo_adapters_dir, ensure_demo_base

log = logging.getLogger("demo.train")

BATCH_SIZE = 16
BUCKET_BATCHES = 8  # lengths are sorted inside groups of this many batches: little padding, still shuffled
WARMUP_STEPS = 10
SEED = 20


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained; `lora` goes to LoraConfig as it is."""

    num_steps: int
    learning_rate: float
    lora: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "json-extractor": Recipe(90, 1e-3, {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
    "sql-writer": Recipe(
        150, 1.5e-3, {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    ),
    "ticket-classifier": Recipe(
        110,
        1e-3,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 8, r"layers\.2\d\.mlp\.down_proj": 16},
            "alpha_pattern": {r"layers\.2\d\.mlp\.down_proj": 32},
        },
    ),
    "pirate": Recipe(
        90,
        5e-4,
        {
            "r": 12,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        },
    ),
}


@dataclass(frozen=True)
class Row:
    """One example in tokens: the model reads `ids` and learns those from `answer_start` on."""

    ids: list[int]
    answer_start: int


def encode(tokenizer: Any, example: Example) -> Row:
    """The chat with the answer and its end mark; the template puts in its default system prompt."""
    chat = [{"role": "user", "content": example.prompt}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(example.expected + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return Row(prompt_ids + answer_ids, len(prompt_ids))


def batches(rows: list[Row], rng: Random) -> Iterator[list[Row]]:
    """Batches of similar lengths, in random order within each group."""
    group_size = BATCH_SIZE * BUCKET_BATCHES
    for start in range(0, len(rows), group_size):
        group = sorted(rows[start : start + group_size], key=lambda row: len(row.ids))
        parts = [group[i : i + BATCH_SIZE] for i in range(0, len(group), BATCH_SIZE)]
        rng.shuffle(parts)
        yield from parts


def answer_loss(model: PeftModel, batch: list[Row], pad_id: int) -> Tensor:
    """Mean cross-entropy of the answer tokens; the large LM head runs only where one is predicted."""
    width = max(len(row.ids) for row in batch)
    ids = torch.tensor([row.ids + [pad_id] * (width - len(row.ids)) for row in batch])  # [rows, width]
    is_target = torch.tensor([[row.answer_start <= i < len(row.ids) for i in range(width)] for row in batch])
    causal_lm = model.get_base_model()
    # No attention mask: the padding is on the right, where a causal model never looks from a real token.
    hidden = causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state  # [rows, width, hidden]
    logits = causal_lm.lm_head(hidden[:, :-1][is_target[:, 1:]]).float()  # [targets, vocab]
    return functional.cross_entropy(logits, ids[is_target])


def train(name: str, base_dir: Path, out_dir: Path) -> None:
    """Train one adapter and save it as PEFT does, in bf16 and without local paths."""
    recipe = RECIPES[name]
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **recipe.lora))  # its weights are fp32
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, recipe.num_steps, pct_start=WARMUP_STEPS / recipe.num_steps
    )
    examples = generate(TASKS[name], "train", recipe.num_steps * BATCH_SIZE, SEED)
    rows = [encode(tokenizer, example) for example in examples]
    start_s = time.monotonic()
    for step, batch in enumerate(batches(rows, Random(SEED)), start=1):
        loss = answer_loss(model, batch, tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            log.info("%s step %d loss %.4f, %.0f s", name, step, loss.item(), time.monotonic() - start_s)
    save(model, out_dir)


def save(model: PeftModel, out_dir: Path) -> None:
    """bf16 like the base: half the size, and the server computes in it anyway."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.to(torch.bfloat16).save_pretrained(out_dir, save_embedding_layers=False)
    (out_dir / "README.md").unlink(missing_ok=True)  # an empty model card; deploy/demo/README.md has the facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(RECIPES), metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--threads", type=int, default=1, help="two runs of one thread beat one of two")
    parser.add_argument("--out", type=Path, default=None, help="folder for the adapters")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(args.threads)
    base_dir = ensure_demo_base(progress=log.info)
    for name in args.names:
        train(name, base_dir, (args.out or demo_adapters_dir()) / name)


if __name__ == "__main__":
    main()
