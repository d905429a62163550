"""result.json read back: one run as a typed value, and several to filter, group and tabulate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaft_prune.core.foreign import parsed_json
from eaft_prune.core.types import UserError
from eaft_prune.records.result import FILE

if TYPE_CHECKING:
    from pandas import DataFrame

FRONTIER = "frontier.csv"


@dataclass(frozen=True)
class Result:
    """What one run left in its directory; `values` is all of result.json."""

    path: Path  # of the directory
    values: Mapping[str, Any]

    @property
    def status(self) -> str:
        """FINISHED, FAILED or KILLED."""
        return str(self.values["status"])

    @property
    def exit_code(self) -> int:
        return int(self.values["exit_code"])

    @property
    def error(self) -> str | None:
        found: str | None = self.values["error"]
        return found

    @property
    def task(self) -> str:
        return str(self.values["task"])

    @property
    def verdict(self) -> str | None:
        """PASS, FAIL or INCONCLUSIVE of the first candidate; None where nothing was judged."""
        return None if self.values["gate"] is None else str(self.values["gate"]["status"])

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that was written or judged."""
        found = self.values["checkpoint"]
        return None if found is None else Path(found["path"])

    @property
    def keep_n(self) -> float | None:
        """Experts a layer of the plan, on average; None without one."""
        plan = self.values["plan"]
        return None if plan is None else sum(map(len, plan["kept"])) / len(plan["kept"])

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a task found beside its reports."""
        found: Mapping[str, Any] = self.values["facts"]
        return found

    @property
    def overrides(self) -> Sequence[str]:
        found: Sequence[str] = self.values["overrides"]
        return found

    def growth(self, candidate: str | None = None) -> float | None:
        """The change of PPL as a share of the base's that used most of its limit, if judged."""
        gates = self.values["gates"]
        gate = gates.get(candidate or next(iter(gates), None))
        checks = [] if gate is None else gate["checks"]
        own = [check for check in checks if check["name"] == "dppl_relative"]
        worst = max(own, key=lambda check: abs(check["value"]), default=None)
        return None if worst is None else float(worst["value"])

    def checks(self) -> DataFrame:
        """Every check of every candidate, a row each."""
        import pandas

        rows = [
            {"candidate": label, **check}
            for label, gate in self.values["gates"].items()
            for check in gate["checks"]
        ]
        return pandas.DataFrame(rows)

    def reports(self) -> DataFrame:
        """Metrics of every model on every pack and length, a row each."""
        import pandas

        rows = [
            {"model": model, "pack": pack, "seq_len": int(length), **metrics}
            for model, packs in self.values["reports"].items()
            for pack, lengths in packs.items()
            for length, metrics in lengths.items()
        ]
        return pandas.DataFrame(rows)

    def frontier(self) -> DataFrame:
        """Every point of a task=frontier; raises UserError of another task's run."""
        import pandas

        if not (self.path / FRONTIER).is_file():
            raise UserError(f"{self.path} has no {FRONTIER}: it is a run of task={self.task}")
        return pandas.read_csv(self.path / FRONTIER)


@dataclass(frozen=True)
class Results(Sequence[Result]):
    """Runs in some order."""

    items: tuple[Result, ...]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.items)

    def __getitem__(self, index: Any) -> Any:
        found = self.items[index]
        return Results(found) if isinstance(found, tuple) else found

    def where(self, holds: Callable[[Result], bool]) -> Results:
        """Those of which it holds."""
        return Results(tuple(one for one in self if holds(one)))

    def by(self, key: Callable[[Result], Any]) -> dict[Any, Results]:
        """Groups, in the order of their first runs."""
        groups: dict[Any, list[Result]] = {}
        for one in self:
            groups.setdefault(key(one), []).append(one)
        return {name: Results(tuple(of)) for name, of in groups.items()}

    def frame(self) -> DataFrame:
        """A row a run: what a table of runs asks first."""
        import pandas

        return pandas.DataFrame([_row(one) for one in self])


def load_result(place: str | Path) -> Result:
    """A run's result, by its directory or its result.json; raises UserError where there is none."""
    path = Path(place).expanduser().resolve()
    file = path if path.name == FILE else path / FILE
    values = parsed_json(file)
    if not isinstance(values, dict) or _KEYS - set(values):
        raise UserError(
            f"{file} is no result of a run: it lacks {sorted(_KEYS.difference(values))}"
        )
    return Result(file.parent, values)


def load_results(*places: str | Path) -> Results:
    """Every result below some directories, by path; what was uploaded of them is left out."""
    files = {
        file.resolve()
        for place in places
        for file in Path(place).expanduser().rglob(FILE)
        if "artifacts" not in file.parts
    }
    return Results(tuple(load_result(file) for file in sorted(files)))


_KEYS = {
    "status", "exit_code", "error", "task", "gate", "gates", "plan", "checkpoint", "facts",
    "overrides", "reports",
}  # fmt: skip


def _row(one: Result) -> dict[str, Any]:
    growth = one.growth()
    return {
        "path": str(one.path),
        "task": one.task,
        "status": one.status,
        "verdict": one.verdict,
        "keep_n": one.keep_n,
        "dppl_percent": None if growth is None else 100 * growth,
        "checkpoint": None if one.checkpoint is None else str(one.checkpoint),
        "overrides": " ".join(one.overrides),
    }
