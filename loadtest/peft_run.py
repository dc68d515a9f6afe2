"""A workload as static batches of PEFT, reported like a server's.

A batch is a wave of the closed loop: all of its requests are due when it starts and end when it ends. There is neither
HTTP nor tokenizing in it, which is in this peer's favour.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from loadtest.client import Run
from loadtest.outcome import Outcome
from loadtest.peer_commands import BASE, PeerOptions
from loadtest.report import Figures, make_report
from loadtest.workload import Request, WorkloadSpec, draw

_SCRIPT = Path(__file__).with_name("peft_batches.py")


def measure_peft(spec: WorkloadSpec, options: PeerOptions) -> Figures:
    """Errors: RuntimeError with the end of what the script said, if it fails."""
    folders = options.adapters[: spec.num_adapters]
    arrivals, requests = draw(spec, [path.name for path in folders])
    size = arrivals.concurrency or len(requests)
    batches = [requests[start : start + size] for start in range(0, len(requests), size)]
    job = {
        "model": str(options.model),
        "threads": options.threads,
        "adapters": [str(path) for path in folders],
        "batches": [_job(batch) for batch in batches],
    }
    try:
        done = subprocess.run(
            [options.peft_python or "", str(_SCRIPT)],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=options.timeout_s * (len(batches) + 2),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"PEFT did not run: {error}") from None
    if done.returncode:
        raise RuntimeError(f"PEFT ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    timed = json.loads(done.stdout)["batches"]
    outcomes = [o for batch, times in zip(batches, timed, strict=True) for o in _outcomes(batch, times)]
    started, ended = timed[0]["started"], timed[-1]["stamps"][-1]
    about = {"backend": "peft", "endpoint_type": "peft", "label": "peft", "model_id": BASE, "tokenizer_id": None}
    run = Run(outcomes, started, ended - started)
    return make_report(run, requests, spec, arrivals, [path.name for path in folders], {}, about)


def _job(batch: Sequence[Request]) -> dict[str, object]:
    if len({(request.prompt_tokens, request.max_tokens) for request in batch}) != 1:
        raise RuntimeError("a static batch has prompts of one length and answers of one length")
    return {
        "prompts": [request.prompt for request in batch],
        "adapters": [request.adapter for request in batch],
        "max_tokens": batch[0].max_tokens,
    }


def _outcomes(batch: Sequence[Request], times: dict[str, list[float]]) -> list[Outcome]:
    started, stamps = float(times["started"]), times["stamps"]  # type: ignore[arg-type]
    return [
        Outcome(
            request.index,
            request.adapter,
            request.max_tokens,
            due=started,
            begun=started,
            ended=stamps[-1],
            status=200,
            stamps=list(stamps),
            num_events=len(stamps),
            output_tokens=len(stamps),
        )
        for request in batch
    ]
