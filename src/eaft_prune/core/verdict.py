"""What is said of a candidate beside its base: metrics, changes with bounds, checks, a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from eaft_prune.core.types import EvalKey, Evaluation

if TYPE_CHECKING:
    from eaft_prune.core.generation import GenerationReport
    from eaft_prune.core.harness import TaskReport
    from eaft_prune.core.passages import Passage

PlainStatus = Literal["PASS", "FAIL"]


Status = Literal["PASS", "FAIL", "INCONCLUSIVE"]

GENERATED = "generated"  # in a check's place for a pack: what the models wrote themselves
TASKS = "tasks"  # there, where none was given; else the task
RECOVERY = "dtask_recovery"


@dataclass(frozen=True)
class PackReport:
    """Metrics of one model on one pack at one sequence length; `further` has all others."""

    ppl: float
    mean_prob: float
    mean_entropy: float
    cc_rate: float
    cc_rate_base_thr: float
    js2d: float  # against the base model, natural log, in [0, ln 2]
    js2d_corrected: float  # without its sampling bias; about 0 it may be negative
    scored_tokens: int
    blocks: int
    rows: int  # conversations, equal ones counted once
    further: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> float:
        return float(self.values()[metric])

    def values(self) -> dict[str, Any]:
        """Everything by name, as files hold it."""
        own = {name: value for name, value in vars(self).items() if name != "further"}
        return {**own, **self.further}


Reports = Mapping[str, Mapping[EvalKey, PackReport]]  # model label -> (pack, seq_len) -> metrics


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error over rows and a one-sided bound on either side."""

    value: float
    error: float
    low: float  # the truth is above with the gate's confidence
    high: float  # the truth is below with the gate's confidence
    highest: float = 0.0  # the largest influence of a row, and the least: what bounds are made of
    lowest: float = 0.0
    burst: float = 0.0  # of a rare kind of token: what one conversation may hold, none having any


@dataclass(frozen=True)
class Changes:
    """Candidate minus base on one pack at one sequence length, paired over conversations.

    By the gate's names: dppl, dppl_relative (PPL / PPL_base - 1), dnll, dcc_rate, dmean_prob,
    dmean_entropy, js2d (the bias-corrected one), and those of the user's metrics.
    """

    rows: int  # conversations, equal ones counted once
    estimates: Mapping[str, Estimate]

    def __getitem__(self, name: str) -> Estimate:
        return self.estimates[name]

    def get(self, name: str) -> Estimate | None:
        """None where too little is known of it."""
        return self.estimates.get(name)

    def values(self) -> dict[str, Any]:
        """Everything by name, as files hold it."""
        return {"rows": self.rows, **{k: vars(v) for k, v in self.estimates.items()}}


@dataclass(frozen=True)
class GateCheck:
    """One inequality of a gate: passed iff |value| <= limit; decided where an interval was made.

    low and high are one-sided bounds, each with the gate's confidence. `decided` is stricter on one
    side than they are: see stages/gate.py.
    """

    name: str  # of the change: dppl, dppl_relative, dcc_rate, dmean_prob, js2d, d<the user's>
    pack: str  # or GENERATED, or a task: then of no length
    seq_len: int
    value: float
    limit: float
    passed: bool
    estimate: float | None = None  # what the bounds are about: value, for JS2D without its bias
    low: float | None = None
    high: float | None = None
    decided: Status | None = None  # by the interval; None: the plain verdict alone was asked for
    rows: int | None = None  # conversations that the interval rests on
    settled_at: int | None = None  # conversations that would decide an inconclusive check

    @property
    def label(self) -> str:
        where = f"{self.pack}/{self.seq_len}" if self.seq_len else self.pack
        return f"{self.name}@{where}"

    @property
    def outcome(self) -> Status:
        return self.decided or ("PASS" if self.passed else "FAIL")

    @property
    def decisive(self) -> float:
        """The number it is decided on: what its interval is about, else the plain one."""
        return self.value if self.estimate is None else self.estimate


@dataclass(frozen=True)
class GateVerdict:
    """What all checks together say: by their intervals (status) and by point estimates (plain)."""

    gate: str
    status: Status
    checks: tuple[GateCheck, ...]
    confidence: float | None = None  # of status; None: it is the plain one
    missing: tuple[str, ...] = ()  # labels of checks whose data was not gathered

    @property
    def plain(self) -> PlainStatus:
        """PASS iff every check was measured and its point estimate is within its limit."""
        held = all(check.passed for check in self.checks)
        return "PASS" if held and not self.missing else "FAIL"

    @property
    def failed_checks(self) -> tuple[str, ...]:
        return self._labels("FAIL")

    @property
    def undecided_checks(self) -> tuple[str, ...]:
        return self._labels("INCONCLUSIVE")

    @property
    def plain_failed_checks(self) -> tuple[str, ...]:
        return tuple(check.label for check in self.checks if not check.passed)

    @property
    def settled_by(self) -> GateCheck | None:
        """The check whose `settled_at` rows would end an inconclusive verdict, if that is known.

        One that leans outside its limit would end it alone; if all lean inside, it takes the last.
        """
        undecided = [check for check in self.checks if check.outcome == "INCONCLUSIVE"]
        if any(check.settled_at is None for check in undecided):
            return None
        outside = [c for c in undecided if c.estimate is not None and abs(c.estimate) > c.limit]
        if outside:
            return min(outside, key=lambda check: check.settled_at or 0)
        return max(undecided, key=lambda check: check.settled_at or 0, default=None)

    def _labels(self, outcome: Status) -> tuple[str, ...]:
        return tuple(check.label for check in self.checks if check.outcome == outcome)


@dataclass(frozen=True)
class Comparison:
    """A base model, its candidates, and what the gate says of each."""

    base: Evaluation
    candidates: tuple[Evaluation, ...]
    reports: Reports
    verdicts: Mapping[str, GateVerdict]  # candidate label -> verdict
    changes: Mapping[str, Mapping[EvalKey, Changes]] = field(default_factory=dict)  # by candidate
    beside: Mapping[str, GateVerdict] = field(default_factory=dict)  # of a second gate
    generated: Mapping[str, GenerationReport] = field(default_factory=dict)  # by candidate
    passages: Mapping[str, Sequence[Passage]] = field(default_factory=dict)  # that it lost most on
    tasks: Mapping[str, Mapping[str, TaskReport]] = field(default_factory=dict)  # by candidate
