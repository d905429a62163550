"""manifest.json.sig: who wrote a checkpoint, by an Ed25519 signature of its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaft_prune.checkpoints.read import MANIFEST, SIGNATURE
from eaft_prune.core.files import write_atomically
from eaft_prune.core.foreign import check_regular
from eaft_prune.core.types import UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_MOST = 65_536  # bytes of a key's file
_LENGTH = 64  # bytes of a signature


def private_key(path: Path) -> Ed25519PrivateKey:
    """The key in a PEM file without a password; raises UserError where there is none."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_content(path), password=None)
    except (ValueError, TypeError, OSError) as error:  # TypeError: it wants a password
        raise _no_key("export.sign", path, "private", error) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key("export.sign", path, "private", type(key).__name__)
    return key


def sign(export: Path, key: Path) -> None:
    """Put the manifest's signature beside it; equal bytes and key give an equal one.

    Raises UserError where another lies there: it is not ours to replace.
    """
    signature = private_key(key).sign((export / MANIFEST).read_bytes())
    path = export / SIGNATURE
    if not path.exists():
        write_atomically(path, signature)
    elif path.read_bytes() != signature:
        raise UserError(f"{path} is of another key or manifest: move it away and run again")


def unsigned(export: Path, key: Path) -> str | None:
    """Why the holder of a public key (PEM) did not sign this manifest as it is, or None."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        public = load_pem_public_key(_content(key))
    except (ValueError, OSError) as error:
        raise _no_key("verify.public_key", key, "public", error) from None
    if not isinstance(public, Ed25519PublicKey):
        raise _no_key("verify.public_key", key, "public", type(public).__name__)
    try:
        if check_regular(export / SIGNATURE) != _LENGTH:
            return f"is no signature of {_LENGTH} bytes"
        public.verify((export / SIGNATURE).read_bytes(), (export / MANIFEST).read_bytes())
    except UserError as error:
        return str(error)
    except InvalidSignature:
        return f"is not a signature of {MANIFEST} with the key of {key}"
    return None


def _content(path: Path) -> bytes:
    if check_regular(path) > _MOST:
        raise UserError("too large for a key")
    return path.read_bytes()


def _no_key(setting: str, path: Path, kind: str, why: Any) -> UserError:
    line = " ".join(str(why).split())
    return UserError(f"{setting} = {path} is no {kind} Ed25519 key in PEM, no password: {line}")
