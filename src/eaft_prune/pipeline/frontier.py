"""The search of a frontier: methods in turn, bisected over sizes, on profiling rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from eaft_prune.checkpoints.model import Model
from eaft_prune.checkpoints.size import bytes_of
from eaft_prune.core.frontier import Point, Rows
from eaft_prune.core.types import UserError
from eaft_prune.core.verdict import Comparison, GateCheck
from eaft_prune.maths.bisection import furthest_down, smallest_passing
from eaft_prune.pipeline import ladder
from eaft_prune.pipeline.compare import compare
from eaft_prune.pipeline.evaluation import Side
from eaft_prune.pipeline.export import write
from eaft_prune.pipeline.ladder import Method, settings_of, trying
from eaft_prune.pipeline.requests import frontier_search
from eaft_prune.pipeline.sequential import measure_all
from eaft_prune.pipeline.session import Session
from eaft_prune.stages.plan import check_keep_n

log = logging.getLogger(__name__)

_GB = 1e9


@dataclass
class Search:
    """What was tried so far; `session` is the run's own."""

    session: Session
    base: Model
    sizes: tuple[int, ...]  # ascending
    methods: list[Method] = field(default_factory=list)
    points: dict[tuple[str, int], Point] = field(default_factory=dict)

    def ask(self, method: Method, keep_n: int) -> Point:
        """What the gate says of a method's plan of one size, on the rows of the search."""
        found = self.points.get((method.name, keep_n))
        if found is None:
            found = self.points[method.name, keep_n] = _tried(self, method, keep_n)
            _announce(self.session, method, found)
        return found

    def answer_of(self, method: Method) -> int | None:
        """The fewest experts with which a method held the gate."""
        passed = [n for (name, n), point in self.points.items() if name == method.name
                  if point.holds]  # fmt: skip
        return min(passed, default=None)

    def cheapest(self, keep_n: int) -> Method | None:
        """The first method of the ladder that held with at most so many experts."""
        for method in self.methods:
            least = self.answer_of(method)
            if least is not None and least <= keep_n:
                return method
        return None


