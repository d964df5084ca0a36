"""Carries the ranks' heartbeats over the network, where their machines share no run folder.

Rank 0 listens; every other rank sends its beat and gets the table of all beats back, as lines of JSON. Nothing here
waits for longer than its time limit, and a lost connection is tried again with the next beat.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import threading
from typing import Any

from tbf.checkpoints import ranks

Beat = dict[str, Any]
_LONGEST_LINE = 1 << 20


class HeartbeatLink:
    """One end of the star, made by `connect`. `exchange` is called by one thread only."""

    def __init__(self, rank: int, address: tuple[str, int] | None, key: str, listener: socket.socket | None) -> None:
        self.rank, self._address, self._key = rank, address, key
        self.connected = rank == 0
        """Whether the last exchange with rank 0 succeeded."""
        self._table: dict[int, Beat] = {}
        self._listener, self._stream = listener, None
        if listener is not None:
            threading.Thread(target=self._accept, args=(listener,), name="tbf-heartbeats", daemon=True).start()

    def exchange(self, beat: Beat, limit: float) -> dict[int, Beat]:
        """Gives this rank's beat to the others and returns what is known of all; old news when rank 0 is away.

        `limit`: seconds that each network call may take.
        """
        if self.rank == 0:
            self._table[0] = beat
            return dict(self._table)
        try:
            if self._stream is None:
                connection = socket.create_connection(self._address, timeout=limit)
                self._stream = connection.makefile("rwb")
            line = json.dumps({"key": self._key, "beat": beat}) + "\n"
            self._stream.write(line.encode())
            self._stream.flush()
            answer = json.loads(self._stream.readline(_LONGEST_LINE))
            self._table = {int(rank): found for rank, found in answer.items()}
            self.connected = True
        except (OSError, ValueError, AttributeError):
            self.connected = False
            self._drop()
        return self._table

    def close(self) -> None:
        self._drop()
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            self._listener.close()

    def _drop(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), name="tbf-heartbeat", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(600)
        with connection, connection.makefile("rwb") as stream, contextlib.suppress(OSError, ValueError, KeyError):
            while line := stream.readline(_LONGEST_LINE):
                message = json.loads(line)
                if not hmac.compare_digest(str(message["key"]), self._key):
                    return
                self._table[int(message["beat"]["rank"])] = message["beat"]
                stream.write((json.dumps(dict(self._table)) + "\n").encode())
                stream.flush()


def connect(rank: int, master: str) -> HeartbeatLink:
    """Opens the link on every rank. Collective. `master`: the name under which rank 0's machine is known."""
    listener, where = None, None
    if rank == 0:
        listener = socket.create_server(("", 0))
        where = (master, listener.getsockname()[1], secrets.token_hex(16))
    host, port, key = ranks.from_rank_0(where)
    return HeartbeatLink(rank, (host, port), key, listener)
