"""After three kills TensorBoard has every step once, in the folder of either writer, by its own HTTP API."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, VERNIER, ask, losses, vernier, wait_for
from faults.running import the
from test_going_on import at_step, gone_within

STEPS = 150
SETTINGS = [f"steps={STEPS}", "checkpoint.every=10", "snapshot.every=25", "eval.placement=separate"]


def test_no_step_is_shown_twice_and_none_is_missing(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    where = [TINY, *SETTINGS, f"data.dir={tiny_data}", f"run.dir={run}"]

    def kill(after: int, whom: Callable[[], int] | None) -> None:
        training = subprocess.Popen([*VERNIER, "train", *where], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        wait_for(at_step(run, after))
        os.kill(training.pid if whom is None else whom(), signal.SIGKILL)
        training.communicate(timeout=60)
        gone_within(run, 10)

    kill(35, None)
    kill(65, lambda: the(run, "agent", "trainer"))
    kill(100, None)
    vernier("train", *where)

    board = subprocess.Popen([*VERNIER, "board", run], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert board.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/", board.stdout.readline())
        assert address
        api = address[0] + "data/plugin/scalars/"
        deadline = time.monotonic() + 60
        runs: dict = {}
        while not {"train", "eval"} <= set(runs) and time.monotonic() < deadline:
            time.sleep(0.5)
            runs = ask(api + "tags") or {}
        trained: list = []
        while len(trained) < STEPS and time.monotonic() < deadline:  # it reads one file after another
            time.sleep(0.5)
            trained = ask(api + "scalars?run=train&tag=1_loss/nats_per_token")
        assert [step for _, step, _ in trained] == list(range(1, STEPS + 1))
        assert [value for _, _, value in trained] == pytest.approx(losses(run), rel=1e-6)
        scored = ask(api + "scalars?run=eval&tag=1_loss/nats_per_token")
        assert [step for _, step, _ in scored] == list(range(0, STEPS + 1, 25))
    finally:
        board.send_signal(signal.SIGINT)
        assert board.wait(20) == 0