def sizes_of(session: Session, base: Model) -> tuple[int, ...]:
    """Numbers of experts that may be tried, ascending; one of them with `frontier.target_gb`.

    Raises UserError where there is none.
    """
    settings, pruning = settings_of(session), session.experiment.pruning
    step = pruning.keep_multiple
    floor = max(base.top_k, base.least)
    least = settings.min_keep_n or max(base.n_experts // 2, floor)
    if settings.target_gb is not None:
        least = floor
    sizes = [n for n in range(step, base.n_experts, step) if n >= least and n % base.groups == 0]
    if settings.target_gb is not None:
        gigabytes = {n: bytes_of(base.family, base.files, n) / _GB for n in sizes}
        sizes = [n for n in sizes if gigabytes[n] <= settings.target_gb][-1:]
        if not sizes:
            smallest = min(gigabytes.values(), default=base.files.weight_bytes / _GB)
            raise UserError(
                f"frontier.target_gb = {settings.target_gb:g}: with the fewest experts that it can "
                f"route to this model has {smallest:.3g} GB: give more"
            )
    if not sizes:
        raise UserError(
            f"frontier.min_keep_n = {settings.min_keep_n}: no multiple of pruning.keep_multiple = "
            f"{step} lies between that and the model's {base.n_experts} experts: lower one of them"
        )
    for keep_n in (sizes[0], sizes[-1]):
        of_size = pruning.model_copy(update={"keep_n": keep_n})
        check_keep_n(of_size, base.n_experts, base.top_k, base.groups, base.least)
    return tuple(sizes)


def climb(search: Search) -> int | None:
    """Every method of the ladder in turn, each below the least size of those before it.

    A size holds if the gate passes it or, sure of nothing, has every estimate within its limit:
    what is claimed is the proof's affair, which has rows of its own. Returns the fewest experts
    with which any held; then the sizes around it are measured, masked.
    """
    settings = settings_of(search.session)
    best: int | None = None
    for rung in settings.ladder:
        todo = [n for n in search.sizes if best is None or n < best]
        if not todo:
            break
        method = _method(search, rung)
        # later methods are dear, and reach a few sizes further
        descend = smallest_passing if best is None else furthest_down
        best = descend(todo, _holds(search, method)) or best
    if best is not None:
        at = search.sizes.index(best)
        around = search.sizes[max(at - settings.curve, 0) : at + settings.curve + 1]
        for method in search.methods:
            if not method.repairs:
                for keep_n in around:
                    search.ask(method, keep_n)
    return best


def point_of(
    comparison: Comparison, label: str, method: str, gb: float, rows: Rows, keep_n: int | None
) -> Point:
    """What a comparison says of one candidate."""
    verdict, reports = comparison.verdicts[label], comparison.reports[label]
    judged = [reports[check.pack, check.seq_len] for check in verdict.checks
              if (check.pack, check.seq_len) in reports]  # fmt: skip
    growth = growth_check(verdict.checks)
    within = all(abs(check.decisive) <= check.limit for check in verdict.checks)
    holds = verdict.status == "PASS" or (
        verdict.status == "INCONCLUSIVE" and within and not verdict.missing
    )
    return Point(
        method, keep_n, gb, verdict.status, growth.decisive, growth.low, growth.high,
        holds, verdict.failed_checks, verdict.undecided_checks,
        min(report.scored_tokens for report in judged), min(report.rows for report in judged), rows,
    )  # fmt: skip


def growth_check(checks: Sequence[GateCheck]) -> GateCheck:
    """The check of PPL / PPL_base - 1 that used most of its limit."""
    own = [check for check in checks if check.name == "dppl_relative"]
    return max(own, key=lambda check: abs(check.decisive) / max(check.limit, 1e-12))


def _method(search: Search, rung: str) -> Method:
    session, base, least = trying(search.session), search.base, search.sizes[0]
    if rung == "ranking":
        method = ladder.ranking(session, base, least)
    elif rung == "greedy":
        method = ladder.greedy(session, base, least)
    else:
        # whose plans reach lowest, the first of equals
        of = min(search.methods, key=lambda one: search.answer_of(one) or base.n_experts)
        method = ladder.repaired(session, of)
    search.methods.append(method)
    return method


def _holds(search: Search, method: Method) -> Callable[[int], bool]:
    return lambda keep_n: search.ask(method, keep_n).holds


def _tried(search: Search, method: Method, keep_n: int) -> Point:
    base = search.base
    session = method.within(trying(search.session), keep_n)
    selection = method.selection(base, keep_n)
    label = f"{method.name}-{keep_n}"
    path: Path | None = None
    if method.repairs:
        model = write(session, base, selection)
        side, gb, path = Side(label, model), model.files.weight_bytes / _GB, model.files.path
    else:
        side = Side(label, base, selection.plan)
        gb = bytes_of(base.family, base.files, keep_n) / _GB
    asked = [frontier_search(search.session.experiment)]
    found = measure_all(session, base, [Side("base", base), side], asked)
    gate = session.experiment.gate.over(len(session.experiment.eval.interim_shares))
    comparison = compare(session.experiment.eval, gate, found[0], found[1:])
    point = point_of(comparison, label, method.name, gb, "search", keep_n)
    return replace(point, plan=selection.plan.digest, path=path)


def _announce(session: Session, method: Method, point: Point) -> None:
    """One line on the console, one child run."""
    log.info(
        "%-9s keep_n %-4d %8.3f GB  %-13s PPL %+.2f%% on %s tokens",
        method.name, point.keep_n, point.gb, point.status, 100 * point.growth, f"{point.tokens:,}",
    )  # fmt: skip
    metrics = {
        "summary/keep_n": float(point.keep_n or 0),
        "summary/gb": point.gb,
        "summary/dppl_percent": 100 * point.growth,
        "summary/tokens": float(point.tokens),
    }
    settings = {
        "method": method.name,
        "pruning.name": method.pruning.name,
        "pruning.keep_n": point.keep_n,
        "pruning.compensation": method.pruning.compensation,
    }
    tags = {"gate.status": point.status, "gate.failed_checks": ",".join(point.failed),
            "plan.digest": point.plan or "", "task": "frontier"}  # fmt: skip
    name = f"{point.status} {100 * point.growth:+.1f}% {method.name} {point.keep_n}"
    session.observer.point(name, settings, metrics, tags)
