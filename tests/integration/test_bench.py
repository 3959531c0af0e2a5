"""The benchmark of reads: it runs, all who are compared show the same bytes, and its qcow2 overlays are right ones."""

import json
import random
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from images import TOOLS

from backupfs.units import KiB, MiB

_BENCH = Path(__file__).parent.parent.parent / "tools" / "bench"
