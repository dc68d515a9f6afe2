"""Static mixed batches through transformers and PEFT, each token stamped. Runs in an interpreter of its own.

    python peft_batches.py < job.json > result.json

job: {model, threads, adapters: [folder], batches: [{prompts: [[id]], adapters: [index or null], max_tokens}]}
result: {batches: [{started, stamps: [seconds], tokens: [[id]]}]}, times by `time.perf_counter`, one stamp a step for
all rows. The first batch is run once before, to warm up. Nothing here is imported from the project.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class _Stamps(StoppingCriteria):  # type: ignore[misc]
    """Called once a step, after its token; never stops anything."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.at.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def main() -> None:
    """Reads the job, writes the result; what libraries print goes to standard error."""
    job = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        torch.set_num_threads(job["threads"])
        model = _load(job["model"], job["adapters"])
        _generate(model, job["batches"][0])
        batches = [_generate(model, batch) for batch in job["batches"]]
    json.dump({"batches": batches}, sys.stdout)


def _load(path: str, adapters: list[str]) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    for index, folder in enumerate(adapters):
        # Kept in bf16 like the base: PEFT would hold them in fp32.
        if index == 0:
            model = PeftModel.from_pretrained(model, folder, adapter_name="0", autocast_adapter_dtype=False)
        else:
            model.load_adapter(folder, adapter_name=str(index), autocast_adapter_dtype=False)
    return model.eval().to(torch.bfloat16)


def _generate(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    stamps, prompts = _Stamps(), torch.tensor(batch["prompts"])
    named = {}
    if isinstance(model, PeftModel):
        named = {"adapter_names": ["__base__" if index is None else str(index) for index in batch["adapters"]]}
    started = time.perf_counter()
    with torch.inference_mode():
        ids = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=batch["max_tokens"],
            min_new_tokens=batch["max_tokens"],
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([stamps]),
            **named,
        )
    return {"started": started, "stamps": stamps.at, "tokens": ids[:, prompts.shape[1] :].tolist()}


if __name__ == "__main__":
    main()
