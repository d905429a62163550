"""How plans of a size come about: by ranking, greedily, or either of them repaired."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from eaft_prune.checkpoints.model import Model
from eaft_prune.config import Experiment, FrontierSettings, MarginalSettings, PruningSettings
from eaft_prune.core.outcome import Selection
from eaft_prune.core.types import ExpertScores
from eaft_prune.pipeline.criterion import select
from eaft_prune.pipeline.observer import Aside
from eaft_prune.pipeline.requests import frontier_search
from eaft_prune.pipeline.session import Session
from eaft_prune.stages.plan import plan


@dataclass(frozen=True)
class Method:
    """Settings and scores that the plans of every size are cut from."""

    name: str
    pruning: PruningSettings
    marginal: MarginalSettings
    scores: ExpertScores

    @property
    def repairs(self) -> bool:
        """Whether weights are changed, so that plans cannot be tried masked."""
        return self.pruning.compensation != "none"

    def settings(self, keep_n: int) -> PruningSettings:
        """Those of one size."""
        return self.pruning.model_copy(update={"keep_n": keep_n})

    def within(self, session: Session, keep_n: int) -> Session:
        """A session with the settings of one size."""
        return with_settings(session, pruning=self.settings(keep_n), marginal=self.marginal)

    def selection(self, base: Model, keep_n: int) -> Selection:
        """The plan of one size, and why."""
        settings = self.settings(keep_n)
        cut = plan(settings, self.scores, None, base.groups)
        return Selection(settings.name, self.scores, cut, settings.model_dump(mode="json"))


def settings_of(session: Session) -> FrontierSettings:
    """The section of the task."""
    settings = session.experiment.frontier
    assert settings is not None, "config requires frontier settings for task=frontier"
    return settings


def ranking(session: Session, base: Model, least: int) -> Method:
    """The criterion of the settings."""
    experiment = session.experiment
    return _scored(session, base, "ranking", (experiment.pruning, experiment.marginal), least)


def greedy(session: Session, base: Model, least: int) -> Method:
    """Losses measured by masking, one expert a layer and round, down to the least size."""
    pruning = PruningSettings(
        name="greedy",
        saliency="greedy",
        core_pos_top_m=0,
        keep_n=least,
        keep_multiple=session.experiment.pruning.keep_multiple,
    )
    return _scored(session, base, "greedy", (pruning, greedy_losses(session)), least)


def greedy_losses(session: Session) -> MarginalSettings:
    """How greedy measures losses: down to the least size, on blocks of its own number."""
    blocks = settings_of(session).greedy_blocks
    return session.experiment.marginal.model_copy(update={"num_blocks": blocks, "rounds": None})


def repaired(session: Session, method: Method) -> Method:
    """The plans of another method, their kept experts refitted."""
    level = settings_of(session).repair
    pruning = method.pruning.model_copy(update={"compensation": level})
    return replace(method, name="repaired", pruning=pruning)


def with_settings(session: Session, **sections: Any) -> Session:
    """The same session with other sections of settings."""
    experiment: Experiment = session.experiment.model_copy(update=sections)
    return replace(session, experiment=experiment)


def trying(session: Session) -> Session:
    """A session that measures on the search's rows, with early looks, and is not told as the run.

    Its exports go to their own places, whatever `export.path` is.
    """
    experiment = session.experiment
    request = frontier_search(experiment)
    looks = experiment.eval.model_copy(
        update={
            "packs": (request.pack,),
            "seq_lens": (request.seq_len,),
            "num_blocks": request.num_blocks,
            "seed": request.seed,
            "early_stop": experiment.gate.confidence is not None,
        }
    )
    # further packs, and what is rare, few rows cannot show: the proof asks
    asked = {"packs": {}, "rarest": 0.99, "seq_lens": (request.seq_len,)}
    gate = experiment.gate.of_tokens.model_copy(update=asked)
    export = experiment.export.model_copy(update={"path": None, "sign": None})
    aside = with_settings(session, eval=looks, gate=gate, beside=None, export=export)
    return replace(aside, observer=Aside(session.observer))


def _scored(
    session: Session,
    base: Model,
    name: str,
    how: tuple[PruningSettings, MarginalSettings],
    least: int,
) -> Method:
    """Scores are those of the least size: of greedy they hold all larger ones."""
    pruning, marginal = how
    of_least = pruning.model_copy(update={"keep_n": least})
    asked = with_settings(session, pruning=of_least, marginal=marginal)
    return Method(name, pruning, marginal, select(asked, base).scores)
