"""What the bridge answers, claim by claim, from its tables."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxmed.bridge.conditions import MATCHED, MEDIATORS, PRUNED, WHOLE, by_group, read_pairs
from jaxmed.bridge.effects import NEURONS, RANDOM_NEURONS, TOTAL
from jaxmed.bridge.enrichment import ALIKE, BEHAVIOUR, RANDOM
from jaxmed.bridge.job import BridgeJob
from jaxmed.experiments.table import read_rows
from jaxmed.gating.verdicts import ABSENT, LEVEL, NOT_SUPPORTED, SUPPORTED, UNDECIDED, Verdict, is_seen
from jaxmed.results import open_results
from jaxmed.statistics import FEWEST_FOR_INTERVAL, group_means, mean_interval, ratio_interval

RATIO = "removed weights at them, over those expected of weights as large"
Row = dict[str, Any]


def bridge_verdicts(job: BridgeJob, out: Path) -> list[Verdict]:
    """The claims of a bridge's folder."""
    rows, layer = read_rows(out / "enrichment.csv"), job.gate.layout.layer
    found = [
        sits(rows, f"neurons of layer {layer}", f"mediating neurons of layer {layer}", job.names[0]),
        sits(rows, "heads", "mediating heads", job.names[0]),
        _weaker(job, out),
        _alone(job, out),
    ]
    table = open_results(out / "heads").load()
    kept = table.control.values == ""
    total = group_means((table.source_outcome - table.base_outcome).values[kept, None], table.group.values[kept])[0][:, 0]
    if is_seen(total, total) is False:
        why = "base and source do not differ on this outcome, so no unit mediates it; the tables hold what was measured"
        found = [replace(one, verdict=ABSENT, why=f"{why}: {one.why}") for one in found]
    return found


def sits(rows: list[Row], scope: str, name: str, behaviour: str) -> Verdict:
    """Whether a mask's weights sit at the mediating units: more often than as large ones would, and than those of control behaviours."""
    own = {row["mask"]: row for row in rows if row["scope"] == scope}
    row, claim = own[BEHAVIOUR], f"the weights that pruning for {behaviour} removes sit at the {name}"
    if not row["removed"]:
        return Verdict(claim, UNDECIDED, RATIO, "the mask removes no weight there")
    low, high, more, less = (_number(row, key) for key in ("norms_low", "norms_high", "more_low", "more_high"))
    answer = UNDECIDED
    if low > 1 and row["p"] <= LEVEL and more > 0:
        answer = SUPPORTED
    elif high < 1 or less < 0:
        answer = NOT_SUPPORTED
    why = f"{row['at_mediators']:.4g} of {row['removed']:.4g} removed weights are at {row['mediating']} of {row['units']} units, "
    why += f"{row['ratio_by_counts']:.2f} times as many as of random weights"
    others = [f"{mask} {one['ratio_by_norms']:.2f}" for mask, one in own.items() if mask != BEHAVIOUR]
    why += f"; the same ratio of other masks: {', '.join(others)}"
    controls = set(own) - {BEHAVIOUR, RANDOM, ALIKE}
    interval = "" if math.isnan(more) else f" ({more:+.2f} to {less:+.2f})"
    told = f"; more than control behaviours by {_number(row, 'more_than_controls'):+.2f}{interval}, p = {_number(row, 'p_more'):.3g}"
    why += told if controls else "; no control behaviour was pruned for"
    if math.isnan(low):
        why += f"; {row['mediating']} mediating units are too few for an interval (at least {FEWEST_FOR_INTERVAL})"
    return Verdict(claim, answer, RATIO, why, row["ratio_by_norms"], low, high, row["p"])


def _number(row: Row, key: str) -> float:
    value = row.get(key, "")
    return math.nan if value in ("", None) else float(value)


def _percent(share: float) -> str:
    return f"{round(share, 2) + 0.0:.0%}"


def _weaker(job: BridgeJob, out: Path) -> Verdict:
    """Whether the mediating neurons do less once the mask is applied, and the total falls more than by random weights of like size."""
    of, pairs, name = {row["what"]: row for row in read_rows(out / "effects.csv")}, read_pairs(out), job.names[0]
    row, total, random = of[NEURONS], of[TOTAL], of[RANDOM_NEURONS]
    low, high = (_number(row, key) for key in ("ratio_low", "ratio_high"))
    whole, own, alike = (by_group(pairs, mask, "total", job) for mask in (WHOLE, name, ALIKE))
    more, _ = mean_interval(np.sign(whole.mean()) * (alike - own))
    answer = SUPPORTED if high < 1 and more > 0 else NOT_SUPPORTED if low > 1 else UNDECIDED
    why = f"patched together, they have {row['before']:+.3f} before and {row['after']:+.3f} after; random neurons {random['before']:+.3f} "
    why += f"and {random['after']:+.3f}; the total is {total['before']:+.3f} and {total['after']:+.3f}, and with as many random weights "
    why += f"of like size removed {_percent(ratio_interval(alike, whole)[0])} of it is left"
    claim = f"the mediating neurons do less after pruning for {name}"
    return Verdict(claim, answer, "effect after over before", why, _number(row, "ratio"), low, high)


def _alone(job: BridgeJob, out: Path) -> Verdict:
    """Whether the total falls once the mediating neurons' weights alone are removed, more than with others of like size."""
    rows, costs = read_pairs(out), {row["mask"]: row for row in read_rows(out / PRUNED)}
    whole, left = (by_group(rows, name, "total", job) for name in (WHOLE, MEDIATORS))
    random = np.mean([by_group(rows, name, "total", job) for name in costs if name.startswith(MATCHED)], axis=0)
    part, low, high = ratio_interval(left, whole)
    sign = np.sign(whole.mean())
    more, _ = mean_interval(sign * (random - left))
    answer = SUPPORTED if high < 1 and more > 0 else NOT_SUPPORTED if low > 1 else UNDECIDED
    share, told = float(ratio_interval(random, whole)[0]), costs[MEDIATORS]
    why = f"{told['weights']} weights removed; with random neurons of like size, {_percent(share)} of the total is left, and with the "
    why += f"mask of {job.names[0]} {_percent(_number(costs[job.names[0]], 'part'))}"
    if "base_score" in told and told["base_score"] != "":
        before = costs[WHOLE]
        why += f"; scores of answers to base prompts {before['base_score']:.0%}, then {told['base_score']:.0%}"
    if told.get("perplexity_ratio", "") != "":
        why += f"; perplexity becomes {told['perplexity_ratio']:.3f} times what it was"
    claim = f"without the weights of the mediating neurons of layer {job.gate.layout.layer} alone, the total is smaller"
    return Verdict(claim, answer, "part of the total that is left", why, part, low, high)
