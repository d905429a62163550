"""smoke: does the engine that will serve a checkpoint write what transformers writes?"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from eaft_prune.checkpoints.model import Model
from eaft_prune.core.generation import Decoding
from eaft_prune.core.step import Step
from eaft_prune.engines.base import Writer
from eaft_prune.engines.registry import TRANSFORMERS
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


def smoke(session: Session, model: Model) -> dict[str, Any]:
    """Facts of a checkpoint's first tokens in the engine; none where that is transformers itself.

    An engine that writes nothing is left out, too: its scores have loaded the checkpoint. A
    difference is said and no error: where two tokens are as likely, rounding decides.
    """
    kind = session.kind
    if not kind.writes or kind is TRANSFORMERS:
        return {}

    def compute() -> Smoke:
        theirs = first_tokens(session, model, cast(Writer, session.scorer(model)))
        return compared(session, model, theirs)

    step = Step(
        f"smoke/{model.label}",
        1,
        {**kind.key(session.options), "dtype": session.dtype, "prompt": _PROMPT},
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
