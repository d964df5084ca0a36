"""A cable with a length and a width: carries Ethernet frames between two TAP devices, late and no faster than its rate.

    python cable.py TAP_A TAP_B DELAY_SECONDS BITS_PER_SECOND

Runs inside the network namespace that holds the devices. Each direction has its own wire and a queue of 100 ms; frames
that find it full are dropped, as a switch would.
"""

from __future__ import annotations

import fcntl
import math
import os
import select
import struct
import sys
import time
from collections import deque

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_QUEUE_S = 0.1
_OVERHEAD = 24  # bytes of preamble, checksum and gap that a frame also takes on a wire


class Wire:
    """One direction. Times are monotonic seconds."""

    def __init__(self, delay: float, rate: float) -> None:
        self.delay, self.rate = delay, rate
        self._free_at = 0.0
        self._frames: deque[tuple[float, bytes]] = deque()

    def put(self, frame: bytes, now: float) -> None:
        start = max(now, self._free_at)
        if start - now > _QUEUE_S:
            return
        self._free_at = start + (len(frame) + _OVERHEAD) * 8 / self.rate
        self._frames.append((self._free_at + self.delay, frame))

    def due(self, now: float) -> bytes | None:
        return self._frames.popleft()[1] if self._frames and self._frames[0][0] <= now else None

    def next_at(self) -> float:
        return self._frames[0][0] if self._frames else math.inf


def open_tap(name: str) -> int:
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return handle


def main() -> None:
    ends = [open_tap(name) for name in sys.argv[1:3]]
    delay, rate = float(sys.argv[3]), float(sys.argv[4])
    wires = {ends[0]: (Wire(delay, rate), ends[1]), ends[1]: (Wire(delay, rate), ends[0])}
    print("ready", flush=True)
    while True:
        wait = min(wire.next_at() for wire, _ in wires.values()) - time.monotonic()
        readable, _, _ = select.select(ends, [], [], min(max(wait, 0.0), 1.0))
        now = time.monotonic()
        for end in readable:
            _take_all(end, wires[end][0], now)
        for wire, other in wires.values():
            while (frame := wire.due(now)) is not None:
                os.write(other, frame)


def _take_all(end: int, wire: Wire, now: float) -> None:
    for _ in range(64):
        try:
            wire.put(os.read(end, 65536), now)
        except BlockingIOError:
            return


if __name__ == "__main__":
    main()
