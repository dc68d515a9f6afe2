"""What an adapter folder is, whether and how it would be served, and everything that is wrong with it."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import msgspec

from adapters_store.compile.job import ATTEMPTS, BACKOFF_S, read_files_of
from adapters_store.compile.lower import CompiledAdapter, examine_adapter
from adapters_store.compile.parse import LoraOptions
from adapters_store.errors import AdapterNotFound, AdapterTooLarge, AdapterUnavailable
from adapters_store.image import image_data_bytes
from adapters_store.limits import Limits
from adapters_store.manifest import BaseManifest
from adapters_store.ref import FileVersion, SourceVersion, digest_of
from adapters_store.sources.folder import PICKLE_FILE, READ_FILES, FileChanged, note_files, read_file

ANYWHERE = Path("/")


class InspectJob(msgspec.Struct, frozen=True, tag=True):
    """What the compiler process is asked to report on: files below a source, or as fetched in `folder`."""

    version: SourceVersion
    limits: Limits
    folder: str | None = None


class Problem(NamedTuple):
    """An error that refuses an adapter."""

    code: str
    message: str


class AdapterReport(msgspec.Struct, tag=True):
    """Plain data about one adapter folder. With problems it is refused, and the rest says what was found.

    `base` is its folder; over HTTP only the folder's name, for where it is on this machine is nobody's business.
    """

    path: str
    base: str
    family: str = ""
    digest: str = ""
    file_bytes: int = 0
    """bytes of the files the compiler reads"""
    image_bytes: int = 0
    """bytes of the image's data section: what disk, host and device hold; 0 when it is refused"""
    ranks: dict[int, int] = msgspec.field(default_factory=dict)
    """rank -> number of modules that have it; 0 is a trained bias alone"""
    targets: dict[str, int] = msgspec.field(default_factory=dict)
    """projection -> number of layers, e.g. {"q_proj": 30, "embed_tokens": 1}"""
    options: dict[str, str] = msgspec.field(default_factory=dict)
    problems: list[Problem] = msgspec.field(default_factory=list)
    warnings: list[str] = msgspec.field(default_factory=list)
    dropped: list[str] = msgspec.field(default_factory=list)

    @property
    def is_served(self) -> bool:
        return not self.problems

    def render(self) -> str:
        """The report in plain words, several lines."""
        lines = [self.path, f"  what it is    {self._family()}", f"  base          {self.base}"]
        if self.targets:
            lines.append(f"  targets       {_counted(self.targets, 'layer')}")
        if self.ranks:
            lines.append(f"  ranks         {', '.join(f'{r} ({n}x)' for r, n in sorted(self.ranks.items()))}")
        lines += [f"  {name:<13} {value}" for name, value in self.options.items()]
        if self.digest:
            lines.append(f"  digest        {self.digest}")
        lines.append(f"  files         {_bytes(self.file_bytes)}")
        if self.is_served:
            size = _bytes(self.image_bytes)
            lines.append(f"  when served   {size} on disk as an image, {size} in host memory, {size} on the device")
        lines += [f"  dropped       {dropped}" for dropped in self.dropped]
        lines += [f"  warning       {warning}" for warning in self.warnings]
        lines.append("  verdict       served" if self.is_served else self._refusal())
        lines += [f"    {n}. {problem.message} [{problem.code}]" for n, problem in enumerate(self.problems, start=1)]
        return "\n".join(lines)

    def _family(self) -> str:
        if not self.family:
            return "no PEFT adapter that could be read"
        return "LoRA (PEFT family LORA)" if self.family == "LORA" else f"PEFT family {self.family}"

    def _refusal(self) -> str:
        count = len(self.problems)
        return f"  verdict       refused: {count} problem{'s' if count > 1 else ''}"


