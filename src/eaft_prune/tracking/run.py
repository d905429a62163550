"""A run as the pipeline sees it: each event becomes metrics, tags and artifacts at once."""

from __future__ import annotations

import hashlib
import json
import numbers
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaft_prune.config import Experiment
from eaft_prune.core.outcome import StageRecord
from eaft_prune.core.provenance import as_text, flatten, process_tags, redact
from eaft_prune.core.types import Checkpoint, EvalKey, KeepPlan
from eaft_prune.core.verdict import GateVerdict, PackReport
from eaft_prune.tracking.figures import (
    Batch,
    Figure,
    Telemetry,
    summary,
    tables,
    verdict_figures,
    verdict_table,
)

if TYPE_CHECKING:
    from eaft_prune.tracking.server import Server

_PATIENCE = 1.0  # seconds that a number may wait for others
# sections that decide where and how, never what is measured
_MACHINERY = ("runtime", "tracking", "export", "sweep", "doctor", "gc", "probe")
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
        self._telemetry = Telemetry()
        self._stages: list[dict[str, Any]] = []
        self._reports: dict[str, Mapping[EvalKey, PackReport]] = {}  # of every model, base first
        self._plan_digest: str | None = None
        self._outcome = ""
        self._waiting = Batch()
        self._written = time.monotonic()

    @property
    def uri(self) -> str:
        """Where the run is kept, without a password."""
        return redact(self._server.uri)

    @property
    def ui_command(self) -> str | None:
        """The command that starts the MLflow UI; None where a server shows it."""
        return self._server.ui_command

    @property
    def ui_table(self) -> str:
        """The address of all runs with their verdicts, sizes and losses as columns."""
        return self._server.ui_table

    @property
    def ui_page(self) -> str:
        """The run's address in the UI, once that is running."""
        return self._server.ui_page(self.run_id)

    def stage(self, record: StageRecord) -> None:
        figures = self._telemetry.add(record)
        self._log(figures, {f"stage.{record.stage}": record.key}, step=self._telemetry.stages)
        self._stages.append({**vars(record), "facts": dict(record.facts)})
        if not record.cached:
            self.flush()

    def needs(self, name: str, digest: str) -> None:
        self._log({}, {f"needs.{name}": digest})

    def dataset(self, name: str, source: str, digest: str, rows: int) -> None:
        self._server.dataset(self.run_id, name, redact(source), digest, rows)
        self._log({}, {f"dataset.{name}.digest": digest})

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
            self.run_id,
            self._name(role, checkpoint),
            tags,
            params,
            [file for file in files if file.is_file()],
        )
        self._models[role] = model_id
        kept = ("digest", "path", "compensation")
        size = checkpoint.weight_bytes
        name = "summary/gb_base" if role == "base" else "summary/gb"
        self._log(
            {} if size is None else {name: size / 1e9},
            {f"checkpoint.{role}.{k}": tags[k] for k in kept if k in tags},
        )
        if parent is None:
            self._server.model_input(self.run_id, model_id)
        else:
            self._server.model_output(self.run_id, model_id)

    def plan(self, plan: KeepPlan) -> None:
        counts = [len(ids) for ids in plan.kept]
        self._plan_digest = plan.digest
        self._log(
            {"summary/keep_n": sum(counts) / len(counts), "summary/n_experts": plan.n_experts},
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
        label = f"{model}/" if len(self._reports) > 1 else ""
        figures = tables(reports, base, label)
        # the base's numbers have the same names: the later step is the one that a list shows
        self._log(figures, {}, step=len(self._reports), model_id=self._models.get(model))
        self._reports[model] = reports

    def verdict(self, verdict: GateVerdict) -> None:
        base, model, *_ = self._reports
        figures = {**summary(verdict, model, self._reports, base), **verdict_figures(verdict)}
        tags = {
            "gate.status": verdict.status,
            "gate.name": verdict.gate,
            "gate.plain_status": verdict.plain,
            "gate.failed_checks": ",".join(verdict.failed_checks),
            "gate.undecided_checks": ",".join(verdict.undecided_checks),
            "gate.plain_failed_checks": ",".join(verdict.plain_failed_checks),
            _NOTE: verdict_table(verdict),
        }
        self._log(figures, tags, model_id=self._models.get("pruned"))
        if verdict.status == "PASS" and "pruned" in self._models:
            self._register({**tags, **{name: f"{value:.6g}" for name, value in figures.items()}})
        change = figures.get("summary/dppl_percent")
        self._outcome = verdict.status + ("" if change is None else f" {change:+.1f}%")

    def beside(self, verdict: GateVerdict) -> None:
        """Tags of a second gate's verdict; its numbers are among the tables."""
        names = ("failed_checks", "undecided_checks", "missing")
        tags = {f"gate.beside.{name}": ",".join(getattr(verdict, name)) for name in names}
        self._log({}, {**tags, "gate.beside": f"{verdict.status} {verdict.gate}"})

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
        now = int(time.time() * 1000)
        figures = [Figure(key, value, 0, now) for key, value in metrics.items()]
        self._server.log(run_id, Batch(figures, params))
        self._server.terminate(run_id, "FINISHED")

    def facts(self, facts: Mapping[str, Any]) -> None:
        figures, texts = _split(flatten(facts, "/"))
        self._log({f"values/{name}": value for name, value in figures.items()}, texts)

    def usage(self, facts: Mapping[str, Any]) -> None:
        """Log what the process used: peaks of memory."""
        figures, _ = _split(flatten(facts, "/", "telemetry/"))
        self._log(figures, {})

    def artifact(self, path: Path) -> None:
        """Upload a file, or a directory under its own name; raises FileNotFoundError."""
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such artifact to keep with the run")
        self._server.artifact(self.run_id, path)

    @property
    def outcome(self) -> str:
        """The verdict and the PPL's change, for the run's name; empty where nothing was judged."""
        return self._outcome

    def settings(self, values: Mapping[str, Any]) -> None:
        """Log nested settings as params but for machinery, which config.yaml has.

        What is too long for MLflow becomes an artifact.
        """
        told = {name: value for name, value in values.items() if name not in _MACHINERY}
        params = {key: redact(as_text(value)) for key, value in flatten(told).items()}
        self._server.log(self.run_id, Batch(params=self._shortened(params, "settings")))

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

    def _register(self, evidence: Mapping[str, str]) -> None:
        """Make the export a version of the model `tracking.register_as`, with what it passed on."""
        settings = self._experiment.tracking
        if settings.register_as is None:
            return
        told = {k: v for k, v in evidence.items() if k.startswith(("summary/", "gate.")) and v}
        version = self._server.register(
            settings.register_as, self._models["pruned"], self.run_id, told, settings.alias
        )
        self._log({}, {"registered": f"{settings.register_as} version {version}"})

    def _name(self, role: str, checkpoint: Checkpoint) -> str:
        """The base as the settings name it, an export as its directory."""
        return self._experiment.model.name if role == "base" else checkpoint.path.name

    def _log(
        self,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        step: int = 0,
        model_id: str | None = None,
    ) -> None:
        now = int(time.time() * 1000)
        self._waiting.figures += [
            Figure(name, value, step, now, model_id) for name, value in metrics.items()
        ]
        self._waiting.tags |= self._shortened(tags, "tags")
        if time.monotonic() - self._written > _PATIENCE:
            self.flush()

    def flush(self) -> None:
        """Send what waits: a run that is looked at while it goes lags by a second at most.

        It waits on until it is sent: an interrupted run sends all of it again at its end.
        """
        self._written = time.monotonic()
        self._server.log(self.run_id, self._waiting)
        self._waiting = Batch()

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
