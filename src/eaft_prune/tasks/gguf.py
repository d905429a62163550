"""task=gguf: a checkpoint for llama.cpp, loaded there and compared with transformers."""

from __future__ import annotations

from pathlib import Path

from eaft_prune.config import resolve_path
from eaft_prune.core.digests import file_digest
from eaft_prune.core.outcome import Outcome
from eaft_prune.core.types import UserError
from eaft_prune.pipeline.session import Session
from eaft_prune.pipeline.smoke import compared, first_tokens, told


def run_gguf(session: Session, out: Path) -> Outcome:
    """Convert, load, and write ten tokens; the file is there only where llama.cpp loads it."""
    from eaft_prune.engines.llamacpp.engine import LlamaEngine
    from eaft_prune.engines.llamacpp.gguf import convert
    from eaft_prune.engines.llamacpp.serving import identity, opened

    experiment, options = session.experiment, session.options
    asked = experiment.gguf.path
    target = resolve_path(asked) if asked else out / f"{experiment.model.name}.gguf"
    if target.exists():
        raise UserError(f"gguf.path: {target} is there already: move it away, or name another file")
    how = identity(options)
    base = session.base()
    draft, log_file = target.with_name(f".{target.stem}.loading.gguf"), out / "gguf.log"
    convert(options.engine, base.files, draft, log_file)
    try:
        worker = opened(options.engine, base.files, draft, options.runtime.threads, log_file)
        theirs = first_tokens(session, base, LlamaEngine(worker, how, options.entropy_top_k))
        worker.stop()
        found = compared(session, base, theirs)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    gigabytes, sha256 = target.stat().st_size / 1e9, file_digest(target)
    facts = {
        "gguf": str(target),
        "gb": gigabytes,
        "sha256": sha256,
        "how": how,
        "meta": worker.facts,
        "smoke": told("llamacpp", found),
    }
    size = f"{target} ({gigabytes:.3f} GB, sha256 {sha256})"
    at = found.first_difference
    same = "the same ten tokens as transformers" if at is None else f"{at} of ten tokens the same"
    return Outcome(
        base=base.checkpoint, facts=facts, text=f"{'gguf':<11} {size}\nsmoke       {same}"
    )
