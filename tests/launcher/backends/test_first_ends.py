"""Who ended first is told, also where a rank that only follows is seen to have ended before the one that was killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from launcher.backends.first_ends import FirstEnds

LATE = "import os, signal, time; time.sleep(0.7); os.kill(os.getpid(), signal.SIGKILL)"


def test_a_rank_that_was_killed_is_named_though_its_peer_was_quicker_to_end(tmp_path: Path) -> None:
    agent = FirstEnds.__new__(FirstEnds)
    agent.logs, agent.sizes, agent.first = str(tmp_path / "rank-{rank}.log"), {}, {}
    agent.log_of(1).write_text("error: another rank has ended: connection closed by peer\n")
    killed = subprocess.Popen([sys.executable, "-c", LATE])
    follows = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
    try:
        os.waitid(os.P_PID, follows.pid, os.WEXITED | os.WNOWAIT)
        agent.note({0: killed.pid, 1: follows.pid})
        assert agent.first == {0: (killed.pid, -signal.SIGKILL), 1: (follows.pid, 1)}
    finally:
        killed.wait(10)
        follows.wait(10)
