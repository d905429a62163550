"""run.lock.yaml: what a run depended on and what it found, and where two of them differ."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import eaft_prune
from eaft_prune.checkpoints.model import Hashes
from eaft_prune.checkpoints.read import model_digest
from eaft_prune.config import Experiment, renamed, resolve_path
from eaft_prune.core.digests import file_digest
from eaft_prune.core.files import write_atomically
from eaft_prune.core.outcome import Outcome, StageRecord
from eaft_prune.core.provenance import flatten, git_of_code, installed, redact
from eaft_prune.core.store import load
from eaft_prune.core.text import id_ranges, yaml_text
from eaft_prune.core.types import UserError
from eaft_prune.records.result import reports_by_name
from eaft_prune.records.yaml_file import load_yaml

FILE = "run.lock.yaml"
_FORMAT = 1
_SECTIONS = ("config", "inputs", "code", "versions", "device", "keys", "outputs")
_PACKAGES = ("eaft_prune", "torch", "transformers", "safetensors", "numpy", "pyarrow", "mlflow")
# beginnings of fields: where things lie, how long they took, what a digest stands for
_NOT_COMPARED = (
    "config.tracking",
    "config.runtime.store_dir",
    "config.runtime.checkpoint_dir",
    "config.runtime.progress",
    "config.export.sign",
    "code.status",
    "code.diff",
    "keys.inspect/",
    "outputs.facts.search_seconds",
    "outputs.facts.trials_now",
)


@dataclass(frozen=True)
class Drift:
    """One field that is not as locked; `output`: a result rather than something it depends on."""

    field: str
    locked: Any  # None: absent
    now: Any
    output: bool

    @property
    def difference(self) -> float | None:
        """|now - locked| of numbers."""
        values = (self.locked, self.now)
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            return abs(float(self.now) - float(self.locked))
        return None


def lock(
    experiment: Experiment,
    records: Sequence[StageRecord],
    packs: Mapping[str, str],
    outcome: Outcome,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """Everything `experiment` depended on in this run of it, and everything found.

    `packs` has the sha256 of every pack that was read.

    Passwords in URLs are left out.
    """
    config = experiment.model_dump(mode="json")
    seeds = {k: v for k, v in flatten(config).items() if k.endswith(("seed", "seeds"))}
    value: dict[str, Any] = {
        "format": _FORMAT,
        "overrides": list(overrides),
        "seeds": seeds,
        "config": config,
        "inputs": _inputs(experiment, records, packs),
        "code": code_state(),
        "versions": {"python": sys.version.split()[0], **versions()},
        "device": _device(experiment),
        "keys": _by_stage(records, "key"),
        "from_store": [name for name, cached in _by_stage(records, "cached").items() if cached],
        "outputs": _outputs(records, outcome),
    }
    redacted: dict[str, Any] = _redacted(value)
    return redacted


def write_lock(out: Path, value: Mapping[str, Any]) -> Path:
    """Write `run.lock.yaml` into the run's directory; numbers are read back to the bit."""
    text = (
        "# What this run depended on and what it found: task=replay replay.lock=FILE repeats it.\n"
    )
    text += yaml_text(dict(value), width=100)
    write_atomically(out / FILE, text)
    return out / FILE


def read_lock(path: Path) -> dict[str, Any]:
    """Read a lock; raises UserError where `path` holds none."""
    value = load_yaml(path, "replay.lock")
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise UserError(f"replay.lock = {path} is no {FILE} of format {_FORMAT}")
    missing = [name for name in _SECTIONS if not isinstance(value.get(name), dict)]
    if missing:
        raise UserError(f"replay.lock = {path} lacks {', '.join(missing)}")
    return {**value, "config": renamed(value["config"])}


def drift(locked: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[Drift], int]:
    """Fields that differ, inputs first, and how many fields were compared."""
    before, after = _fields(locked), _fields(now)
    names = list(dict.fromkeys([*before, *after]))
    found = [
        Drift(name, before.get(name), after.get(name), name.startswith("outputs."))
        for name in names
        if name not in before or name not in after or before[name] != after[name]
    ]
    return sorted(found, key=lambda item: item.output), len(names)


def code_state() -> dict[str, Any]:
    """Version, and the commit and uncommitted changes where this code is a git checkout."""
    known: dict[str, Any] = {"version": eaft_prune.__version__, "commit": "unknown"}
    git = git_of_code()
    if git is None:
        return known
    sha = hashlib.sha256(git.diff.encode()).hexdigest()
    changes = {"dirty": bool(git.status), "status": git.status, "diff": git.diff}
    return known | {"commit": git.commit, "changes_sha256": sha, **changes}


def versions() -> dict[str, str]:
    """Installed versions of the packages results depend on."""
    return {package: installed(package) for package in _PACKAGES}


def _inputs(
    experiment: Experiment, records: Sequence[StageRecord], packs: Mapping[str, str]
) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for record in records:
        if record.stage == "inspect/base":
            files = dict(load(record.path, Hashes).files)
            where = experiment.model.model_dump(exclude={"name"}, exclude_none=True)
            inputs["model"] = {**where, "digest": model_digest(files), "files": files}
    inputs["packs"] = {
        name: {"path": experiment.packs.files[name], "sha256": sha} for name, sha in packs.items()
    }
    inputs["blocks"] = {
        name.removeprefix("pack/"): {"rows": facts["rows_digest"], "tokens": facts["token_digest"]}
        for name, facts in _by_stage(records, "facts").items()
        if name.startswith("pack/")
    }
    if experiment.scores:
        inputs["scores"] = {"sha256": file_digest(resolve_path(experiment.scores))}
    return inputs


def _outputs(records: Sequence[StageRecord], outcome: Outcome) -> dict[str, Any]:
    comparison, selection = outcome.comparison, outcome.selection
    outputs: dict[str, Any] = {"stages": _by_stage(records, "output_digest")}
    if selection is not None:
        kept = {str(layer): id_ranges(ids) for layer, ids in enumerate(selection.plan.kept)}
        outputs["plan"] = {"digest": selection.plan.digest, "kept": kept}
    if outcome.checkpoint is not None:
        outputs["checkpoint"] = outcome.checkpoint.digest
    if comparison is not None:
        outputs["metrics"] = reports_by_name(comparison.reports)
        outputs["gates"] = {
            label: {
                "status": verdict.status,
                "plain_status": verdict.plain,
                "failed_checks": list(verdict.failed_checks),
            }
            for label, verdict in comparison.verdicts.items()
        }
    return {**outputs, "facts": dict(outcome.facts)}


def _by_stage(records: Sequence[StageRecord], fact: str) -> dict[str, Any]:
    """Stage -> a fact of its record; a stage with several keys is numbered in order."""
    found: dict[str, Any] = {}
    names: dict[tuple[str, str], str] = {}
    for record in records:
        count = sum(stage == record.stage for stage, _ in names)
        name = record.stage if count == 0 else f"{record.stage}#{count + 1}"
        name = names.setdefault((record.stage, record.key), name)
        found[name] = getattr(record, fact)
    return found


def _device(experiment: Experiment) -> dict[str, Any]:
    from eaft_prune.engines.machine import describe  # torch: a settings check does without

    return describe(experiment.runtime)


def _fields(value: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten({name: value[name] for name in _SECTIONS})
    return {k: v for k, v in flat.items() if not k.startswith(_NOT_COMPARED)}


def _redacted(value: Any) -> Any:
    """Plain YAML values, without passwords."""
    if isinstance(value, Mapping):
        return {str(key): _redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value
