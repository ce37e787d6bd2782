"""Commands that write shards out. Not in the Registry's archive, whose rules let no code start programs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from typing import BinaryIO

_SAID = 300  # bytes of a command's last words


class Command:
    """A shell's command, whose output is read from `output`; its errors are kept for messages."""

    def __init__(self, text: str):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            text,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # an interrupt of the training is not the command's
        )

    @property
    def output(self) -> BinaryIO:
        return self._process.stdout

    def ended(self) -> int | None:
        """The exit code; None where it has more to write."""
        return None if self.output.read(1) else self._process.wait()

    def said(self) -> str:
        """The end of what it wrote as errors."""
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _SAID))
        return " ".join(self._errors.read().decode(errors="replace").split())

    def close(self) -> None:
        """End it, and what it started, where it has not ended."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                if hasattr(os, "killpg"):
                    os.killpg(self._process.pid, signal.SIGKILL)
                else:
                    self._process.kill()
            self._process.wait()
        self.output.close()
        self._errors.close()
