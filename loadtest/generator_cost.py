"""What the load generator itself costs: its processor time a token and a request, and how late its stamps are.

    python -m loadtest.generator_cost --streams 256 --gap-ms 20

The other side is a canned server in its own process, whose events say when they were written.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from multiprocessing.connection import Connection

import numpy as np
import uvloop

from loadtest.canned import paced, port_of, start_canned
from loadtest.client import Progress, Run, http_sender, run
from loadtest.dialects import Dialect
from loadtest.wire import resolve
from loadtest.workload import WorkloadSpec, draw


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--gap-ms", type=float, default=20.0)
    parser.add_argument("--output-tokens", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    options = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(theirs, options.gap_ms / 1e3), daemon=True
    )
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}"
    try:
        short = _cost(url, options, 1)
        long = _cost(url, options, options.output_tokens)
    finally:
        server.terminate()
        server.join(10)
    extra_tokens = options.streams * (options.output_tokens - 1)
    token_s = (long.cpu_s - short.cpu_s) / extra_tokens
    late = np.percentile(long.lateness_s(), (50, 99, 100)) * 1e3
    rate = options.streams / options.gap_ms * 1e3
    print(f"{options.streams} streams at {rate:.0f} tokens/s:")
    print(f"processor time of a token {token_s * 1e6:.1f} us: {rate * token_s:.1%} of one core")
    print(f"processor time of a request without its tokens {(short.cpu_s / options.streams - token_s) * 1e6:.0f} us")
    print(f"a stamp after its event was written: median {late[0]:.2f} ms, p99 {late[1]:.2f} ms, most {late[2]:.2f} ms")


class _Cost:
    """A run and the generator's processor time over all of it, reading the answers included."""

    def __init__(self, done: Run, cpu_s: float) -> None:
        self.done, self.cpu_s = done, cpu_s

    def lateness_s(self) -> list[float]:
        """By token: from when its event was written to its stamp."""
        return [
            stamp - float(written)
            for outcome in self.done.outcomes
            for stamp, written in zip(outcome.stamps, outcome.text.split(";")[:-1], strict=True)
        ]


def _cost(url: str, options: argparse.Namespace, output_tokens: int) -> _Cost:
    spec = WorkloadSpec(
        num_requests=options.streams,
        arrivals=f"closed:{options.streams}",
        prompt_tokens=str(options.prompt_tokens),
        output_tokens=str(output_tokens),
    )
    arrivals, requests = draw(spec, [])
    dialect, target = Dialect("openai", "canned", []), resolve(url)
    encoded = {r.index: target.encode(dialect.path, dialect.body(r, spec)) for r in requests}
    before = _cpu_s()
    done = uvloop.run(run(http_sender(target, encoded, 120), arrivals, requests, Progress(len(requests))))
    return _Cost(done, _cpu_s() - before)


def _serve(port: Connection, gap_s: float) -> None:
    async def forever() -> None:
        server = await start_canned(paced(gap_s, gap_s))
        port.send(port_of(server))
        await server.serve_forever()

    uvloop.run(forever())


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
