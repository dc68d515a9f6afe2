"""`multilora bench serve`: a load test of any server that speaks OpenAI's API (or llama.cpp's dialect of it).

The workload is drawn from a seed before it starts, the same for every server. With --repeats, run k has seed + k: the
same prompts again would come from prefix caches.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from loadtest.arrivals import parse_arrivals
from loadtest.client import Progress, Send, http_sender, run
from loadtest.dialects import DIALECTS, Dialect
from loadtest.lengths import parse_lengths
from loadtest.options import Parser, count, count_or_none, positive
from loadtest.outputs import check_writable
from loadtest.plot import draw_svg
from loadtest.report import Figures, make_report, parse_goals
from loadtest.table import print_report
from loadtest.wire import Target, resolve
from loadtest.workload import Request, WorkloadSpec, draw, expand_names

_WARMUP_SEED = 1 << 40  # added to the seed: prompts of the warm-up are none of the run's
_WARMUP_TOKENS = 8  # asked of each adapter, at most
_DEFAULTS = WorkloadSpec()


@dataclass(frozen=True)
class Plan:
    """A run to be made."""

    url: str
    dialect: Dialect
    spec: WorkloadSpec
    goals: dict[str, float] = field(default_factory=dict)
    label: str = ""
    num_warmups: int = 1
    warm_adapters: bool = False  # ask for every adapter once before the run
    max_concurrency: int | None = None
    timeout_s: float = 600.0
    api_key: str | None = None


def measure(plan: Plan, console: Console) -> Figures:
    """Warm up, run, report. Errors: ValueError for a plan that makes no sense; RuntimeError if nothing answers."""
    return uvloop.run(_measure(plan, console))


def main(arguments: Sequence[str]) -> None:
    """The command. Ends with status 2 for what can't be asked, 1 where not one request was answered."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console()
    try:
        _check_outputs(options)
        plans = [_plan(options, repeat) for repeat in range(options.repeats)]
        results = [measure(plan, console) for plan in plans]
    except ValueError as error:
        parser.exit(2, f"multilora bench serve: {error}\n")
    except RuntimeError as error:
        parser.exit(1, f"multilora bench serve: {error}\n")
    for number, result in enumerate(results, 1):
        print_report(result, console)
        if options.out:
            _write(result, _numbered(options.out, number, options.repeats), options.details)
    if options.plot:
        seeds = [f"{plan.label}, seed {plan.spec.seed}" for plan in plans]
        options.plot.write_text(draw_svg(list(zip(seeds, results, strict=True))))
    for plan, result in zip(plans, results, strict=True):
        if not result["completed"]:
            parser.exit(1, f"multilora bench serve: not one request of seed {plan.spec.seed} was answered\n")


async def _measure(plan: Plan, console: Console) -> Figures:
    target = resolve(plan.url)
    arrivals, requests = draw(plan.spec, plan.dialect.adapters)
    warmups = _warmups(plan)
    if warmups:
        sender = _sender(plan, target, warmups)
        closed = dataclasses.replace(arrivals, concurrency=8)
        done = await run(sender, closed, warmups, Progress(len(warmups)), plan.max_concurrency)
        failed = [outcome.error for outcome in done.outcomes if outcome.error]
        if len(failed) == len(warmups):
            raise RuntimeError(f"no warm-up request was answered: {failed[0]}")
    sender, progress = _sender(plan, target, requests), Progress(len(requests))
    with _shown(progress, console):
        done = await run(sender, arrivals, requests, progress, plan.max_concurrency)
    about = {
        "backend": plan.dialect.kind,
        "endpoint_type": plan.dialect.kind,
        "label": plan.label,
        "model_id": plan.dialect.base,
        "tokenizer_id": None,
        "max_concurrency": plan.max_concurrency,
    }
    return make_report(done, requests, plan.spec, arrivals, plan.dialect.adapters, plan.goals, about)


