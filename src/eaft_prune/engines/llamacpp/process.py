"""A worker process that holds a GGUF in llama.cpp: asked for logits, and always ended."""

from __future__ import annotations

import json
import os
import subprocess
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import UserError
from eaft_prune.engines.llamacpp import worker
from eaft_prune.engines.servers.launched import tail


class Worker:
    """One model; requests are answered in turn."""

    def __init__(self, python: str, gguf: Path, threads: int, env: Mapping[str, str], log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        try:
            with log.open("ab") as out:
                self._process = subprocess.Popen(
                    [python, worker.__file__, str(gguf), str(threads)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=out,
                    env={**os.environ, **env},
                    start_new_session=True,  # Ctrl-C is ours to act on; it ends with its stdin
                )
        except OSError as error:
            raise UserError(f"engine.python = {python!r} cannot be run: {error}") from None
        self.stop = weakref.finalize(self, _stop, self._process)
        self.facts = self._line()
        self.vocab = int(self.facts["vocab"])

    def logits(
        self, ids: Sequence[int], want: Sequence[int], keep: int = 0, room: int = 0
    ) -> NDArray[np.float32]:
        """Logits [W, V] at the wanted places of `ids`, ascending, behind `keep` earlier tokens."""
        asked = {"ids": list(ids), "keep": keep, "room": room, "want": list(want)}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        said = self._line()
        if "error" in said:
            raise UserError(f"llama.cpp: {said['error']}; its log: {self._log}")
        assert said["rows"] == len(want), "a row for every wanted place"
        content = self._read(4 * self.vocab * len(want))
        return np.frombuffer(content, np.float32).reshape(len(want), self.vocab)

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._ended()
        found: dict[str, Any] = json.loads(line)
        return found

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        content = self._process.stdout.read(size)
        if len(content) < size:
            raise self._ended()
        return content

    def _ended(self) -> UserError:
        self.stop()
        code, lines = self._process.returncode, "\n".join(tail(self._log))
        return UserError(f"llama.cpp ended with code {code}; its log {self._log}:\n{lines}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError):  # it has ended already
        process.stdin.close()
    process.stdout.close()
    process.wait()
