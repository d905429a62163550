"""A signature says who wrote a checkpoint: what is not that key's is found, none is replaced."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from support.runs import REPOSITORY, World

from eaft_prune.core.types import UserError
from eaft_prune.records.signature import private_key, sign, unsigned

pytest_plugins = ("support.worlds",)

Private = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey


def write_key(
    folder: Path,
    name: str,
    key: Private | None = None,
    encryption: KeySerializationEncryption | None = None,
) -> tuple[Path, Path]:
    """The files of a private key and its public one."""
    key = key or ed25519.Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def export(tmp_path: Path) -> Path:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "manifest.json").write_text('{"format": 1}')
    return tmp_path / "export"


def test_only_the_key_that_signed_and_only_the_same_bytes(export: Path, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "mine")
    _, other = write_key(tmp_path, "other")
    assert "is missing" in str(unsigned(export, public))
    sign(export, private)
    assert unsigned(export, public) is None
    assert "not a signature" in str(unsigned(export, other))
    (export / "manifest.json").write_text('{"format": 1} ')
    assert "not a signature" in str(unsigned(export, public))
    (export / "manifest.json").write_text('{"format": 1}')
    signature = export / "manifest.json.sig"
    for content in (b"", b"x" * 64, signature.read_bytes() + b"x"):
        signature.write_bytes(content)
        assert "signature" in str(unsigned(export, public))


def test_a_signature_of_another_key_is_not_replaced(export: Path, tmp_path: Path) -> None:
    (mine, _), (other, _) = write_key(tmp_path, "mine"), write_key(tmp_path, "other")
    sign(export, mine)
    before = (export / "manifest.json.sig").read_bytes()
    sign(export, mine)
    with pytest.raises(UserError, match="of another key"):
        sign(export, other)
    assert (export / "manifest.json.sig").read_bytes() == before


def test_what_is_no_key_is_one_line(export: Path, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "mine")
    curve, curve_public = write_key(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))
    locked, _ = write_key(tmp_path, "locked", encryption=BestAvailableEncryption(b"secret"))
    (tmp_path / "text").write_text("-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\n")
    for path in (public, curve, locked, tmp_path / "text", tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=r"^export.sign = .*private Ed25519 key") as caught:
            private_key(path)
        assert "\n" not in str(caught.value)
    for path in (private, curve_public, tmp_path / "text", tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=r"^verify.public_key = .*public Ed25519 key") as caught:
            unsigned(export, path)
        assert "\n" not in str(caught.value)


@pytest.mark.process
def test_the_commands_of_the_docs_make_keys_and_openssl_agrees(
    export: Path, tmp_path: Path
) -> None:
    lines = (REPOSITORY / "docs" / "use.md").read_text().splitlines()
    commands = [line.split() for line in lines if line.startswith("openssl ")]
    assert len(commands) == 2
    for command in commands:
        subprocess.run(command, cwd=tmp_path, check=True)
    sign(export, tmp_path / "key.pem")
    assert unsigned(export, tmp_path / "key.pub") is None
    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", tmp_path / "key.pub", "-rawin"]
    files = ["-in", export / "manifest.json", "-sigfile", export / "manifest.json.sig"]
    assert b"Successfully" in subprocess.check_output([*check, *files])


def test_a_run_signs_and_verify_asks_for_the_signature(world: World, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "mine")
    _, other = write_key(tmp_path, "other")
    place = world.elsewhere(tmp_path)
    wrong = place.run("task=prune", f"export.sign={public}").failed()
    assert "no private Ed25519 key" in wrong
    assert not (tmp_path / "checkpoints").exists()  # said before any work is done
    done = place.run("task=prune", f"export.sign={private}")
    assert done.code == 0, done.out + done.err
    path = Path(done.result["checkpoint"]["path"])
    ask = ("task=verify", f"verify.path={path}", "verify.load=false")
    signed = place.run(*ask, f"verify.public_key={public}")
    assert signed.code == 0, signed.out + signed.err
    assert "signed" in signed.out
    assert place.run(*ask).code == 0
    (finding,) = place.run(*ask, f"verify.public_key={other}").result["facts"]["findings"]
    assert finding["file"] == "manifest.json.sig"
    (path / "manifest.json.sig").unlink()
    assert place.run(*ask, f"verify.public_key={public}").code == 3
    assert place.run("task=prune", f"export.sign={private}").code == 0  # again, from the store
    assert place.run(*ask, f"verify.public_key={public}").code == 0
    # pruned again, the signature does not go along
    again = place.run(
        "task=prune", f"model.path={path}", "pruning.keep_n=2", "pruning.core_pos_top_m=1",
        "pruning.keep_multiple=1",
    )  # fmt: skip
    assert again.code == 0, again.out + again.err
    assert not (Path(again.result["checkpoint"]["path"]) / "manifest.json.sig").exists()


def test_a_lock_does_not_sign_with_a_key_of_this_machine(world: World, tmp_path: Path) -> None:
    private, _ = write_key(tmp_path, "mine")
    place = world.elsewhere(tmp_path)
    done = place.run("task=prune", f"export.sign={private}")
    (lock,) = done.cwd.rglob("run.lock.yaml")
    shutil.rmtree(done.result["checkpoint"]["path"])
    again = place.run("task=replay", f"replay.lock={lock}", "replay.fresh=false")
    assert again.code == 0, again.out + again.err
    assert Path(done.result["checkpoint"]["path"]).is_dir()
    assert not (Path(done.result["checkpoint"]["path"]) / "manifest.json.sig").exists()
