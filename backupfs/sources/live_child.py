"""The process that reads one live export for a mount: `python -m backupfs.sources.live_child`, see live_image.py.

A process of its own because libnbd 1.14 can abort on a connection that is cut. One connection to the export is all it
ever makes; when that is lost it says why and ends. It has no deadlines: its parent has, and kills it.

Descriptor 3 is a SOCK_SEQPACKET socket to the parent, the control line. The parent begins with one message, ORDER,
with descriptors: shared memory, then a line (SOCK_SEQPACKET too) for each slot of that memory. This process answers
GREETING or FAREWELL there, and later a FAREWELL. On a slot's line, one at a time: ASK and ANSWER; the bytes are in the slot.

    ORDER     JSON {"uri", "name", "timeout_s", "slot"}; slot: bytes of memory each has
    GREETING  JSON {"size", "allocated", "holes"}; holes: whether STATUS can be asked
    FAREWELL  JSON {"error", "message"}; error: the name of the exception's class
    ASK       operation, length, offset
    ANSWER    errno or 0, number. READ: how far into the slot the bytes asked for begin. STATUS: how many pairs of
              32-bit numbers are in the slot: length, 1 if it reads as zeroes. They may end before the range does
"""

import json
import mmap
import os
import select
import socket
import struct
import time
from collections import deque
from contextlib import suppress

from backupfs.errors import ProtocolError, SourceError
from backupfs.extents import coalesce
from backupfs.sources.nbd import Request, Wire, _events, nbd
from backupfs.sources.source import ZERO, align, parse_descriptors, split
from backupfs.units import GiB, KiB

READ, STATUS = 1, 2
ASK, ANSWER, PAIR = struct.Struct("=BIQ"), struct.Struct("=II"), struct.Struct("=II")
LARGEST_UNIT = 64 * KiB  # Source: NBD proto.md, minimum block size

_CONTROL = 3
_ALLOCATION = "base:allocation"
_PART = 256 * KiB  # of a read, asked for at a time: what is small stays in the processor's caches. As nbdcopy
_LOOK_S = 0.5  # how long it may take to find out how much of the disk is not holes
