"""Settings of task=publish."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from eaft_prune.config.base import Settings


class PublishSettings(Settings):
    """Which run's checkpoint goes to which repository of a hub; the token is HF_TOKEN's."""

    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    """OWNER/NAME on the hub; made if it is not there"""
    run: str
    """directory of the run whose checkpoint was judged; its result, lock and report go along"""
    revision: str = "main"
    """branch of the repository; made if it is not there"""
    private: bool = True
    """of a repository that is made"""
    anyway: bool = False
    """publish what did not PASS; its card says so"""
    dry_run: bool = False
    """say what would be uploaded, and stop"""
    endpoint: str | None = None
    """of a hub of your own, http://HOST:PORT; null: the public one, or HF_ENDPOINT"""
