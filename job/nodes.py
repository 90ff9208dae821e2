"""Several machines that train one run together, as the scheduler tells each of them.

Source of the names: AWS Batch User Guide, "Multi-node parallel jobs" and "Job environment
variables".
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import dataclass

from job.errors import ConfigError

COUNT = "AWS_BATCH_JOB_NUM_NODES"
INDEX = "AWS_BATCH_JOB_NODE_INDEX"
MAIN_INDEX = "AWS_BATCH_JOB_MAIN_NODE_INDEX"
MAIN_ADDRESS = "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS"
"""Not set on the main node itself."""
PORT_VARIABLE = "S4GAN_NODES_PORT"
PORT = 29_400
"""Of the main node, where the others find it; torchrun's own."""
_SIOCGIFADDR = 0x8915
"""Source: netdevice(7)."""


@dataclass(frozen=True)
class Node:
    """This machine's place among those of the job; the default is to be alone."""

    count: int = 1
    position: int = 0
    """The main one is 0, whatever the scheduler's number is."""
    main_address: str = ""
    port: int = PORT

    @classmethod
    def here(cls) -> Node:
        """As the environment says.

        Raises:
            ConfigError: it contradicts itself.
        """
        count = _number(COUNT, 1)
        if count == 1:
            return cls()
        index, main = _number(INDEX, 0), _number(MAIN_INDEX, 0)
        position = 0 if index == main else index + 1 if index < main else index
        address = os.environ.get(MAIN_ADDRESS, "")
        if not position < count or (position > 0 and not address):
            raise ConfigError(
                f"{INDEX}={index} of {COUNT}={count}, {MAIN_ADDRESS}={address}: not a place among "
                "several machines",
                mend="these variables are AWS Batch's; unset them elsewhere",
            )
        return cls(count, position, address, _number(PORT_VARIABLE, PORT))

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.count == 1

    @property
    def is_main(self) -> bool:
        """Whether the run's first process is here: it alone saves and reports."""
        return self.position == 0

    def interface(self) -> str:
        """Name of the network interface towards the others; empty if it cannot be told."""
        # Nothing is sent; the route decides. An address of documentation (RFC 5737) is as good as
        # any for the main node, which is told nobody's.
        target = self.main_address or "198.51.100.1"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, self.port))
                own = probe.getsockname()[0]
            except OSError:
                return ""
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                except OSError:  # it has no IPv4 address
                    continue
                if socket.inet_ntoa(reply[20:24]) == own:
                    return name
        return ""


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise ConfigError(f"{name}={text}: must be a number")
    return int(text) if text else default
