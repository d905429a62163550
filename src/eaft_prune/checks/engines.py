"""task=doctor's lines on engines: does each take what is planned, and is the chosen one there?"""

from __future__ import annotations

from collections.abc import Iterable

from eaft_prune.checks.doctor import local_model
from eaft_prune.checks.preflight import preflight
from eaft_prune.config import Experiment
from eaft_prune.core.diagnosis import Diagnosis
from eaft_prune.core.types import UserError
from eaft_prune.engines.base import EngineOptions
from eaft_prune.engines.registry import engine_kind


def check_engines(experiment: Experiment) -> Iterable[Diagnosis]:
    """A line an engine: only the one of the settings is wrong where it does not fit."""
    settings = experiment.engine
    try:
        files = local_model(experiment)
    except UserError:
        return  # check_model tells
    for fit in preflight(files.config, experiment.pruning.keep_n, settings):
        what = (
            f"{fit.engine}: keep_n = {experiment.pruning.keep_n} {'fits' if fit.ok else 'does not'}"
        )
        ok = fit.ok or fit.engine != settings.name
        yield Diagnosis("engines", ok, f"{what}{', ' + fit.why if fit.why else ''}")
    options = EngineOptions.of(experiment)
    try:
        engine_kind(settings.name).check(options, max(experiment.eval.seq_lens), files.path)
    except UserError as error:
        yield Diagnosis("engines", False, str(error))
