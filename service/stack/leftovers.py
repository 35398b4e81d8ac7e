"""No process is left behind, whatever ended `fastslow up`.

Each process of a stack carries a mark in its environment, which its own children inherit even where they leave its process group. A
watcher process reads a pipe that only `fastslow up` holds open: when the pipe ends, `fastslow up` has ended, by SIGKILL too, and the
watcher stops all that still carries the mark. The next start does the same before it begins.

python -m service.stack.leftovers MARK
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import psutil

MARK = "FASTSLOW_STACK_MARK"

# vLLM frees its shared memory and Redis closes its append-only file in this time.
TERM_SECONDS = 10.0
KILL_SECONDS = 5.0


def marked(mark: str) -> list[psutil.Process]:
    """The running processes that carry a mark, without this one and those that it descends from."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        # Other people's processes can't be read, and some end meanwhile.
        with suppress(psutil.Error, OSError):
            if process.pid not in own and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def sweep(mark: str, *, term_seconds: float = TERM_SECONDS) -> int:
    """Stop every process that carries a mark, and return how many there were."""
    found = marked(mark)
    for process in found:
        with suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(found, timeout=term_seconds)
    # Looked for again, because a process may have started another one meanwhile.
    stubborn = marked(mark)
    for process in stubborn:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(stubborn, timeout=KILL_SECONDS)
    return len(found)


class Watcher:
    """The watcher process, as `fastslow up` holds it."""

    def __init__(self, mark: str) -> None:
        # Without the mark itself, and in a session of its own, where Ctrl-C does not reach it.
        command = [sys.executable, "-m", __name__, mark]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def close(self) -> None:
        """Let it stop what is left, and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    sweep(sys.argv[1])


if __name__ == "__main__":
    main()
