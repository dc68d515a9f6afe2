"""How often each demo adapter does its task, against the plain base: `python -m deploy.demo.evaluate`.

Greedy decoding on held-out prompts. The base is asked twice: with the same bare prompt as the adapter, and
with a written instruction before it. Writes adapters/RESULTS.json, heldout.jsonl and the table in README.md.
"""

import argparse
import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.demo.scoring import DEMO_DIR, MAX_NEW_TOKENS, accuracy, heldout_examples, write_heldout
from deploy.demo.tasks import TASKS
from server.demo import demo_adapters_dir, ensure_demo_base

BATCH_SIZE = 30
TABLE_START, TABLE_END = "<!-- results -->", "<!-- end of results -->"


class DemoModel:
    """The base with every demo adapter loaded, unmerged, in bf16: PEFT as the reference for the server."""

    def __init__(self, base_dir: Path, adapters_dir: Path, names: Sequence[str]) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base_dir, padding_side="left")
        base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16)
        self.model: Any = PeftModel.from_pretrained(base, adapters_dir / names[0], adapter_name=names[0])
        for name in names[1:]:
            self.model.load_adapter(adapters_dir / name, adapter_name=name)
        self.model.eval()

    def answers(self, prompts: Sequence[str], adapter: str | None, max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
        """Greedy answers of one adapter, or of the base when `adapter` is None."""
        if adapter is not None:
            self.model.set_adapter(adapter)
        answers: list[str] = []
        with torch.inference_mode(), self.model.disable_adapter() if adapter is None else nullcontext():
            for start in range(0, len(prompts), BATCH_SIZE):
                answers += self._generate(prompts[start : start + BATCH_SIZE], max_new_tokens)
        return answers

    def _generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = self.tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        inputs = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new_ids = output[:, inputs["input_ids"].shape[1] :]
        return list(self.tokenizer.batch_decode(new_ids, skip_special_tokens=True))


def evaluate_task(demo: DemoModel, name: str, num_prompts: int, show: int) -> dict[str, float]:
    """The three scores of one task; prints the first `show` wrong answers of the adapter."""
    examples = heldout_examples(name, num_prompts)
    prompts = [example.prompt for example in examples]
    answers = demo.answers(prompts, name)
    wrong = [(e, a) for e, a in zip(examples, answers, strict=True) if not TASKS[name].is_correct(e, a)]
    for example, answer in wrong[:show]:
        print(f"  {name}: {example.prompt!r}\n    wanted {example.expected!r}\n    got    {answer!r}")
    instructed = [TASKS[name].instruction + prompt for prompt in prompts]
    return {
        "adapter": accuracy(examples, answers),
        "base": accuracy(examples, demo.answers(prompts, None)),
        "base_with_instruction": accuracy(examples, demo.answers(instructed, None)),
    }


def describe(folder: Path) -> tuple[str, int]:
    """An adapter's rank and targets in words, and the bytes of its weights."""
    config = json.loads((folder / "adapter_config.json").read_text())
    ranks = sorted({config["r"], *config["rank_pattern"].values()})
    rank_text = "/".join(map(str, ranks)) + (" rsLoRA" if config["use_rslora"] else "")
    targets = ", ".join(sorted(target.removesuffix("_proj") for target in config["target_modules"]))
    return f"rank {rank_text} on {targets}", (folder / "adapter_model.safetensors").stat().st_size


def table(results: dict[str, dict[str, float]], adapters_dir: Path) -> str:
    """The results as a Markdown table."""
    lines = [
        "| adapter | LoRA | size | adapter | base | base, instructed |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, scores in results.items():
        lora, num_bytes = describe(adapters_dir / name)
        cells = " | ".join(f"{scores[key]:.0%}" for key in ("adapter", "base", "base_with_instruction"))
        lines.append(f"| `{name}` | {lora} | {num_bytes / 1e6:.1f} MB | {cells} |")
    return "\n".join(lines)


def write_readme_table(text: str, path: Path = DEMO_DIR / "README.md") -> None:
    """Replace the table between the two marks of the README."""
    block = f"{TABLE_START}\n{text}\n{TABLE_END}"
    old = path.read_text(encoding="utf-8")
    path.write_text(re.sub(f"{TABLE_START}.*{TABLE_END}", lambda _: block, old, flags=re.DOTALL), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-n", "--num-prompts", type=int, default=60, help="held-out prompts per task")
    parser.add_argument("--show", type=int, default=3, help="wrong answers to print per adapter")
    args = parser.parse_args()
    torch.set_num_threads(2)
    adapters_dir = demo_adapters_dir()
    demo = DemoModel(ensure_demo_base(), adapters_dir, list(TASKS))
    results = {name: evaluate_task(demo, name, args.num_prompts, args.show) for name in TASKS}
    text = table(results, adapters_dir)
    print(text)
    record = {"num_prompts": args.num_prompts, "max_new_tokens": MAX_NEW_TOKENS, "scores": results}
    (adapters_dir / "RESULTS.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    write_heldout()
    write_readme_table(text)


if __name__ == "__main__":
    main()
