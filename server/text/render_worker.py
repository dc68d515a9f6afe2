"""The process that renders adapters' own chat templates: other people's code, so it works under bounds.

`python -m server.text.render_worker` reads jobs from stdin and writes replies to stdout, one at a time, each a
frame (adapters_store.child) of JSON; the first reply is an empty frame when it is ready. Its address space is
bounded here, its time by the parent, which kills it. It ends at the end of stdin, with its parent, or after a
reply whose `is_last` is true.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgspec

from adapters_store.child import end_with_parent, frame, read_frame, take_replies
from server.text.templates import ChatTemplate, ChatTemplateError

MAX_RENDER_BYTES = 512 << 20
"""of address space beyond what the fresh process has"""
MAX_IDLE_BYTES = 256 << 20  # beyond that the process ends after its reply: the next render must find room
MAX_TEMPLATES = 64  # kept compiled


class RenderJob(msgspec.Struct, frozen=True, kw_only=True):
    """One chat to render; fields as of ChatTemplate.render."""

    source: str
    special_tokens: dict[str, str]
    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    continue_final_message: bool
    variables: dict[str, Any]
    max_chars: int


class Rendered(msgspec.Struct, frozen=True, tag=True):
    """The text."""

    text: str


class TooLong(msgspec.Struct, frozen=True, tag=True):
    """The text is longer than the job allows."""

    num_chars: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The template refuses the messages, in its own words."""

    message: str


class NotCompiled(msgspec.Struct, frozen=True, tag=True):
    """The template is broken."""

    message: str


class OutOfMemory(msgspec.Struct, frozen=True, tag=True):
    """It wanted more than MAX_RENDER_BYTES."""


Outcome = Rendered | TooLong | Refused | NotCompiled | OutOfMemory


class Reply(msgspec.Struct, frozen=True):
    """What came of a job, and whether the process ends now."""

    outcome: Outcome
    is_last: bool = False


class Templates:
    """Compiled templates, the most recently used ones."""

    def __init__(self) -> None:
        self._compiled: OrderedDict[tuple[str, tuple[tuple[str, str], ...]], ChatTemplate] = OrderedDict()

    def get(self, job: RenderJob) -> ChatTemplate:
        """The job's template. Raises what compiling raises."""
        key = job.source, tuple(sorted(job.special_tokens.items()))
        if key not in self._compiled:
            self._compiled[key] = ChatTemplate(job.source, job.special_tokens)
            if len(self._compiled) > MAX_TEMPLATES:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key]


def main() -> None:
    """Serve jobs from stdin until it ends."""
    end_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = take_replies()
    fresh_bytes = _address_space_bytes()
    resource.setrlimit(resource.RLIMIT_AS, (fresh_bytes + MAX_RENDER_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    templates = Templates()
    replies.write(frame(b""))
    while (message := read_frame(sys.stdin.buffer)) is not None:
        outcome = _run(message, templates)
        is_last = isinstance(outcome, OutOfMemory) or _address_space_bytes() > fresh_bytes + MAX_IDLE_BYTES
        replies.write(frame(msgspec.json.encode(Reply(outcome, is_last))))
        if is_last:
            return


def _run(message: bytes, templates: Templates) -> Outcome:
    # A template can raise whatever Python raises: this is the boundary that turns it into words.
    try:
        job = msgspec.json.decode(message, type=RenderJob)
        try:
            template = templates.get(job)
        except ChatTemplateError as error:
            return NotCompiled(str(error))
        text = template.render(
            job.messages,
            add_generation_prompt=job.add_generation_prompt,
            continue_final_message=job.continue_final_message,
            variables=job.variables,
        )
        return Rendered(text) if len(text) <= job.max_chars else TooLong(len(text))
    except ChatTemplateError as error:
        return Refused(str(error))
    except MemoryError:
        return OutOfMemory()
    except Exception as error:
        return Refused(f"{type(error).__name__} in the template")


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
