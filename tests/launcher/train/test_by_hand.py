"""torchrun by hand does the same as `vernier train`; TensorBoard serves what both writers wrote."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from conftest import ROOT, TINY, VERNIER, ask, losses, table_of

from eval.compare.along_run import compare_run
from eval.tags import CHANGE, LOSS, PERPLEXITY

pytestmark = pytest.mark.real

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-endpoint", "127.0.0.1:0"]
TORCHRUN += ["--rdzv-backend", "c10d", "--local-addr", "127.0.0.1", "-m"]


@pytest.fixture(scope="module")
def by_hand(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("by-hand") / "run"
    settings = [TINY, f"data.dir={tiny_data}", f"run.dir={run}", "eval.placement=separate"]
    evaluator = subprocess.Popen([*TORCHRUN, "eval", *settings], cwd=ROOT, stderr=subprocess.DEVNULL)
    trainer = subprocess.run([*TORCHRUN, "trainer", *settings], cwd=ROOT, check=False, capture_output=True, text=True)
    assert trainer.returncode == 0, trainer.stderr
    assert re.search(r"step 20/20  loss \d", trainer.stderr)  # a plain line where there is no terminal
    assert evaluator.wait(60) == 0  # it ends by itself, once the run has ended and all is scored
    return run


def test_it_trains_and_scores_the_same(by_hand: Path, tiny_run: Path) -> None:
    assert losses(by_hand) == losses(tiny_run)
    for step in (0, 10, 20):
        assert table_of(by_hand, step).read_bytes() == table_of(tiny_run, step).read_bytes()


def test_one_process_alone_trains_as_well(tiny_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    settings = [TINY, f"data.dir={tiny_data}", f"run.dir={tmp_path / 'run'}", "eval.placement=none", "steps=5"]
    settings += ["schedule.warmup_steps=4"]
    done = subprocess.run([sys.executable, "-m", "trainer", *settings], cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run")[0] == pytest.approx(losses(tiny_run)[0], rel=1e-6)


def test_the_board_serves_both_writers_on_loopback(by_hand: Path) -> None:
    board = subprocess.Popen([*VERNIER, "board", by_hand], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert board.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/", board.stdout.readline())
        assert address
        port = address[0].split(":")[2].rstrip("/")
        assert f"ssh -N -L {port}:127.0.0.1:{port} " in board.stdout.readline() + board.stdout.readline()
        api = address[0] + "data/plugin/scalars/"
        deadline = time.monotonic() + 60
        runs: dict = {}
        while not {"train", "eval", "eval-high95"} <= set(runs) and time.monotonic() < deadline:
            time.sleep(0.5)
            runs = ask(api + "tags") or {}
        assert {LOSS, "4_health/lr", "4_health/grad_norm", "3_speed/tokens_per_s"} <= set(runs["train"])
        assert {LOSS, PERPLEXITY, CHANGE} <= set(runs["eval"])
        assert set(runs["eval-low95"]) == set(runs["eval-high95"]) == {LOSS, CHANGE}  # edges are no charts of their own
        assert "95 % interval" in runs["eval"][CHANGE]["description"]
        wanted = {"allowedStatuses": ["STATUS_SUCCESS"], "sliceSize": 10}
        about = Request(address[0] + "data/plugin/hparams/session_groups", json.dumps(wanted).encode())
        about.add_header("Content-Type", "application/json")
        with urlopen(about, timeout=20) as answer:
            (group,) = json.load(answer)["sessionGroups"]
        assert group["hparams"]["optimizer.lr"] == 5e-3
        (metric,) = group["metricValues"]  # the reference loss, not that of a batch
        assert metric["value"] == pytest.approx(compare_run(by_hand).checkpoints[-1].side.loss, rel=1e-6)
        trained = ask(api + "scalars?run=train&tag=1_loss/nats_per_token")
        assert [step for _, step, _ in trained] == list(range(1, 21))
        assert [value for _, _, value in trained] == pytest.approx(losses(by_hand), rel=1e-6)
        assert [step for _, step, _ in ask(api + "scalars?run=eval&tag=1_loss/nats_per_token")] == [0, 10, 20]
    finally:
        board.send_signal(signal.SIGINT)
        assert board.wait(20) == 0
