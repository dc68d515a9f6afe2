"""`multilora bench peers`: ours and other servers in turns, each started, warmed, measured and stopped.

    multilora bench peers --model M --adapters FOLDER --scenarios 0@1 0@8 0@32 8@8 32@32 --repeats 3 --out RESULTS

A scenario is ADAPTERS@CONCURRENCY: a closed loop over so many adapters, each request another one; with 0 adapters the
server is started without LoRA. Peers live in environments of their own, named by flags or the environment; those that
aren't named are left out:

    ours       this installation
    vllm       --vllm-python (MULTILORA_VLLM_PYTHON): an interpreter that has vLLM
    llamacpp   --llama-server (MULTILORA_LLAMA_SERVER), --llama-model and --llama-adapters: the same as GGUF files,
               adapters in the order of their names (MULTILORA_LLAMA_MODEL, MULTILORA_LLAMA_ADAPTERS)
    peft       --peft-python (MULTILORA_PEFT_PYTHON): an interpreter with transformers and PEFT; static mixed batches

Every other round goes through the peers backwards. The machine's read bandwidth is measured before each round.
`python -m loadtest.prepare` makes a model and adapters of chosen ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from loadtest.compare import Incomparable, comparison, group, read_result
from loadtest.peer_commands import PEERS, Peer, PeerOptions
from loadtest.peft_run import measure_peft
from loadtest.report import Figures
from loadtest.serve import Plan, measure
from loadtest.server_process import free_port
from loadtest.workload import WorkloadSpec

BANDWIDTH_BYTES = 2 << 30
_VARIABLES = ("MULTILORA_VLLM_PYTHON", "MULTILORA_LLAMA_SERVER", "MULTILORA_PEFT_PYTHON")


@dataclass(frozen=True)
class Scenario:
    """A closed loop over `num_adapters` distinct adapters."""

    num_adapters: int
    concurrency: int

    def __str__(self) -> str:
        return f"{self.num_adapters}@{self.concurrency}"

    def spec(self, options: PeerOptions, seed: int) -> WorkloadSpec:
        """At least `min_requests` requests, in whole waves."""
        waves = -(-options.min_requests // self.concurrency)
        return WorkloadSpec(
            seed=seed,
            num_requests=waves * self.concurrency,
            arrivals=f"closed:{self.concurrency}",
            popularity="distinct",
            num_adapters=self.num_adapters,
            prompt_tokens=str(options.prompt_tokens),
            output_tokens=str(options.output_tokens),
            highest_id=options.highest_id,
        )


def parse_scenario(text: str) -> Scenario:
    """`8@32`. Errors: ValueError."""
    adapters, at, concurrency = text.partition("@")
    if not (at and adapters.isdigit() and concurrency.isdigit() and int(concurrency)):
        raise ValueError(f"scenario {text!r}: ADAPTERS@CONCURRENCY, e.g. 8@32")
    return Scenario(int(adapters), int(concurrency))


def is_configured() -> bool:
    """The environment names some peer."""
    return any(name.startswith(_VARIABLES) for name in os.environ)


def main(arguments: Sequence[str]) -> None:
    """The command. Ends with status 2 for what can't be asked. A peer that fails is told of and passed over."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    console = Console()
    try:
        scenarios = [parse_scenario(text) for text in parsed.scenarios]
        options = _options(parsed, scenarios)
        peers = _chosen(parsed.peers, options, console)
    except ValueError as error:
        parser.exit(2, f"multilora bench peers: {error}\n")
    rates = []
    for turn in range(parsed.repeats):
        rates.append(_bandwidth())
        console.print(f"round {turn + 1} of {parsed.repeats}: {rates[-1] / 1e9:.1f} GB/s read")
        for peer in peers[:: -1 if turn % 2 else 1]:
            _take_turn(peer, scenarios, options, turn, console)
    (options.out / "machine.json").write_text(json.dumps({"read_bytes_per_s": rates}) + "\n")
    for scenario in scenarios:
        turns = [
            options.out / str(scenario) / f"{p.name}-{turn + 1}.json" for p in peers for turn in range(parsed.repeats)
        ]
        _compare(scenario, [path for path in turns if path.exists()], console)


def _compare(scenario: Scenario, files: Sequence[Path], console: Console) -> None:
    console.print(f"\n{scenario.num_adapters} adapters, concurrency {scenario.concurrency}")
    try:
        if files:
            console.print(comparison(group([(str(path), read_result(path)) for path in files])))
    except Incomparable as error:  # a peer failed in some turn: the others' rounds have seeds that it has not
        console.print(str(error), style="red", markup=False)


def _take_turn(peer: Peer, scenarios: Sequence[Scenario], options: PeerOptions, turn: int, console: Console) -> None:
    """Its scenarios without adapters on one server, those with adapters on another."""
    for num_adapters in sorted({scenario.num_adapters for scenario in scenarios}):
        chosen = [scenario for scenario in scenarios if scenario.num_adapters == num_adapters]
        name = f"{peer.name}-{turn + 1}"
        for scenario in chosen:  # of an earlier run
            (options.out / str(scenario) / f"{name}.json").unlink(missing_ok=True)
        try:
            for scenario, result in _run(peer, chosen, num_adapters, options, turn, console):
                path = options.out / str(scenario) / f"{name}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(result) + "\n")
                console.print(f"  {name} {scenario}: {result['output_throughput']:.1f} tokens/s")
        except RuntimeError as error:
            console.print(f"  {name} with {num_adapters} adapters: {error}", style="red", markup=False)


