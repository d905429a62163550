"""Files to a repository of a hub, in one commit."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from eaft_prune.core.types import UserError

MADE_BY_HUB = {".gitattributes"}


class Repository:
    """A model repository at a revision, which is made where it is missing."""

    def __init__(self, repo: str, revision: str, endpoint: str | None) -> None:
        from huggingface_hub import HfApi  # half a second

        for client in ("httpx", "httpx2"):  # which tell every request
            logging.getLogger(client).setLevel(logging.WARNING)
        self._api = HfApi(endpoint=endpoint)
        self.repo, self.revision = repo, revision

    def files(self) -> set[str]:
        """Names of the files that are there; none where there is no such repository or revision.

        Raises UserError where the hub cannot be reached or refuses.
        """
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            found = self._api.list_repo_files(self.repo, revision=self.revision)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return set()
        except Exception as error:
            raise self._refused(error) from error
        return set(found) - MADE_BY_HUB

    def holds(self, name: str, path: Path) -> bool:
        """Whether a small file there has the bytes of this one, by Git's name for them."""
        content = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        try:
            found = self._api.get_paths_info(self.repo, [name], revision=self.revision)
        except Exception as error:
            raise self._refused(error) from error
        return [getattr(one, "blob_id", None) for one in found] == [blob]

    def upload(self, files: Mapping[str, Path], private: bool, message: str) -> str:
        """Add all files in one commit; returns its address. Raises UserError where that fails."""
        from huggingface_hub import CommitOperationAdd

        added = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
        try:
            self._api.create_repo(self.repo, private=private, exist_ok=True)
            if self.revision != "main":
                self._api.create_branch(self.repo, branch=self.revision, exist_ok=True)
            done = self._api.create_commit(
                self.repo, added, commit_message=message, revision=self.revision
            )
        except Exception as error:
            raise self._refused(error) from error
        return str(done.commit_url)

    def _refused(self, error: Exception) -> UserError:
        why = " ".join(str(error).split()) or type(error).__name__
        return UserError(
            f"publish.repo = {self.repo!r} at {self.revision}: the hub answers: {why[:400]} (the "
            "token is that of HF_TOKEN, or of `hf auth login`)"
        )
