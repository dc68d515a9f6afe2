"""What is printed when the server serves: what was resolved, and examples that work as pasted."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from server.config import ServerConfig, is_loopback
from server.engine.messages import EngineReady

MAX_NAMES = 12


def show_banner(
    console: Console,
    config: ServerConfig,
    ready: EngineReady,
    port: int,
    adapters: list[str],
    examples: dict[str, str],
    warnings: Sequence[str] = (),
) -> None:
    """Print the facts, the models' names, and a curl and an OpenAI-SDK example."""
    facts = Table.grid(padding=(0, 2))
    for label, value in ready.facts:
        facts.add_row(label, value)
    more = f" and {len(adapters) - MAX_NAMES} more" if len(adapters) > MAX_NAMES else ""
    shown = ", ".join(adapters[:MAX_NAMES]) + more
    facts.add_row("models", f"{', '.join(config.served_names)} (base); {shown or 'no adapters yet'}")
    console.print(facts, highlight=False)
    for line in [*warnings_of(config), *(f"warning: {warning}" for warning in warnings[:MAX_NAMES])]:
        console.print(line, style="yellow", highlight=False, markup=False)
    url = f"http://{_shown_host(config.host)}:{port}"
    served = [(name, examples[name]) for name in adapters if name in examples]
    name, prompt = served[0] if served else (config.served_names[0], "Name three colours.")
    console.print(f"\nServing on {url}\n", style="bold", highlight=False)
    for example in (curl_example, sdk_example):
        text = example(url, name, prompt, bool(config.api_keys))
        console.print(text + "\n", markup=False, highlight=False, soft_wrap=True)


def warnings_of(config: ServerConfig) -> list[str]:
    """What whoever starts the server should know before others reach it."""
    if config.api_keys or is_loopback(config.host):
        return []
    return [f"warning: --host {config.host} is reachable from other machines and no --api-key is set: anyone may ask"]


def curl_example(url: str, model: str, prompt: str, has_key: bool) -> str:
    """A shell command that asks `model` one thing."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0})
    key = " -H 'Authorization: Bearer YOUR_KEY'" if has_key else ""
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n  -d {shlex.quote(body)}"


def sdk_example(url: str, model: str, prompt: str, has_key: bool) -> str:
    """The same with the openai package."""
    key = "YOUR_KEY" if has_key else "none"
    return (
        "from openai import OpenAI\n"
        f'client = OpenAI(base_url="{url}/v1", api_key="{key}")\n'
        "answer = client.chat.completions.create(\n"
        f"    model={json.dumps(model)},\n"
        f'    messages=[{{"role": "user", "content": {json.dumps(prompt)}}}],\n'
        "    temperature=0,\n"
        ")\n"
        "print(answer.choices[0].message.content)"
    )


def _shown_host(host: str) -> str:
    """An address that a client on this machine can use."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
