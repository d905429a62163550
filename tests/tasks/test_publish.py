"""task=publish against a hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_standin import Hub, serving
from support.runs import Done, World

pytest_plugins = ("support.worlds",)

REPO = "me/pruned"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has Git LFS alone
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def passed(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Done]:
    """A run whose checkpoint passes: every expert kept."""
    own = world.elsewhere(tmp_path_factory.mktemp("publish"))
    done = own.run("task=noop")
    assert done.result["gate"]["status"] == "PASS", done.out + done.err
    return own, done


def directory(done: Done) -> Path:
    (file,) = [p for p in done.cwd.rglob("result.json") if "artifacts" not in p.parts]
    return file.parent


def publish(world: World, run: Path, hub: Hub, *overrides: str) -> Done:
    where = (f"publish.repo={REPO}", f"publish.run={run}", f"publish.endpoint={hub.url}")
    return world.run("task=publish", *where, *overrides)


def test_a_checkpoint_that_passed_goes_up_whole_with_its_evidence(
    passed: tuple[World, Done], hub: Hub
) -> None:
    own, done = passed
    run, checkpoint = directory(done), Path(done.result["checkpoint"]["path"])
    dry = publish(own, run, hub, "publish.dry_run=true")
    assert dry.code == 0, dry.err
    assert not hub.tokens  # nobody was asked
    sent = publish(own, run, hub)
    assert sent.code == 0, sent.out + sent.err
    files = hub.repos[f"{REPO}@main"]
    evidence = {
        f"evidence/{n}" for n in ("result.json", "run.lock.yaml", "report.html", "report.md")
    }
    ours = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    assert set(files) - {".gitattributes"} == ours | evidence
    assert {"README.md", "manifest.json", "reap-recipe.yaml"} <= ours
    for name, content in files.items():
        place = run if name in evidence else checkpoint
        if name != ".gitattributes":
            assert content == (place / name.removeprefix("evidence/")).read_bytes(), name
            assert name in dry.out
    assert hub.private == {REPO: True}
    assert hub.tokens == {"Bearer hf_secret", ""}  # the address that LFS gives needs none
    assert "hf_secret" not in sent.out + sent.err
    assert hub.commits == [f"{checkpoint.name}: PASS"]
    assert sent.result["facts"]["commit"].startswith(f"{hub.url}/{REPO}/commit/")
    # again: the same checkpoint may be sent anew, anything else is not overwritten
    assert publish(own, run, hub).code == 0
    files["manifest.json"] = b"{}"
    assert "not overwritten" in publish(own, run, hub).failed()
    assert publish(own, run, hub, "publish.revision=second").code == 0
    assert set(hub.repos[f"{REPO}@second"]) == set(files) - {".gitattributes"}


def test_what_did_not_pass_is_refused_unless_asked_for(
    world: World, pipeline: Done, hub: Hub
) -> None:
    status = pipeline.result["gate"]["status"]
    assert status != "PASS"
    run = directory(pipeline)
    said = publish(world, run, hub).failed()
    assert status in said
    assert "publish.anyway=true" in said
    assert not hub.repos
    sent = publish(world, run, hub, "publish.anyway=true", "publish.private=false")
    assert sent.code == 0, sent.err
    assert hub.private == {REPO: False}
    assert hub.commits[0].endswith(f": {status}")
    assert status.encode() in hub.repos[f"{REPO}@main"]["README.md"]


def test_a_checkpoint_that_is_no_longer_what_was_judged_is_refused(
    passed: tuple[World, Done], hub: Hub
) -> None:
    own, done = passed
    shard = next(Path(done.result["checkpoint"]["path"]).glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert shard.name in publish(own, directory(done), hub).failed()
        assert not hub.repos
    finally:
        shard.write_bytes(content)


def test_a_hub_that_refuses_is_told(passed: tuple[World, Done], hub: Hub) -> None:
    hub.refuse = 403
    own, done = passed
    said = publish(own, directory(done), hub).failed()
    assert "HF_TOKEN" in said
    assert REPO in said
    assert "hf_secret" not in said
