"""The validated settings: one frozen `Experiment`, checked once before anything loads."""

from eaft_prune.config.base import BlockCount, Settings, nearest, resolve_path
from eaft_prune.config.code import runs_code
from eaft_prune.config.decoding import DecodeSettings
from eaft_prune.config.defaults import nodes
from eaft_prune.config.eval import EvalSettings
from eaft_prune.config.experiment import Experiment
from eaft_prune.config.frontier import FrontierSettings
from eaft_prune.config.gate import GateSettings
from eaft_prune.config.generation import GenerationSettings
from eaft_prune.config.harness import HarnessSettings
from eaft_prune.config.inputs import ModelSettings, PacksSettings, ProfileSettings
from eaft_prune.config.losses import MarginalSettings
from eaft_prune.config.parse import parse_experiment, setting_names
from eaft_prune.config.proof import (
    CandidateSettings,
    CompareSettings,
    ReplaySettings,
    VerifySettings,
)
from eaft_prune.config.pruning import (
    PLAN_SETTINGS,
    CompensationSettings,
    ExportSettings,
    ProbeSettings,
    PruningSettings,
)
from eaft_prune.config.publish import PublishSettings
from eaft_prune.config.renamed import renamed, unknown
from eaft_prune.config.resampling import AblateSettings, StabilitySettings
from eaft_prune.config.runtime import (
    SERVERS,
    EngineSettings,
    GgufSettings,
    RuntimeSettings,
    SweepSettings,
    TrackingSettings,
)
from eaft_prune.config.search import RangeSettings, SamplerSettings, SearchSettings
from eaft_prune.config.upkeep import DoctorSettings, GcSettings, MemoSettings

__all__ = [
    "PLAN_SETTINGS",
    "SERVERS",
    "AblateSettings",
    "BlockCount",
    "CandidateSettings",
    "CompareSettings",
    "CompensationSettings",
    "DecodeSettings",
    "DoctorSettings",
    "EngineSettings",
    "EvalSettings",
    "Experiment",
    "ExportSettings",
    "FrontierSettings",
    "GateSettings",
    "GcSettings",
    "GenerationSettings",
    "GgufSettings",
    "HarnessSettings",
    "MarginalSettings",
    "MemoSettings",
    "ModelSettings",
    "PacksSettings",
    "ProbeSettings",
    "ProfileSettings",
    "PruningSettings",
    "PublishSettings",
    "RangeSettings",
    "ReplaySettings",
    "RuntimeSettings",
    "SamplerSettings",
    "SearchSettings",
    "Settings",
    "StabilitySettings",
    "SweepSettings",
    "TrackingSettings",
    "VerifySettings",
    "nearest",
    "nodes",
    "parse_experiment",
    "renamed",
    "resolve_path",
    "runs_code",
    "setting_names",
    "unknown",
]
