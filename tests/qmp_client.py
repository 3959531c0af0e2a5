"""A small QMP client for the tests' own socket, so that what they see does not go through what they test."""

import json
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


class Refused(Exception):
    """QEMU answered with an error."""


class QmpClient:
    """A connection to QEMU's monitor. Waits up to `limit_s` for the socket to be there, and for each answer."""

    def __init__(self, path: Path, limit_s: float = 30.0) -> None:
        self.events: list[dict[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(limit_s)
        self._lines = self._socket.makefile("rwb")
        deadline = time.monotonic() + limit_s
        while True:
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    self.close()
                    raise
                time.sleep(0.01)
        assert "QMP" in self._answer()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Run a command; `_` in an argument's name stands for `-`. Raises Refused."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._lines.write(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        self._lines.flush()
        while True:
            answer = self._answer()
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise Refused(answer["error"]["desc"])
            else:
                return answer["return"]

    def _answer(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise ConnectionError("QEMU closed the monitor")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def human(self, command: str) -> str:
        """Run a command of the human monitor; return what it prints."""
        printed: str = self("human-monitor-command", command_line=command)
        return printed

    def close(self) -> None:
        """Hang up."""
        with suppress(BrokenPipeError):
            self._lines.close()
        self._socket.close()
