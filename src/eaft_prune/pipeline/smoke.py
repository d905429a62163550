"""smoke: do the engines that will serve a checkpoint write what transformers writes?"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.checkpoints.model import Model
from eaft_prune.checks.preflight import check_engine
from eaft_prune.core.generation import Decoding
from eaft_prune.core.step import Step
from eaft_prune.core.types import UserError
from eaft_prune.engines.base import EngineOptions, Writer
from eaft_prune.engines.registry import TRANSFORMERS, engine_kind
from eaft_prune.maths.generation import first_difference
from eaft_prune.pipeline.session import Session

_PROMPT = "The sum of two and two is"
_TOKENS = 10
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Smoke:
    """Ten greedy tokens behind one prompt, by two engines."""

    theirs: NDArray[np.int32]
    ours: NDArray[np.int32]

    @property
    def first_difference(self) -> int | None:
        """Tokens they share before; None: they are equal."""
        return first_difference(self.theirs.tolist(), self.ours.tolist())


def check(session: Session, base: Model) -> None:
    """Raise UserError where an engine of export.smoke is not there, cannot write, or take it."""
    for options in _further(session):
        kind = engine_kind(options.engine.name)
        if not kind.writes:
            raise UserError(f"export.smoke names {kind.name}, which writes nothing: drop it")
        check_engine(base.files.config, session.experiment.pruning.keep_n, options.engine)
        kind.check(options, _TOKENS, base.files.path)


def smoke(session: Session, model: Model) -> list[dict[str, Any]]:
    """Facts of a checkpoint's first tokens in the engine that evaluated it, and in export.smoke's.

    One that evaluated it is left out where it is transformers, or writes nothing: its scores have
    loaded the checkpoint. A difference is said and no error: where two tokens are as likely,
    rounding decides.
    """
    own = [session.options] if session.kind.writes and session.kind is not TRANSFORMERS else []
    return [_smoke(session, model, options) for options in (*own, *_further(session))]


def _further(session: Session) -> list[EngineOptions]:
    return [replace(session.options, engine=some) for some in session.experiment.export.smoke]


def _smoke(session: Session, model: Model, options: EngineOptions) -> dict[str, Any]:
    kind = engine_kind(options.engine.name)

    def compute() -> Smoke:
        theirs = first_tokens(session, model, session.writer(model, options))
        return compared(session, model, theirs)

    step = Step(
        f"smoke/{model.label}/{kind.name}",
        1,
        {**kind.key(options), "dtype": session.dtype, "prompt": _PROMPT},
        {"model": model.digest, "tokenizer": model.tokenizer_digest},
        Smoke,
        compute,
    )
    return told(kind.name, session.run(step).value)


def first_tokens(session: Session, model: Model, writer: Writer) -> NDArray[np.int32]:
    """What an engine writes behind the prompt."""
    prompts, how = session.tokenizer(model).encode([_PROMPT]), Decoding(_TOKENS, ())
    (written,), _ = writer.generate(prompts, how, 0, lambda done: None)
    return np.array(written, np.int32)


def compared(session: Session, model: Model, theirs: NDArray[np.int32]) -> Smoke:
    """An engine's tokens beside those of transformers, which takes its place in memory."""
    return Smoke(theirs, first_tokens(session, model, session.local_engine(model)))


def told(engine: str, found: Smoke) -> dict[str, Any]:
    """The facts of a comparison, which the log tells as well."""
    at = found.first_difference
    if at is None:
        log.info("smoke: %s writes the %d tokens that transformers writes", engine, _TOKENS)
    else:
        log.warning(
            "smoke: %s and transformers write the same %d tokens, then differ: %s and %s",
            engine, at, found.theirs[at:].tolist(), found.ours[at:].tolist(),
        )  # fmt: skip
    return {"engine": engine, "tokens": _TOKENS, "first_difference": at}
