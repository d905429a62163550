"""JSON over HTTP to a server that may be slow or die: retries, then a clear error."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from eaft_prune.core.foreign import json_in
from eaft_prune.core.types import UserError

Json = Mapping[str, Any]
_SHOWN = 300  # characters of a server's own message
_MOST = 16 << 20  # bytes of an answer of which nothing else is known


class _Retry(Exception):
    """What another try may cure."""


@dataclass(frozen=True, eq=False)
class HttpClient:
    """One server; safe to use from several threads.

    `timeout_s` are those of a whole request, however slowly its bytes come.

    A request is tried again after connection errors, timeouts, cut answers, status 429 and 5xx,
    `retries` times, after backoff_s, 2 backoff_s, 4 backoff_s ... Raises UserError after the last,
    at once where the server refuses the request (4xx), and where `alive` says that the server is
    no more (it returns why).
    """

    base_url: str
    timeout_s: float = 600.0
    retries: int = 4
    backoff_s: float = 1.0
    alive: Callable[[], str | None] = lambda: None  # None: for all we know
    _open: set[socket.socket] = field(default_factory=set)
    _aborted: threading.Event = field(default_factory=threading.Event)

    def get(self, path: str) -> Any:
        """The JSON that GET answers with."""
        return self._tried("GET", path, None)

    def post(self, path: str, body: Json, most: int = _MOST) -> Any:
        """The JSON that POST answers with, in `most` bytes; it must be safe to repeat."""
        return self._tried("POST", path, body, most)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block left by an exception ends the requests of all threads, with UserError."""
        self._aborted.clear()
        try:
            yield
        except BaseException:
            self._aborted.set()
            for sock in list(self._open):
                _shut(sock)
            raise

    @contextmanager
    def answer(
        self, method: str, path: str, body: Json | None
    ) -> Iterator[http.client.HTTPResponse]:
        """One try, the answer's body still to be read; raises OSError and HTTPException.

        TimeoutError once timeout_s are over: then the socket is shut, whoever waits at it.
        """
        parts = urlsplit(self.base_url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout_s)
        sockets: list[socket.socket] = []
        over = threading.Event()

        def end() -> None:
            over.set()
            for sock in sockets:
                _shut(sock)

        # a socket's own timeout begins anew at every byte
        watch = threading.Timer(self.timeout_s, end)
        watch.daemon = True
        watch.start()
        try:
            connection.connect()
            sockets.append(connection.sock)
            self._open.add(connection.sock)
            text = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request(method, parts.path.rstrip("/") + path, text, headers)
            if self._aborted.is_set():  # before the socket was there to be shut down
                raise ConnectionAbortedError("given up")
            with connection.getresponse() as response:
                yield response
            if over.is_set():  # an answer without a length ends where its socket is shut
                raise TimeoutError
        except (OSError, http.client.HTTPException) as error:
            if over.is_set():
                raise TimeoutError(f"no whole answer within {self.timeout_s:g} s") from error
            raise
        finally:
            watch.cancel()
            self._open.difference_update(sockets)
            connection.close()

    @property
    def _times(self) -> str:
        return f"{self.retries + 1} times" if self.retries else "asked once"

    def _tried(self, method: str, path: str, body: Json | None, most: int = _MOST) -> Any:
        for attempt in range(self.retries + 1):
            if self._aborted.is_set():
                break
            try:
                return self._once(method, path, body, most)
            except _Retry as error:
                reason = str(error)
            if dead := self.alive():
                raise UserError(f"{self.base_url}{path}: {reason}; {dead}")
            if attempt < self.retries:
                self._aborted.wait(self.backoff_s * 2**attempt)
        else:
            raise UserError(
                f"{self.base_url}{path}: {reason}, {self._times}: is the server up, and "
                "engine.timeout_s long enough?"
            )
        raise UserError(f"{self.base_url}{path}: given up, as another request failed")

    def _once(self, method: str, path: str, body: Json | None, most: int) -> Any:
        try:
            with self.answer(method, path, body) as response:
                content = response.read(most + 1)
                status, missing = response.status, response.length
        except TimeoutError:
            raise _Retry(f"no answer within {self.timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Retry(f"{type(error).__name__}: {error}") from None
        if len(content) > most:
            raise UserError(f"{self.base_url}{path}: an answer of more than {most:,} bytes")
        if missing:
            raise _Retry(f"IncompleteRead: {missing:,} bytes of the answer are missing")
        if status == 429 or status >= 500:
            raise _Retry(f"status {status}: {_text(content)}")
        if status != 200:
            raise UserError(f"{self.base_url}{path}: status {status}: {_text(content)}")
        try:
            return json_in(content, "an answer that is not JSON")
        except UserError:
            raise _Retry(f"an answer that is not JSON: {_text(content)}") from None


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):  # closed by its own thread meanwhile
        sock.shutdown(socket.SHUT_RDWR)


def _text(content: bytes) -> str:
    return " ".join(content.decode("utf-8", "replace").split())[:_SHOWN] or "(empty)"