def inspect_adapter(path: Path, manifest: BaseManifest, limits: Limits | None = None) -> AdapterReport:
    """Examine the adapter folder `path` for the base, as the server would compile it. Nothing is written.

    What is wrong with the adapter is in the report; AdapterNotFound when `path` has no adapter_config.json.
    """
    limits = limits or Limits()
    folder = Path(os.path.realpath(path))
    noted = note_files(ANYWHERE, folder)
    if noted is None:
        raise AdapterNotFound(f"{path} is no adapter folder: it has no adapter_config.json")
    report = AdapterReport(str(path), manifest.name_or_path)
    report.file_bytes = sum(file.size for file in noted if file.name in READ_FILES)
    try:
        limits.check_files(file for file in noted if file.name in READ_FILES)
    except AdapterTooLarge as error:
        report.problems.append(Problem(error.code, error.message))
        return report
    files = _read_files(folder, noted, report)
    compiled = examine_adapter(files, manifest, limits)
    _fill(report, compiled, manifest)
    return report


def run_inspection(job: InspectJob, manifest: BaseManifest) -> AdapterReport:
    """Examine the files of `job.version`, read as a compile reads them. Nothing is written.

    AdapterUnavailable when they keep changing, AdapterNotFound when they are gone, RawDamaged as in RawFolder.
    """
    report = AdapterReport(job.version.name, Path(manifest.name_or_path).name)
    report.file_bytes = sum(file.size for file in job.version.files if file.name in READ_FILES)
    for attempt in range(ATTEMPTS):
        try:
            read = read_files_of(job.version, job.limits, job.folder)
        except FileChanged:
            time.sleep(BACKOFF_S * 2**attempt)
            continue
        except AdapterTooLarge as error:
            report.problems.append(Problem(error.code, error.message))
            return report
        report.file_bytes = sum(len(content) for content in read.files.values())
        report.digest = read.digest
        _fill(report, examine_adapter(read.files, manifest, job.limits), manifest)
        return report
    raise AdapterUnavailable(f"the files of adapter {job.version.name} keep changing while they are read; try again")


def _read_files(folder: Path, noted: tuple[FileVersion, ...], report: AdapterReport) -> dict[str, memoryview]:
    try:
        files = {file.name: read_file(ANYWHERE, folder, file) for file in noted if file.name in READ_FILES}
    except FileChanged as error:
        raise AdapterUnavailable(f"{error} changed while it was read; try again") from error
    report.digest = digest_of({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
    for file in noted:
        real = Path(os.path.realpath(folder / file.name))
        if not real.is_relative_to(folder):
            report.warnings.append(f"{file.name} is a link to {real}: served only when that is below the root too")
        if file.name == PICKLE_FILE:
            files[PICKLE_FILE] = memoryview(b"")
    return files


def _fill(report: AdapterReport, compiled: CompiledAdapter, manifest: BaseManifest) -> None:
    report.family = compiled.family
    report.problems += [Problem(error.code, error.message) for error in compiled.problems]
    report.warnings += compiled.warnings
    report.dropped += compiled.dropped
    report.ranks = dict(Counter(lowered.rank for lowered in compiled.sites))
    names = (lowered.site.name for lowered in compiled.sites)
    report.targets = dict(Counter(name.partition(".")[2] or name for name in names))
    if compiled.options is not None:
        report.options = _described(compiled.options)
    if report.is_served:
        report.image_bytes = image_data_bytes(compiled.sites, manifest)


def _described(options: LoraOptions) -> dict[str, str]:
    """The options that shape the delta, in words."""
    scale = "lora_alpha / sqrt(r)" if options.use_rslora else "lora_alpha / r"
    described = {"r, lora_alpha": f"{options.r}, {options.lora_alpha:g}, scale {scale}"}
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(options, name):
            described[name] = ", ".join(f"{key} = {value:g}" for key, value in getattr(options, name).items())
    if options.lora_bias:
        described["lora_bias"] = "yes"
    if options.bias != "none":
        described["bias"] = f"trained biases ({options.bias})"
    if options.ensure_weight_tying:
        described["tied"] = "the head takes the embedding's delta (ensure_weight_tying)"
    return described


def _counted(counts: dict[str, int], what: str) -> str:
    return ", ".join(name if count == 1 else f"{name} ({count} {what}s)" for name, count in counts.items())


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
