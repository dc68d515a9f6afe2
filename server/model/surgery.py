"""Replacing the base's projections, embedding and head by modules that add each row's delta."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from adapters_store.manifest import BaseManifest, Site
from kernels.types import SiteGroup
from server.adapters.layer import AdaptedEmbedding, AdaptedLinear, PlanName, StepState, pack
from server.model.manifest import CERTIFIED_TYPES
from server.model.rotary import replace_rotary

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Replacement:
    """One line of the replacement table: what stands where now."""

    path: str
    was: str
    now: str
    group: str


def adapt(model: nn.Module, manifest: BaseManifest, step: StepState) -> list[Replacement]:
    """Put an adapted module at every site of `manifest`, and per-row rotary where length matters.

    The weights' values stay; packed ones are copied once, group by group, and the originals freed.
    Returns the replacement table.
    """
    if manifest.model_type not in CERTIFIED_TYPES:
        logger.info(
            "%s is not a certified model type (%s): it runs with its projections unpacked",
            manifest.model_type,
            ", ".join(sorted(CERTIFIED_TYPES)),
        )
    table: list[Replacement] = []
    rows = manifest.site_rows
    for _, members in groupby(_by_group(manifest.sites), key=lambda site: site.group):
        table += _adapt_group(model, list(members), rows, step)
    for path in replace_rotary(model, model.config, step):
        table.append(Replacement(path, "rotary embedding", "PerRowRotary", ""))
    for line in table:
        logger.debug("%s: %s -> %s %s", line.path, line.was, line.now, line.group)
    return table


def site_group(sites: list[Site], rows: dict[str, int]) -> SiteGroup:
    """The geometry of one packed projection, for the kernels; `sites` are its slices in order."""
    return SiteGroup(
        rows=tuple(rows[site.name] for site in sites),
        offsets=tuple(site.offset for site in sites),
        widths=tuple(site.out_features for site in sites),
        in_features=sites[0].in_features,
    )


def _by_group(sites: Iterable[Site]) -> list[Site]:
    return sorted(sites, key=lambda site: (site.group, site.slice))


def _adapt_group(model: nn.Module, sites: list[Site], rows: dict[str, int], step: StepState) -> list[Replacement]:
    """Replace the modules of one group: an embedding, one projection, or several packed into one."""
    bases = [model.get_submodule(site.module) for site in sites]
    first = sites[0]
    replacements: list[nn.Module]
    if first.kind == "embedding":
        replacements = [AdaptedEmbedding(bases[0], rows[first.name], step)]
    elif len(sites) == 1:
        plan: PlanName = "head" if first.kind == "head" else "body"
        replacements = [AdaptedLinear(bases[0], site_group(sites, rows), step, plan)]
    else:
        replacements = list(pack(bases, site_group(sites, rows), step))
    table = []
    for site, base, replacement in zip(sites, bases, replacements, strict=True):
        model.set_submodule(site.module, replacement)
        table.append(Replacement(site.module, type(base).__name__, type(replacement).__name__, site.group))
    return table
