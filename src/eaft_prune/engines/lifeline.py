"""A wire from rank 0 to every other rank, on which nothing is said until the end.

The kernel closes the wires of a process that dies, whatever kills it, and its keepalives find a
host that is gone: both sides hear of it beside the collectives, which would notice at the next one.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch.distributed as dist

from eaft_prune.engines.world import RankLost

_BYE, _LOST = b"b", b"l"  # from rank 0: all is done; another rank is gone
_MEETING = 300.0  # seconds to connect in, all ranks having met already
_HEARD = 10.0  # seconds after a broken collective in which its rank is named
_STUCK = 60.0  # seconds that a collective with a host that is gone may hang before we end it
# a host that does not answer is gone after 10 + 3 x 10 s
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))


class Lifeline:
    """Rank 0's ends of the wires; the first rank that is lost is named on stderr at once."""

    def __init__(self) -> None:
        self._lost: str | None = None
        self._heard = threading.Event()
        self._closing = self._guarded = False
        self._left = threading.Event()
        self._wires = _accept(dist.get_world_size())
        # in the middle of the work the main thread is told by a signal, which Python hands to it
        signal.signal(signal.SIGUSR1, self._on_signal)
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def intact(self) -> bool:
        return self._lost is None

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Work that needs all ranks; raises RankLost as soon as one is gone."""
        self._left.clear()
        self._guarded = True
        try:
            self._check()
            yield
        except RuntimeError:
            self._guarded = False
            self._heard.wait(_HEARD)  # gloo names an address, and may be told before we are
            self._check()
            raise
        finally:
            self._guarded = False
            self._left.set()

    def close(self) -> None:
        """Tell the other ranks that all is done, or that they are no longer needed."""
        self._closing = True
        for wire in self._wires.values():
            try:
                wire.sendall(_BYE if self.intact else _LOST)
                wire.close()
            except OSError:  # the one that is gone
                continue

    def _check(self) -> None:
        if self._lost is not None:
            raise RankLost(self._lost)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._guarded:
            self._guarded = False
            self._check()

    def _watch(self) -> None:
        ranks = selectors.DefaultSelector()
        for rank, wire in self._wires.items():
            ranks.register(wire, selectors.EVENT_READ, rank)
        rank = ranks.select()[0][0].data
        if self._closing:
            return
        self._lost = f"rank {rank} of {dist.get_world_size()} is gone: its process or host ended"
        print(f"error: {self._lost}", file=sys.stderr, flush=True)
        self._heard.set()
        if not self._guarded:
            return
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        if not self._left.wait(_STUCK):
            os._exit(1)  # in a collective that nothing ends; the next start closes the run


def hold() -> None:
    """A helper's end: its process ends when rank 0's does, or when rank 0 says so."""
    port = _told_port(None)
    wire = socket.create_connection((os.environ["MASTER_ADDR"], port), _MEETING)
    wire.settimeout(None)
    _keep_alive(wire)
    wire.sendall(dist.get_rank().to_bytes(4, "big"))

    def watch() -> None:
        try:
            said = wire.recv(1)
        except OSError:
            said = b""
        if said == _BYE:
            return
        if said != _LOST:
            what = f"rank 0 is gone: its process or host ended, rank {dist.get_rank()} ends too"
            print(f"error: {what}", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _accept(world: int) -> dict[int, socket.socket]:
    """The wires of all other ranks, which say who they are."""
    wires = {}
    with socket.create_server(("", 0), backlog=world) as server:
        server.settimeout(_MEETING)
        _told_port(server.getsockname()[1])
        for _ in range(world - 1):
            wire, _ = server.accept()
            wire.settimeout(_MEETING)
            rank = int.from_bytes(wire.recv(4, socket.MSG_WAITALL), "big")
            wire.settimeout(None)
            _keep_alive(wire)
            wires[rank] = wire
    return wires


def _told_port(port: int | None) -> int:
    told = [port]
    dist.broadcast_object_list(told, src=0)
    assert told[0] is not None
    return told[0]


def _keep_alive(wire: socket.socket) -> None:
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):  # not everywhere
            wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