def _run(
    peer: Peer, scenarios: Sequence[Scenario], num_adapters: int, options: PeerOptions, turn: int, console: Console
) -> list[tuple[Scenario, Figures]]:
    specs = [scenario.spec(options, seed=turn) for scenario in scenarios]
    if peer.name == "peft":
        return [(s, measure_peft(spec, options)) for s, spec in zip(scenarios, specs, strict=True)]
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = options.out / "logs" / f"{peer.name}-{num_adapters}-{turn + 1}.log"
    with peer.serve(options, port, num_adapters, url, log):
        plans = [
            Plan(
                url,
                peer.dialect(options, num_adapters),
                spec,
                label=peer.name,
                num_warmups=0 if num_adapters else scenario.concurrency,
                warm_adapters=num_adapters > 0,
                timeout_s=options.timeout_s,
            )
            for scenario, spec in zip(scenarios, specs, strict=True)
        ]
        return [(scenario, measure(plan, console)) for scenario, plan in zip(scenarios, plans, strict=True)]


def _chosen(names: Sequence[str], options: PeerOptions, console: Console) -> list[Peer]:
    """Those that are named, or all that are there."""
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ValueError(f"there is no peer {unknown[0]!r}; there are {', '.join(PEERS)}")
    chosen = []
    for name, peer in PEERS.items():
        missing = peer.missing(options)
        if missing and name in names:
            raise ValueError(f"{name} needs {missing}")
        if missing and not names:
            console.print(f"left out: {name} needs {missing}", markup=False)
        elif name in names or not names:
            chosen.append(peer)
    return chosen


def _bandwidth() -> float:
    """Bytes per second, by a child: its buffer and threads are gone before anything is measured."""
    code = f"from loadtest.bandwidth import read_bandwidth; print(read_bandwidth({BANDWIDTH_BYTES}))"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="multilora bench peers", description=__doc__, formatter_class=raw)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base")
    parser.add_argument("--adapters", type=Path, help="folder of adapters; the first by name are used")
    parser.add_argument("--scenarios", nargs="+", default=["0@1", "0@8", "0@32", "8@8", "32@32"])
    parser.add_argument("--peers", nargs="*", default=[], help="which of them; default all that are configured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--highest-id", type=int, default=30_000, help="of random prompts, not included")
    parser.add_argument("--min-requests", type=int, default=2, help="of a scenario, in whole waves")
    parser.add_argument("--max-rank", type=int, default=64, help="of the adapters")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one request")
    parser.add_argument("--vllm-python", default=os.environ.get("MULTILORA_VLLM_PYTHON"))
    parser.add_argument("--vllm-preload", default="", help="LD_PRELOAD of vLLM's process")
    parser.add_argument("--llama-server", default=os.environ.get("MULTILORA_LLAMA_SERVER"))
    gguf = {name: os.environ.get(f"MULTILORA_LLAMA_{name}") for name in ("MODEL", "ADAPTERS")}
    parser.add_argument("--llama-model", type=Path, default=gguf["MODEL"], help="GGUF file of the base")
    parser.add_argument(
        "--llama-adapters", type=Path, default=gguf["ADAPTERS"], help="folder of the adapters' GGUF files"
    )
    parser.add_argument("--peft-python", default=os.environ.get("MULTILORA_PEFT_PYTHON"))
    for name in ("ours", "vllm", "llamacpp"):
        parser.add_argument(f"--{name}-flags", default="", help="more of its command line, in one string")
    return parser


def _options(parsed: argparse.Namespace, scenarios: Sequence[Scenario]) -> PeerOptions:
    return PeerOptions(
        model=parsed.model,
        adapters=_sorted(parsed.adapters, "*/adapter_config.json", lambda path: path.parent),
        out=parsed.out.resolve(),
        prompt_tokens=parsed.prompt_tokens,
        output_tokens=parsed.output_tokens,
        highest_id=parsed.highest_id,
        min_requests=parsed.min_requests,
        max_adapters=max(scenario.num_adapters for scenario in scenarios),
        max_concurrency=max(scenario.concurrency for scenario in scenarios),
        max_rank=parsed.max_rank,
        threads=parsed.threads,
        timeout_s=parsed.timeout,
        vllm_python=parsed.vllm_python,
        llama_server=parsed.llama_server,
        llama_model=parsed.llama_model,
        llama_adapters=_sorted(parsed.llama_adapters, "*.gguf"),
        peft_python=parsed.peft_python,
        flags=tuple((name, getattr(parsed, f"{name}_flags")) for name in ("ours", "vllm", "llamacpp")),
        preload=parsed.vllm_preload,
    )


def _sorted(folder: Path | None, pattern: str, of: Callable[[Path], Path] = lambda path: path) -> tuple[Path, ...]:
    return tuple(sorted(of(path) for path in folder.glob(pattern))) if folder else ()
