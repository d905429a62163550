"""task: what base and candidates answer to tasks of lm-evaluation-harness, through the store.

A task is a stage of a model; what it asks goes to the store in batches, which a killed run finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from eaft_prune.checkpoints.model import Model
from eaft_prune.checkpoints.positions import max_positions
from eaft_prune.core.digests import digest
from eaft_prune.core.generation import Written
from eaft_prune.core.harness import Answers, Continuations, Likelihoods, Openings, TaskReport
from eaft_prune.core.step import Step
from eaft_prune.core.types import UserError
from eaft_prune.engines.base import OnTokens
from eaft_prune.pipeline.evaluation import Side, key_of, opened
from eaft_prune.pipeline.session import Session
from eaft_prune.stages import generate, likelihoods, task_pairs

if TYPE_CHECKING:
    from eaft_prune.stages import harness

T = TypeVar("T", Likelihoods, Written)
Batch = Continuations | Openings


def check_installed() -> None:
    """Raise UserError where the harness is not."""
    if find_spec("lm_eval") is None:
        raise UserError(
            "eval.tasks needs lm-evaluation-harness, which is not installed: "
            "pip install 'eaft_prune[tasks]'"
        )


def asked(session: Session, base: Model) -> list[harness.Task]:
    """The tasks of eval.tasks with their data: what cannot be had shows at once."""
    experiment = session.experiment
    if not experiment.eval.tasks:
        return []
    from eaft_prune.stages import harness  # 3 s, and only where it is installed

    tokenizer = session.tokenizer(base)
    return [harness.load(name, experiment.harness, tokenizer) for name in experiment.eval.tasks]


def answered(
    session: Session, sides: Sequence[Side], tasks: Sequence[harness.Task]
) -> dict[str, dict[str, TaskReport]]:
    """Every candidate beside the base, the first side, by task."""
    confidence = session.experiment.gate.confidence
    found: dict[str, dict[str, TaskReport]] = (
        {side.label: {} for side in sides[1:]} if tasks else {}
    )
    for task in tasks:
        what = task.digest
        first, *others = [session.run(_answers(session, side, task, what)) for side in sides]
        for side, other in zip(sides[1:], others, strict=True):
            found[side.label][task.name] = task_pairs.compare(
                task.name, first.value, other.value, confidence
            )
    return found


def _answers(session: Session, side: Side, task: harness.Task, asked: str) -> Step[Answers]:
    from eaft_prune.stages import harness

    settings, inputs = key_of(session, side)
    asker = harness.Asker(
        lambda batches: _through(session, side, task.name, batches, Likelihoods, _score),
        lambda batches: _through(session, side, task.name, batches, Written, _write),
    )
    return Step(
        f"task/{side.label}/{task.name}",
        harness.VERSION,
        settings,
        {**inputs, "asked": asked},
        Answers,
        lambda: harness.answers(task, asker),
        lambda value, seconds: {
            "samples": len(value.ids),
            **{name: sum(some) / len(some) for name, some in value.scores.items()},
        },
    )


def _through(
    session: Session,
    side: Side,
    task: str,
    batches: Sequence[Batch],
    kind: type[T],
    answer: Callable[[Any, Any, OnTokens], T],
) -> list[T]:
    """Each batch from the store, or from the model: then it waits there for the task's end.

    They are no stages of the run: what is made of them is.
    """
    settings, inputs = key_of(session, side)
    _check_length(side.model, task, batches)
    total = sum(map(_tokens, batches))

    def step(batch: Batch, on_tokens: OnTokens) -> Step[T]:
        def compute() -> T:
            with opened(session, side) as model:
                return answer(model, batch, on_tokens)

        version = [generate.VERSION, likelihoods.VERSION]
        asked = digest({"kind": kind.__name__, "versions": version, **asdict(batch)})
        return Step("answers", 1, settings, {**inputs, "asked": asked}, kind, compute)

    found = []
    with session.bars.bar(f"{side.label}/{task}", total, "tok") as on_tokens:
        for batch in batches:
            stored = session.store.run(step(batch, on_tokens))
            if stored.record.cached:
                on_tokens(_tokens(batch))
            found.append(stored.value)
    return found


def _score(model: Any, batch: Continuations, on_tokens: OnTokens) -> Likelihoods:
    return likelihoods.likelihoods(model, batch, on_tokens)


def _write(model: Any, batch: Openings, on_tokens: OnTokens) -> Written:
    return generate.generate(model, batch.lists, batch.how, batch.first, on_tokens)


def _tokens(batch: Batch) -> int:
    """As the engine counts them."""
    if isinstance(batch, Openings):
        return len(batch.lists) * batch.how.max_new_tokens
    return len(batch.lists) * max(map(len, batch.lists))


def _check_length(model: Model, task: str, batches: Sequence[Batch]) -> None:
    most = max_positions(model.language)
    for batch in batches:
        more = batch.how.max_new_tokens if isinstance(batch, Openings) else 0
        longest = max(map(len, batch.lists)) + more
        if most is not None and longest > most:
            raise UserError(
                f"eval.tasks: {task} takes {longest} tokens ({more} of them to be written), the "
                f"model has place for {most}: lower harness.num_fewshot, or leave it out"
            )


def in_numbers(found: Mapping[str, TaskReport]) -> dict[str, float]:
    """task/metric/filter/... -> both means, recovery in percent, McNemar's p."""
    figures: dict[str, float] = {}
    for task, report in found.items():
        for metric, one in report.scored.items():
            where = f"{task}/{metric.replace(', ', '/')}"
            figures |= {f"{where}/base": one.base, f"{where}/candidate": one.candidate}
            if one.base > 0:
                figures[f"{where}/recovery_percent"] = 100 * one.candidate / one.base
            if one.flips is not None:
                figures[f"{where}/p_value"] = one.flips.p_value
    return figures
