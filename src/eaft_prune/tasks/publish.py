"""task=publish: a judged checkpoint to the hub, with the evidence that it was judged on."""

from __future__ import annotations

from pathlib import Path

from eaft_prune.checkpoints.hub import Repository
from eaft_prune.checkpoints.read import MANIFEST
from eaft_prune.checks.verify import check_files, work
from eaft_prune.config import PublishSettings, resolve_path
from eaft_prune.core.outcome import Outcome
from eaft_prune.core.types import Checkpoint, UserError
from eaft_prune.pipeline.session import Session
from eaft_prune.records.lock import FILE as LOCK
from eaft_prune.records.manifest import Manifest, read_manifest
from eaft_prune.records.result import FILE as RESULT
from eaft_prune.records.results import Result, load_result
from eaft_prune.report.terminal import listing

EVIDENCE = "evidence"  # folder of the repository that the run's own files go to
_FILES = (RESULT, LOCK, "report.html", "report.md", "frontier.html", "frontier.md", "frontier.csv")


def run_publish(session: Session, out: Path) -> Outcome:
    """Check verdict and bytes, then upload checkpoint and evidence in one commit."""
    settings = session.experiment.publish
    assert settings is not None, "config requires publish.* for this task"
    result = load_result(resolve_path(settings.run))
    verdict = _verdict(settings, result)
    manifest = _checkpoint(session, result)
    files = {
        **{name: manifest.path / name for name in (*manifest.files, *manifest.records, MANIFEST)},
        **{name: manifest.path / name for name in ("README.md", "manifest.json.sig")
           if (manifest.path / name).is_file()},
        **{f"{EVIDENCE}/{name}": result.path / name for name in _FILES
           if (result.path / name).is_file()},
    }  # fmt: skip
    rows = [(name, f"{path.stat().st_size:,}") for name, path in sorted(files.items())]
    text = listing(("file", "bytes"), rows, right=("bytes",))
    facts = {"repo": settings.repo, "verdict": verdict, "files": len(files)}
    where = "nothing was uploaded: publish.dry_run = true"
    if not settings.dry_run:
        where = _upload(settings, manifest, files, f"{manifest.path.name}: {verdict}")
        facts["commit"] = where
    return Outcome(
        checkpoint=Checkpoint(manifest.path, manifest.digest, "pruned"),
        facts=facts,
        text=f"{text}\n\n{verdict}\n{where}",
    )


def _verdict(settings: PublishSettings, result: Result) -> str:
    """The gate's word, which must be PASS unless it may be published anyway."""
    if result.status != "FINISHED" or result.checkpoint is None:
        raise UserError(
            f"publish.run = {settings.run!r} is {result.status} and has "
            f"{'a' if result.checkpoint else 'no'} checkpoint: give a finished run that has one"
        )
    verdict = result.verdict or "NOT JUDGED"
    if verdict != "PASS" and not settings.anyway:
        failed = " ".join(result.values["gate"]["failed_checks"]) if result.verdict else ""
        raise UserError(
            f"publish.run = {settings.run!r}: its verdict is {verdict}{failed and f' ({failed})'}; "
            "publish.anyway=true uploads it all the same"
        )
    return verdict


def _checkpoint(session: Session, result: Result) -> Manifest:
    """The run's checkpoint, every byte as when it was judged."""
    assert result.checkpoint is not None, "a run without a checkpoint was refused"
    manifest = read_manifest(result.checkpoint)
    judged = result.values["checkpoint"]["digest"]
    if manifest.digest != judged:
        raise UserError(
            f"{manifest.path} has digest {manifest.digest[:12]}, and {judged[:12]} was judged: it "
            "was written anew since; judge it again"
        )
    with session.bars.bar("hash", work(manifest), "B") as on_bytes:
        found = check_files(manifest, on_bytes)
    if found:
        raise UserError(f"{manifest.path}: {found[0].file} {found[0].what}: judge it again")
    return manifest


def _upload(
    settings: PublishSettings, manifest: Manifest, files: dict[str, Path], message: str
) -> str:
    """One commit, to a repository that is empty or has an earlier upload of this checkpoint."""
    there = Repository(settings.repo, settings.revision, settings.endpoint)
    present = there.files()
    if present and not there.holds(MANIFEST, manifest.path / MANIFEST):
        raise UserError(
            f"publish.repo = {settings.repo!r} at {settings.revision} holds other files "
            f"({', '.join(sorted(present)[:3])} ...), which are not overwritten: give another "
            "repository, or publish.revision=NAME of a new branch"
        )
    return there.upload(files, settings.private, message)
