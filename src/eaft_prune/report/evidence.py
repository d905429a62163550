"""What one tracked run says of a keep_n: its verdict, its checks, what they rest on, its cost."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from eaft_prune.core.outcome import RunSummary
from eaft_prune.maths.metrics import METRICS
from eaft_prune.report.text import number

_TABLES, _GROWTH = "tables/", "/dppl_percent"


@dataclass(frozen=True)
class Run:
    """What the memo reads of one finished run."""

    kept: RunSummary

    @property
    def task(self) -> str:
        return self.kept.tags.get("task", "?")

    @property
    def status(self) -> str | None:
        """PASS, FAIL, INCONCLUSIVE; None where nothing was judged."""
        return self.kept.tags.get("gate.status")

    @property
    def model(self) -> tuple[str, str]:
        """Name and digest of the base model."""
        return self.kept.params.get("model.name", "?"), self.kept.tags.get(
            "checkpoint.base.digest", "?"
        )

    @property
    def keep_n(self) -> int:
        return int(self.kept.params["pruning.keep_n"])

    @property
    def method(self) -> tuple[tuple[str, str], ...]:
        """Every pruning and profiling setting but keep_n, and the candidate that was judged."""
        chosen = [
            (key, value)
            for key, value in self.kept.params.items()
            if key.startswith(("pruning.", "profile.")) and key != "pruning.keep_n"
        ]
        return (*sorted(chosen), ("candidate", self.candidate))

    @property
    def candidate(self) -> str:
        """The one whose verdict the run's tags hold: the first."""
        names = json.loads(self.kept.params.get("eval.candidates", "[]"))
        return str(names[0]) if names else "?"

    @property
    def evidence(self) -> tuple[str, str, str, str]:
        """Gate, lengths, evaluation seed and block counts: what the verdict rests on."""
        keys = ("gate.name", "gate.seq_lens", "eval.seed", "eval.name")
        gate, lengths, seed, name = (self.kept.params.get(key, "?") for key in keys)
        return gate, lengths.strip("[]"), "file order" if seed == "null" else seed, name

    @property
    def result(self) -> tuple[Any, ...]:
        """What a run found: equal where plan, evaluations and gate are, whoever ran it again."""
        tags = self.kept.tags
        made = sorted(v for tag, v in tags.items() if tag.startswith("stage.evaluate/"))
        gate = sorted(item for item in self.kept.params.items() if item[0].startswith("gate."))
        known = made or [self.kept.run_id]  # evaluated elsewhere
        return (tags.get("plan.digest"), known, gate, self.evidence, self.status)

    def checks(self) -> list[Check]:
        """Every check of the gate, the one that used most of its limit first."""
        found = []
        for key, value in self.kept.metrics.items():
            parts = key.split("/")
            if len(parts) == 5 and parts[0] == "verdict" and parts[4] == "value":
                where = "/".join(parts[:4])
                limit = self.kept.metrics.get(f"{where}/limit", math.nan)
                decides = self.kept.metrics.get(f"{where}/estimate", value)
                found.append(Check(parts[1], parts[2], int(parts[3]), decides, limit))
        return sorted(found, key=lambda check: -check.usage)

    def worst_pack(self) -> tuple[str, float] | None:
        """The pack and length whose PPL grew most, and by which share."""
        grown = {
            key.removeprefix(_TABLES).removesuffix(_GROWTH): value / 100
            for key, value in self.kept.metrics.items()
            if key.startswith(_TABLES) and key.endswith(_GROWTH) and key.count("/") == 3
        }
        return max(grown.items(), key=lambda item: item[1], default=None)

    def rate(self, stage: str) -> float | None:
        """Median tokens per second over the stages of this name, each as when it was computed."""
        return self.kept.metrics.get(f"telemetry/tokens_per_s/{stage}")


@dataclass(frozen=True)
class Check:
    """One inequality of a gate as a run met it: the number that decided, and its limit."""

    name: str
    pack: str
    seq_len: int
    value: float
    limit: float

    @property
    def usage(self) -> float:
        """|value| / limit: at most 1 iff the check passes."""
        if self.limit:
            return abs(self.value) / self.limit
        return 0.0 if self.value == 0 else math.inf

    def __str__(self) -> str:
        labels = {metric.change: metric.change_label for metric in METRICS}
        label = labels.get(self.name, self.name)
        margin = number(self.limit - abs(self.value), 4, signed=True)
        value, limit = number(self.value, 4, signed=True), number(self.limit, 4)
        return f"{label} {self.pack}@{self.seq_len}: {value}, limit {limit}, margin {margin}"
