"""The host's own tests/execution, with the pack in its servers: what passes without the pack passes with it.

The whole suite is run, with timing checks off: 185 tests and seven servers in ComfyUI 0.3.64. If something fails, it is
run once more without the pack, and only what the pack makes of a test is held against it.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("comfy.samplers", reason="no ComfyUI found: its own tests are not run")
pytest.importorskip("websocket", reason="websocket-client is not installed, which ComfyUI's own tests need")

from conftest import HOST, REPOSITORY

SUITE = HOST / "tests" / "execution"
MINUTES = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SUITE.is_dir(), reason=f"{HOST} has no tests/execution: its own tests are not run"),
    pytest.mark.skipif(os.name == "nt", reason="a shell script stands for the python that ComfyUI's own tests start"),
]


class Run:
    """One run of the suite. `outcomes`: passed, skipped, failure or error by test; `log`: the servers' and pytest's.

    Its servers have a base folder of their own, as in `live`, so that nothing of the user's installation is read or
    written. The suite starts them as `python main.py ...`: a script of that name says so to them.
    """

    def __init__(self, base: Path, with_pack: bool):
        for folder in ("bin", "custom_nodes", "models", "input", "temp", "user"):
            (base / folder).mkdir(parents=True)
        self.installed = base / "custom_nodes" / "profusion"
        if with_pack:
            self.installed.symlink_to(REPOSITORY)
        python = base / "bin" / "python"
        options = f"--base-directory '{base}' --database-url sqlite:///:memory:"
        python.write_text(f"#!/bin/sh\nexec '{sys.executable}' \"$@\" {options}\n")
        python.chmod(0o755)
        results = base / "results.xml"
        self.log = self._run(base, results)
        assert results.is_file(), f"the suite did not run; the end of its log:\n{self.log[-3000:]}"
        self.outcomes = {}
        for test in ElementTree.parse(results).iter("testcase"):
            kinds = {child.tag for child in test} & {"skipped", "failure", "error"}
            self.outcomes[f"{test.get('classname')}::{test.get('name')}"] = "+".join(sorted(kinds)) or "passed"

    @staticmethod
    def _run(base: Path, results: Path) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "tests/execution",
            "-p",
            "no:cacheprovider",
            "-p",
            "patient",
            "--port",
            str(port),
            "--output_dir",
            str(base / "output"),
            "--skip-timing-checks",
            "--junitxml",
            str(results),
        ]
        environment = {
            **os.environ,
            "PATH": f"{base / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
        }
        log = base / "suite.log"
        with log.open("w") as output:
            # A session of its own, with which the servers that an aborted suite leaves behind are stopped.
            process = subprocess.Popen(
                command, cwd=HOST, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                process.wait(MINUTES * 60)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        return log.read_text(errors="replace")


def test_the_hosts_own_tests_are_the_same_with_the_pack_as_without(tmp_path):
    with_pack = Run(tmp_path / "with", True)
    loaded = [line for line in with_pack.log.splitlines() if line.endswith(str(with_pack.installed))]
    assert loaded and not any("IMPORT FAILED" in line for line in loaded), loaded
    assert "passed" in with_pack.outcomes.values(), with_pack.outcomes
    if not set(with_pack.outcomes.values()) <= {"passed", "skipped"}:
        without = Run(tmp_path / "without", False)
        different = {
            test: f"{without.outcomes.get(test)} without the pack, {with_pack.outcomes.get(test)} with it"
            for test in with_pack.outcomes | without.outcomes
            if without.outcomes.get(test) != with_pack.outcomes.get(test)
        }
        assert not different, f"{different}\n{with_pack.log[-3000:]}"
