"""A run as the pipeline sees it: each event becomes metrics, tags and artifacts at once."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaft_prune.config import Experiment
from eaft_prune.core.outcome import StageRecord
from eaft_prune.core.provenance import as_text, flatten, process_tags, redact
from eaft_prune.core.types import Checkpoint, EvalKey, KeepPlan
from eaft_prune.core.verdict import GateCheck, GateVerdict, PackReport
from eaft_prune.maths.metrics import METRICS

if TYPE_CHECKING:
    from eaft_prune.tracking.server import Server

_VALUE_LENGTH = 6000  # MLflow's limit for params; tags allow a little more
_NOTE = "mlflow.note.content"  # what the UI shows, rendered, as the run's description
_MODEL_FILES = ("manifest.json", "expert_mapping.json")


class MlflowRun:
    """One MLflow run that implements `observer.Observer`.

    Every method raises TrackingError when MLflow cannot be reached or refuses.
    """

    def __init__(self, server: Server, run_id: str, experiment: Experiment) -> None:
        self.run_id = run_id
        self._server = server
        self._experiment = experiment
        self._models: dict[str, str] = {}  # role -> logged model id
        self._ended: Counter[str] = Counter()  # stage -> times it ended
        self._stages: list[dict[str, Any]] = []
        self._plan_digest: str | None = None

    @property
    def uri(self) -> str:
        """Where the run is kept, without a password."""
        return redact(self._server.uri)

    @property
    def ui_hint(self) -> str:
        """The command that starts the MLflow UI, or the run's address on a server."""
        return self._server.ui_command or self.ui_page

    @property
    def ui_page(self) -> str:
        """The run's address in the UI, once that is running."""
        return self._server.ui_page(self.run_id)

    def stage(self, record: StageRecord) -> None:
        name = record.stage
        figures, _ = _split(flatten(record.facts, "/", f"{name}/"))
        figures |= {f"seconds/{name}": record.seconds, f"cached/{name}": float(record.cached)}
        self._log(figures, {f"stage.{name}": record.key}, step=self._ended[name])
        self._ended[name] += 1
        self._stages.append({**vars(record), "facts": dict(record.facts)})

    def dataset(self, name: str, source: str, digest: str, rows: int) -> None:
        self._server.dataset(self.run_id, name, redact(source), digest, rows)
        self._log({f"dataset/{name}/rows": rows}, {f"dataset.{name}.digest": digest})

    def checkpoint(
        self,
        role: str,
        checkpoint: Checkpoint,
        parent: Checkpoint | None = None,
        how: Mapping[str, Any] | None = None,
    ) -> None:
        tags = {"role": role, "digest": checkpoint.digest, "path": str(checkpoint.path.resolve())}
        made = {"model": self._experiment.model.model_dump(), **(how or {})}
        params = {name: as_text(value) for name, value in flatten(made).items()}
        if parent is not None:
            tags["base_digest"] = parent.digest
            if base := self._models.get("base"):
                tags["base_model_id"] = base
            tags["compensation"] = made.get("compensation", {}).get("level", "none")
            if self._plan_digest:
                params["plan.digest"] = self._plan_digest
        files = [checkpoint.path / name for name in _MODEL_FILES]
        model_id = self._server.model(
            self.run_id, checkpoint.label, tags, params, [file for file in files if file.is_file()]
        )
        self._models[role] = model_id
        kept = ("digest", "path", "compensation")
        self._log({}, {f"checkpoint.{role}.{k}": tags[k] for k in kept if k in tags})
        if parent is None:
            self._server.model_input(self.run_id, model_id)
        else:
            self._server.model_output(self.run_id, model_id)

    def plan(self, plan: KeepPlan) -> None:
        counts = [len(ids) for ids in plan.kept]
        self._plan_digest = plan.digest
        self._log(
            {
                "plan/layers": len(counts),
                "plan/n_experts": plan.n_experts,
                "plan/kept_total": sum(counts),
                "plan/kept_min": min(counts),
                "plan/kept_max": max(counts),
            },
            {"plan.digest": plan.digest},
        )
        text = json.dumps({"digest": plan.digest, **asdict(plan)})
        self._server.text(self.run_id, text, "plan.json")

    def reports(
        self,
        model: str,
        reports: Mapping[EvalKey, PackReport],
        base: Mapping[EvalKey, PackReport] | None,
    ) -> None:
        figures: dict[str, float] = {}
        delta = "delta" if model == "pruned" else f"{model}/delta"
        for (pack, seq_len), report in reports.items():
            where = f"{pack}/{seq_len}"
            figures |= {
                f"eval/{model}/{where}/{k}": v for k, v in report.values().items() if v is not None
            }
            if base is not None:
                changes = _changes(report, base[pack, seq_len])
                figures |= {f"{delta}/{where}/{k}": v for k, v in changes.items()}
        self._log(figures, {}, model_id=self._models.get(model))

    def verdict(self, verdict: GateVerdict) -> None:
        figures: dict[str, float] = {}
        for check in verdict.checks:
            where = f"gate/{check.name}/{check.pack}/{check.seq_len}"
            figures[f"{where}/value"] = check.value
            figures[f"{where}/limit"] = check.limit
            figures[f"{where}/margin"] = check.limit - abs(check.value)
            for name in ("estimate", "low", "high", "settled_at"):
                if (known := getattr(check, name)) is not None:
                    figures[f"{where}/{name}"] = float(known)
        tags = {
            "gate.status": verdict.status,
            "gate.name": verdict.gate,
            "gate.plain_status": verdict.plain,
            "gate.failed_checks": ",".join(verdict.failed_checks),
            "gate.undecided_checks": ",".join(verdict.undecided_checks),
            "gate.plain_failed_checks": ",".join(verdict.plain_failed_checks),
            _NOTE: _verdict_table(verdict),
        }
        self._log(figures, tags, model_id=self._models.get("pruned"))

    def point(
        self,
        name: str,
        settings: Mapping[str, Any],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> None:
        own = {**tags, "mlflow.parentRunId": self.run_id, **process_tags()}
        run_id = self._server.create_run(name, own)
        params = {key: as_text(value) for key, value in settings.items()}
        self._server.log(run_id, metrics=metrics, params=params)
        self._server.terminate(run_id, "FINISHED")

    def facts(self, facts: Mapping[str, Any]) -> None:
        figures, texts = _split(flatten(facts, "/"))
        self._log(figures, texts)

    def artifact(self, path: Path) -> None:
        """Upload a file, or a directory under its own name; raises FileNotFoundError."""
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such artifact to keep with the run")
        self._server.artifact(self.run_id, path)

    def settings(self, values: Mapping[str, Any]) -> None:
        """Log nested settings as params; what is too long for MLflow becomes an artifact."""
        params = {key: redact(as_text(value)) for key, value in flatten(values).items()}
        self._server.log(self.run_id, params=self._shortened(params, "settings"))

    def text(self, text: str, file: str) -> None:
        """Keep a text as an artifact."""
        self._server.text(self.run_id, text, file)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._log({}, tags)

    def stages_file(self) -> None:
        """Keep everything known of the stages so far as one artifact."""
        if self._stages:
            text = json.dumps(self._stages, indent=1, default=str)
            self._server.text(self.run_id, redact(text), "stages.json")

    def _log(
        self,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        step: int = 0,
        model_id: str | None = None,
    ) -> None:
        short = self._shortened(tags, "tags")
        self._server.log(self.run_id, metrics=metrics, tags=short, step=step, model_id=model_id)

    def _shortened(self, values: Mapping[str, str], folder: str) -> dict[str, str]:
        short = dict(values)
        for key, value in values.items():
            if len(value) > _VALUE_LENGTH:
                self._server.text(self.run_id, value, f"{folder}/{key.replace('/', '_')}.txt")
                short[key] = f"sha256:{hashlib.sha256(value.encode()).hexdigest()}"
        return short


def _split(facts: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Numbers, and everything else (true and false included) as text."""
    figures: dict[str, float] = {}
    texts: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            figures[name] = float(value)
        else:
            texts[name] = redact(as_text(value))
    return figures, texts


def _changes(report: PackReport, base: PackReport) -> dict[str, float]:
    """Candidate minus base; nll = ln(ppl / base ppl); js2d is a distance already."""
    metrics = {metric.name: metric.delta(base, report) for metric in METRICS if metric.label}
    own = {name: value - base[name] for name, value in report.further.items()}
    return {
        **metrics,
        **own,
        "cc_rate_base_thr": report.cc_rate_base_thr - base.cc_rate_base_thr,
        "nll": math.log(report.ppl / base.ppl),
    }


def _verdict_table(verdict: GateVerdict) -> str:
    rows = [
        f"| {check.name} | {check.pack} | {check.seq_len} | {check.value:+.5f} | {_bounds(check)} "
        f"| {check.limit:.5f} | {'pass' if check.outcome == 'PASS' else f'**{check.outcome}**'} |"
        for check in verdict.checks
    ]
    return "\n".join(
        [
            f"**{verdict.status}** ({verdict.gate}; by point estimates {verdict.plain})",
            "",
            "| check | pack | seq_len | value | interval | limit | |",
            "|---|---|---:|---:|---:|---:|---|",
            *rows,
        ]
    )


def _bounds(check: GateCheck) -> str:
    if check.low is None or check.high is None:
        return ""
    return f"{check.low:+.5f} to {check.high:+.5f}"
