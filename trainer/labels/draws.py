"""Equally spaced draws from the ids of rows, in two levels: which groups of neighbouring ids hold the points, then
which ids of these. So a draw looks at about 2 sqrt(V draws) numbers of a row instead of V, and shards of the vocabulary
are one level more.

    logits [n, v] --Summary.of--> log-sum-exp, mass of each group   --draw--> an id for every point in this shard's mass

Sums over groups and inside one are float64: in float32 an id of 1e-8 would vanish beside a sum near 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from trainer.labels.encoding import ABSENT
from trainer.model.fast import cache_blocks, row_dots
from trainer.model.fast.plain import well_scaled

NEARLY_ONE = 1.0 - 1e-12
_ENTRIES = 2**16  # looked at together inside groups: they stay in cache


@dataclass(frozen=True, slots=True)
class Summary:
    """What one pass over the logits [n, v] of a shard leaves, at the temperature; shares are of this shard's mass."""

    log_sum: torch.Tensor  # float64 [n, 1], of all ids
    mean: torch.Tensor  # float64 [n, 1]: of the logits, weighted by their probabilities
    groups: torch.Tensor  # float64 [n, v / depth] shares, of ids that may be drawn
    depth: int  # ids of a group; the last one may have fewer

    @classmethod
    def of(cls, logits: torch.Tensor, temperature: float, apart: torch.Tensor, num_draws: int) -> Summary:
        """`apart` int64 [c]: columns that are not drawn."""
        depth = _depth(logits.shape[1], num_draws)
        blocks = list(cache_blocks(logits)) or [slice(0)]
        parts = [_read(logits[block], temperature, apart, depth) for block in blocks]
        total, mean, groups = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return cls(total, mean, groups, depth)


def _depth(v: int, num_draws: int) -> int:
    """About the root of v / draws; a number that divides v spares a look at which ids the last group has."""
    least = max(1, math.isqrt(v // num_draws))
    return next((depth for depth in range(least, 2 * least) if v % depth == 0), least)


def _read(
    rows: torch.Tensor, temperature: float, apart: torch.Tensor, depth: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-sum-exp, mean and groups of a block of rows."""
    logits = rows.float() / temperature if temperature != 1.0 else rows.float()
    shift = torch.zeros(len(rows), 1, device=rows.device)
    terms = logits.exp()
    total = terms.sum(1, keepdim=True)
    mean = row_dots(terms, logits)
    if not (well_scaled(total) & mean.isfinite()).all():
        shift = logits.amax(1, keepdim=True)
        logits = (logits - shift).clamp_(min=ABSENT)
        terms = logits.exp()
        total = terms.sum(1, keepdim=True)
        mean = row_dots(terms, logits)
    terms[:, apart] = 0.0
    return total.double().log() + shift, (mean / total).double() + shift, _groups(terms, depth).double() / total


def _groups(terms: torch.Tensor, depth: int) -> torch.Tensor:
    """[n, ceil(v / depth)]: sums of so many neighbouring columns of [n, v]."""
    if depth == 1:
        return terms
    whole = terms.shape[1] // depth
    sums = terms[:, : whole * depth].unflatten(1, (whole, depth)).sum(2)
    rest = terms[:, whole * depth :]
    return torch.cat([sums, rest.sum(1, keepdim=True)], dim=1) if rest.shape[1] else sums


def draw(
    logits: torch.Tensor, summary: Summary, places: torch.Tensor, temperature: float, apart: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns int64 [n, m] at ascending `places` float64 [n, m] in the cumulative distribution of what may be drawn, as
    shares of it; -1 where a place is -1. And float64 [n, 1]: the share of what may be drawn and was not."""
    num_rows = max(1, _ENTRIES // (places.shape[1] * summary.depth))
    parts = []
    for start in range(0, max(1, len(logits)), num_rows):
        here = slice(start, start + num_rows)
        some = Summary(summary.log_sum[here], summary.mean[here], summary.groups[here], summary.depth)
        parts.append(_draw(logits[here], some, places[here], temperature, apart))
    columns, missed = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return columns, missed


def _draw(
    logits: torch.Tensor, summary: Summary, places: torch.Tensor, temperature: float, apart: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    inside, depth = places >= 0, summary.depth
    group, inner = _groups_of(summary.groups, places)
    start = (group * depth).clamp_(max=logits.shape[1] - depth)  # the last group may begin inside the one before
    members = logits.unfold(1, depth, 1).gather(1, start[:, :, None].expand(-1, -1, depth))  # [n, m, depth]
    if temperature != 1.0:
        members = members.float() / temperature
    p = (members.float() - summary.log_sum[:, :, None].float()).exp_()
    columns = start[:, :, None] + torch.arange(depth, device=logits.device)
    if logits.shape[1] % depth:
        p.masked_fill_(columns < (group * depth)[:, :, None], 0.0)
    if len(apart):
        p.masked_fill_(torch.isin(columns, apart), 0.0)
    sums = p.cumsum(2, dtype=torch.float64)
    chosen = torch.searchsorted(sums, inner[:, :, None] * sums[:, :, -1:], right=True)[:, :, 0].clamp_(max=depth - 1)
    drawn = torch.where(inside, start + chosen, -1)
    return drawn, _missed(summary.groups, p, torch.where(inside, group, -1), chosen)


def _groups_of(groups: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 and float64 [n, m]: the group that holds each place, and where in its mass the place is, from 0 to 1."""
    sums = groups.cumsum(1)
    at = places.clamp(min=0.0) * sums[:, -1:]
    group = torch.searchsorted(sums, at, right=True).clamp_(max=groups.shape[1] - 1)
    mass = groups.gather(1, group)
    return group, ((at - (sums.gather(1, group) - mass)) / mass).clamp_(0.0, NEARLY_ONE)


def _missed(groups: torch.Tensor, p: torch.Tensor, group: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """float64 [n, 1]: the groups without a draw, and what was not drawn of the others. `p` float32 [n, m, depth] holds
    the shares of the group of each draw, and is used up; `group` is -1 where there is no draw."""
    first = torch.ones_like(group, dtype=torch.bool)
    first[:, 1:] = group[:, 1:] != group[:, :-1]  # a group that is drawn from again is looked at once
    copy = torch.where(first, torch.arange(group.shape[1], device=group.device), 0).cummax(1).values
    p.flatten(1).scatter_(1, copy * p.shape[2] + chosen, 0.0)
    left = p.sum(2).masked_fill_(~first | (group < 0), 0.0)
    untouched = torch.cat([groups, groups.new_zeros(len(groups), 1)], dim=1)
    untouched.scatter_(1, torch.where(group < 0, groups.shape[1], group), 0.0)
    return left.double().sum(1, keepdim=True) + untouched.sum(1, keepdim=True)


def distinct(drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of ascending draws [n, m], all of a row -1 where nothing could be drawn: different ids [n, m], draws of each, and
    how many there are [n, 1]. Beyond its number a row repeats its first id, with no draws."""
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    places = new.cumsum(1) - 1
    num_ids = torch.where(drawn[:, -1:] >= 0, places[:, -1:] + 1, 0)
    ids = drawn[:, :1].expand_as(drawn).scatter(1, places, drawn).clamp_(min=0)
    return ids, torch.zeros_like(drawn).scatter_add_(1, places, torch.ones_like(drawn)), num_ids
