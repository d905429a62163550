"""The validated settings: one frozen `Experiment`, checked once before anything loads."""

from eaft_prune.config.base import Settings, nearest, resolve_path
from eaft_prune.config.evaluation import CompareSettings, EvalSettings, GateSettings
from eaft_prune.config.experiment import Experiment
from eaft_prune.config.inputs import ModelSettings, PacksSettings, ProfileSettings
from eaft_prune.config.parse import parse_experiment, setting_names
from eaft_prune.config.proof import ReplaySettings, VerifySettings
from eaft_prune.config.pruning import (
    CompensationSettings,
    ExportSettings,
    ProbeSettings,
    PruningSettings,
    Regions,
)
from eaft_prune.config.runtime import (
    EngineSettings,
    RuntimeSettings,
    SweepSettings,
    TrackingSettings,
)
from eaft_prune.config.search import RangeSettings, SamplerSettings, SearchSettings

__all__ = [
    "CompareSettings",
    "CompensationSettings",
    "EngineSettings",
    "EvalSettings",
    "Experiment",
    "ExportSettings",
    "GateSettings",
    "ModelSettings",
    "PacksSettings",
    "ProbeSettings",
    "ProfileSettings",
    "PruningSettings",
    "RangeSettings",
    "Regions",
    "ReplaySettings",
    "RuntimeSettings",
    "SamplerSettings",
    "SearchSettings",
    "Settings",
    "SweepSettings",
    "TrackingSettings",
    "VerifySettings",
    "nearest",
    "parse_experiment",
    "resolve_path",
    "setting_names",
]
