"""Several processes of one training, on the CPU, as torchrun would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(arguments, world, log):
    """Start `python ARGUMENTS` so many times, each with its rank; what they say goes to log-<rank>."""
    port, processes = free_port(), []
    for rank in range(world):
        given = {
            **os.environ,
            "TORCHELASTIC_RUN_ID": "test",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": str(ROOT),
        }
        with (log.parent / f"{log.name}-{rank}").open("w") as file:
            command = [sys.executable, *map(str, arguments)]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=given, stdout=file, stderr=subprocess.STDOUT))
    return processes


def said(log, rank=0):
    """What one of them has said."""
    return (log.parent / f"{log.name}-{rank}").read_text()


def together(arguments, world, log, seconds=240):
    """Run to the end. What each said is in the error where one fails."""
    processes = start(arguments, world, log)
    try:
        codes = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * world, "\n".join(said(log, rank) for rank in range(world))