def _warmups(plan: Plan) -> list[Request]:
    """Requests of the same kind as the run's, of another seed; then a short one for each adapter if wanted."""
    adapters = range(len(plan.dialect.adapters)) if plan.warm_adapters else range(0)
    number = plan.num_warmups + len(adapters)
    if not number:
        return []
    spec = dataclasses.replace(plan.spec, seed=plan.spec.seed + _WARMUP_SEED, num_requests=number, arrivals="closed:8")
    _, drawn = draw(spec, plan.dialect.adapters)
    named = [
        dataclasses.replace(r, adapter=a, max_tokens=min(r.max_tokens, _WARMUP_TOKENS))
        for r, a in zip(drawn[plan.num_warmups :], adapters, strict=True)
    ]
    return drawn[: plan.num_warmups] + named


def _sender(plan: Plan, target: Target, requests: Sequence[Request]) -> Send:
    """Bodies are encoded here, before the clock runs."""
    path, key = plan.dialect.path, plan.api_key
    encoded = {r.index: target.encode(path, plan.dialect.body(r, plan.spec), key) for r in requests}
    return http_sender(target, encoded, plan.timeout_s)


@contextlib.contextmanager
def _shown(progress: Progress, console: Console) -> Iterator[None]:
    """A progress bar, looked after four times a second rather than at every request."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=progress.num_requests, state="")

        def look() -> None:
            state = f"{progress.num_sent - progress.num_ended} open"
            if progress.num_failed:
                state += f", [red]{progress.num_failed} failed[/]"
            bar.update(task, completed=progress.num_ended, state=state, refresh=True)

        async def watch() -> None:
            while True:
                look()
                await asyncio.sleep(0.25)

        watcher = asyncio.get_running_loop().create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()
            look()


def _plan(options: argparse.Namespace, repeat: int) -> Plan:
    goals, arrivals = parse_goals(options.goodput), parse_arrivals(options.arrivals)
    base, adapters = _names(options)
    fields: dict[str, Any] = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(WorkloadSpec)
        if hasattr(options, field.name)
    }
    fields |= {"seed": options.seed + repeat, "num_adapters": len(adapters)}
    if not arrivals.is_open:
        fields["arrivals"] = f"closed:{arrivals.bounded(options.max_concurrency)}"
    return Plan(
        options.url,
        Dialect(options.backend, base, adapters),
        WorkloadSpec(**fields),
        goals,
        options.label or base,
        options.warmup,
        options.warm_adapters,
        options.max_concurrency,
        options.timeout,
        options.api_key,
    )


def _names(options: argparse.Namespace) -> tuple[str, list[str]]:
    """The base's and the adapters' names; what isn't given is asked of the server."""
    resolve(options.url)
    if options.model and options.adapters != "auto":
        return options.model, expand_names(options.adapters)
    headers = {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    try:
        answer = httpx.get(f"{options.url.rstrip('/')}/v1/models", headers=headers, timeout=30)
        answer.raise_for_status()
        cards = answer.json()["data"]
    except (httpx.HTTPError, httpx.InvalidURL, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(f"{options.url}/v1/models gives no list of models: {error}") from None
    bases = [card["id"] for card in cards if not card.get("parent")]
    if not (options.model or bases):
        raise RuntimeError(f"{options.url}/v1/models lists no base: give its name with --model")
    adapters = [card["id"] for card in cards if card.get("parent")]
    return options.model or bases[0], adapters if options.adapters == "auto" else expand_names(options.adapters)


def _check_outputs(options: argparse.Namespace) -> None:
    """Errors: ValueError for what could not be written after the run."""
    if options.out:
        numbered = [_numbered(options.out, number, options.repeats) for number in range(1, options.repeats + 1)]
        for path in {options.out, *numbered}:
            check_writable(path)
    if options.plot:
        check_writable(options.plot)


def _numbered(path: Path, number: int, repeats: int) -> Path:
    return path if repeats == 1 else path.with_stem(f"{path.stem}-{number}")


def _write(result: Figures, path: Path, with_details: bool) -> None:
    large = () if with_details else ("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times")
    dropped = {*large, *(() if with_details else ("queue_times", "generated_texts", "errors"))}
    path.write_text(json.dumps({key: value for key, value in result.items() if key not in dropped}) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="multilora bench serve", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server, without /v1")
    parser.add_argument("--backend", choices=DIALECTS, default="openai", help="how the server is asked")
    parser.add_argument("--model", help="the base's name; else what /v1/models lists")
    parser.add_argument(
        "--adapters",
        type=_valid(expand_names),
        default="",
        help="names: a,b or bench-[000-031]; auto: all that /v1/models lists",
    )
    parser.add_argument("--label", help="of the result; else the base's name")
    parser.add_argument("--num-requests", type=count, default=_DEFAULTS.num_requests)
    parser.add_argument(
        "--arrivals", type=_valid(parse_arrivals), default=_DEFAULTS.arrivals, help=_choices("arrivals")
    )
    parser.add_argument(
        "--max-concurrency", type=count, help="a further bound; in an open loop waiting for it is latency"
    )
    parser.add_argument("--popularity", default=_DEFAULTS.popularity, help=_choices("popularity"))
    parser.add_argument("--base-share", type=float, default=_DEFAULTS.base_share, help="of requests without adapter")
    lengths = _valid(parse_lengths)
    parser.add_argument("--prompt-tokens", type=lengths, default=_DEFAULTS.prompt_tokens, help=_choices("lengths"))
    parser.add_argument("--output-tokens", type=lengths, default=_DEFAULTS.output_tokens, help="as --prompt-tokens")
    parser.add_argument("--prompt-kind", choices=("ids", "text"), default=_DEFAULTS.prompt_kind)
    parser.add_argument("--lowest-id", type=count_or_none, default=_DEFAULTS.lowest_id, help="of random prompts")
    parser.add_argument(
        "--highest-id", type=count, default=_DEFAULTS.highest_id, help="of random prompts, not included"
    )
    parser.add_argument("--temperature", type=float, default=_DEFAULTS.temperature)
    parser.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=_DEFAULTS.ignore_eos)
    parser.add_argument("--strict", action="store_true", help="send OpenAI's own fields only")
    parser.add_argument("--extra-body", type=_json_object, default="{}", help="JSON that goes into every request")
    parser.add_argument("--goodput", nargs="*", default=[], help="limits in ms, e.g. ttft:500 tpot:50 e2el:5000")
    parser.add_argument("--seed", type=count_or_none, default=_DEFAULTS.seed)
    parser.add_argument("--repeats", type=count, default=1)
    parser.add_argument("--warmup", type=count_or_none, default=1, help="requests before the run, not counted")
    parser.add_argument("--warm-adapters", action="store_true", help="ask for each adapter once before the run")
    parser.add_argument("--timeout", type=positive, default=600.0, help="seconds for one request")
    parser.add_argument("--api-key", type=_api_key)
    parser.add_argument("--out", type=Path, help="write the result here (JSON); with --repeats numbered")
    parser.add_argument("--details", action=argparse.BooleanOptionalAction, default=True, help="lists by request too")
    parser.add_argument("--plot", type=Path, help="write a picture here (SVG)")
    return parser


def _valid(parse: Callable[[str], object]) -> Callable[[str], str]:
    """The text as it is, where `parse` takes it."""

    def read(text: str) -> str:
        try:
            parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return read


def _api_key(text: str) -> str:
    if not (text.isascii() and text.isprintable()):
        raise argparse.ArgumentTypeError("printable ASCII only: it goes into a header")
    return text


def _json_object(text: str) -> dict[str, object]:
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    raise argparse.ArgumentTypeError(f"{text!r}: a JSON object, such as '{{\"top_p\": 0.9}}'")


def _choices(kind: str) -> str:
    return {
        "arrivals": "poisson:RATE, gamma:RATE:CV, constant:RATE, all or closed:CONCURRENCY",
        "popularity": "uniform, zipf:S, power:ALPHA, distinct, shares:W,W,... or shares:NAME=W,*=W",
        "lengths": "N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:LOW:HIGH]",
    }[kind]
