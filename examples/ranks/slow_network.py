"""A slow network on one machine: each process in a network namespace, and a router of ours between them.

Packets are real and so is TCP; the router gives every namespace a link of its own with a rate, a delay and a loss. It needs
Linux, root and iproute2, and no queueing discipline of the kernel, which many containers lack.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

_NEW_NETWORK, _SET_INTERFACE, _TUN, _NO_HEADER = 0x40000000, 0x400454CA, 0x0001, 0x1000
INTERFACE = "zo0"


def address(place: int) -> str:
    """Of a process on the network."""
    return f"10.77.0.{place + 1}"


class SlowNetwork:
    """Links to one switch.

    Args:
        size: number of processes, at most 250.
        delay: seconds from one process to another, > 0.
        rate: bits a second of each link, in each direction; 0: any.
        loss: share of packets that get lost, from 0 to 1.
    """

    def __init__(self, size: int, delay: float, rate: float = 0.0, loss: float = 0.0) -> None:
        self.size, self.delay, self.rate, self.loss = size, delay, rate, loss
        self._devices: list[int] = []
        self._up, self._down = [0.0] * size, [0.0] * size  # when each link is free again
        self.bytes = 0
        """That went through, headers included."""

    def start(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> list[subprocess.Popen[bytes]]:
        """The processes, each in a namespace of its own; packets go from now on."""
        started = []
        for place, environ in enumerate(environments):
            ours, theirs = socket.socketpair()
            entry = [sys.executable, __file__, str(place), str(theirs.fileno()), *command]
            started.append(
                subprocess.Popen(entry, env={**environ, "GLOO_SOCKET_IFNAME": INTERFACE}, pass_fds=[theirs.fileno()])
            )
            theirs.close()
            self._devices += socket.recv_fds(ours, 1, 1)[1]
            ours.close()
        if len(self._devices) < self.size:
            raise SystemExit("no network namespaces here: they need Linux, root, /dev/net/tun and iproute2")
        threading.Thread(target=self._route, daemon=True).start()
        return started

    def _route(self) -> None:
        """Packets arrive in the order of their times."""
        places = {device: place for place, device in enumerate(self._devices)}
        under_way: list[tuple[float, int, int, bytes]] = []
        number = 0
        while True:
            wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
            for device in select.select(self._devices, [], [], wait)[0]:
                packet = os.read(device, 65536)
                to = packet[19] - 1 if packet[0] >> 4 == 4 else -1
                if 0 <= to < self.size and random.random() >= self.loss:
                    number += 1
                    heapq.heappush(under_way, (self._arrival(places[device], to, len(packet)), number, to, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, to, packet = heapq.heappop(under_way)
                try:
                    os.write(self._devices[to], packet)
                except OSError:  # that process has ended
                    continue

    def _arrival(self, sender: int, to: int, size: int) -> float:
        self.bytes += size
        takes = 8 * size / self.rate if self.rate else 0.0
        self._up[sender] = max(time.monotonic(), self._up[sender]) + takes
        self._down[to] = max(self._up[sender] + self.delay, self._down[to] + takes)
        return self._down[to]


def enter(place: int, given: int) -> None:
    """Put this process into a new namespace, and give its network device away."""
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "unshare")
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _SET_INTERFACE, struct.pack("16sH22x", INTERFACE.encode(), _TUN | _NO_HEADER))
    for words in (f"addr add {address(place)}/24 dev {INTERFACE}", f"link set {INTERFACE} up", "link set lo up"):
        subprocess.run(["ip", *words.split()], check=True)
    with socket.socket(fileno=given) as to:
        socket.send_fds(to, [b"0"], [device])
    os.close(device)


if __name__ == "__main__":
    enter(int(sys.argv[1]), int(sys.argv[2]))
    os.execv(sys.argv[3], sys.argv[3:])
