"""How ranks are started makes no difference: forked or exec'd they do, say and leave behind the same."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, VERNIER, lines, table_of, vernier, wait_for
from faults.running import processes, the
from test_going_on import at_step, gone_within

STARTS = ("fork", "exec")
TIMES = re.compile(r"[\d,.]+ tokens/s|\d+:\d\d left|\d{4}-\d\d-\d\d|:\d{5}\b|\bpid \d+|\d+\.\d+ s\b")


def train(run: Path, data: Path, start: str, *settings: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return vernier("train", TINY, f"data.dir={data}", f"run.dir={run}", f"launch.start={start}", *settings, code=code)


def said(text: str, run: Path) -> list[str]:
    """What was said, without what is of this run or this moment."""
    return TIMES.sub("…", text.replace(str(run), "RUN").replace(run.name, "RUN")).splitlines()


@pytest.fixture(scope="module")
def both(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """For each start (run, what `vernier` said)."""
    folder = tmp_path_factory.mktemp("both")
    settings = ("eval.placement=separate", "eval.nproc=2", "model.attention_dropout=0.1")
    return {start: (folder / start, train(folder / start, tiny_data, start, *settings).stdout) for start in STARTS}


def test_both_make_the_same_losses_tables_and_weights(both: dict[str, tuple[Path, str]]) -> None:
    forked, execd = (both[start][0] for start in STARTS)
    told = ("step", "position", "tokens", "loss", "lr", "grad_norm", "windows", "ranks", "micro")
    a, b = ([[line[key] for key in told] for line in lines(run / "metrics.jsonl")] for run in (forked, execd))
    assert a == b
    assert len(a) == 20
    for step in (0, 10, 20):
        assert table_of(forked, step).read_bytes() == table_of(execd, step).read_bytes()
        weights = [
            json.loads((run / f"snapshots/step-{step:08d}/manifest.json").read_text()) for run in (forked, execd)
        ]
        assert weights[0]["files"] == weights[1]["files"]


def test_both_leave_the_same_files_state_events_and_words(both: dict[str, tuple[Path, str]]) -> None:
    forked, execd = (both[start][0] for start in STARTS)

    def files(run: Path) -> set[str]:
        return {str(path.relative_to(run)) for path in run.rglob("*") if "events.out" not in path.name}

    def state(run: Path) -> dict:
        found = json.loads((run / "state.json").read_text())
        return {key: value for key, value in found.items() if key not in ("heartbeat", "updated", "pid", "time")}

    assert files(forked) == files(execd)
    assert {"logs/torchrun.log", "logs/rank-1.log", "logs/eval-rank-1.log"} <= files(forked)
    assert state(forked).keys() == state(execd).keys()
    same = ("state", "step", "steps", "exit_code", "failure", "attempt", "again")
    assert [state(forked)[key] for key in same] == [state(execd)[key] for key in same]
    # The evaluator comes when it comes.
    kinds = [
        sorted((event["kind"], event["step"] or 0) for event in lines(run / "events.jsonl")) for run in (forked, execd)
    ]
    assert kinds[0] == kinds[1]
    assert said(both["fork"][1], forked) == said(both["exec"][1], execd)
    for log in ("rank-0.log", "rank-1.log"):
        assert said((forked / "logs" / log).read_text(), forked) == said((execd / "logs" / log).read_text(), execd)


@pytest.mark.real
@pytest.mark.parametrize("start", ["fork", pytest.param("exec", marks=pytest.mark.long)])
def test_signals_and_deaths_come_to_the_same(start: str, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [f"data.dir={tiny_data}", f"run.dir={run}", f"launch.start={start}", "eval.placement=separate"]
    settings += ["steps=100000", "checkpoint.every=20", "snapshot.every=100000"]

    def ends(whom: str, module: str, sig: signal.Signals) -> tuple[int, str]:
        made = len(lines(run / "metrics.jsonl")) if (run / "metrics.jsonl").is_file() else 0
        command = [*VERNIER, "train", TINY, *settings]
        training = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for(at_step(run, made + 21))
        wait_for(lambda: bool(processes(run, "rank", "eval")))
        if whom == "vernier":
            os.kill(training.pid, sig)
        else:
            os.kill(the(run, whom, module, 1 if whom == "rank" else None), sig)
        text, _ = training.communicate(timeout=60)
        gone_within(run, 10)
        return training.returncode, text

    code, text = ends("vernier", "", signal.SIGINT)
    assert code == 130, text
    assert "with a checkpoint; the same command goes on" in text
    assert ends("agent", "trainer", signal.SIGUSR1)[0] == 75
    code, text = ends("rank", "trainer", signal.SIGKILL)
    assert code == 1, text
    assert "ended without a word" in text or "another rank" in text, text
    assert ends("agent", "trainer", signal.SIGKILL)[0] == 1
    assert ends("vernier", "", signal.SIGKILL)[0] == -9


def test_a_rank_that_refuses_ends_all_with_its_words(tiny_data: Path, tmp_path: Path) -> None:
    # Two ranks by the file, which the number of cores does not decide: what only ranks find out comes from them.
    found = {}
    for start in STARTS:
        run = tmp_path / start
        settings = ("optimizer.lr=1e30", "clip_grad_norm=null", "guards.non_finite=101", "eval.placement=none")
        done = train(run, tiny_data, start, *settings, "steps=400", code=1)
        state = json.loads((run / "state.json").read_text())
        words = [re.sub(r"rank(.)[01]", r"rank\1N", line) for line in said(done.stderr, run)[-2:]]  # whoever is first
        found[start] = (words, state["exit_code"], state["failure"]["error"])
    assert found["fork"] == found["exec"]
    assert "no update could be made with 100 batches in a row" in found["fork"][0][0]


def test_ranks_of_one_machine_listen_on_loopback_alone(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [f"data.dir={tiny_data}", f"run.dir={run}", "steps=100000", "eval.placement=separate"]
    command = [*VERNIER, "train", TINY, *settings]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as training:
        try:
            wait_for(at_step(run, 3))
            wait_for(lambda: bool(processes(run, "rank", "eval")))
            heard = {address for pid in processes(run) for address in listening(pid)}
        finally:
            training.terminate()
    assert heard == {"127.0.0.1"}


def listening(pid: int) -> set[str]:
    """The addresses that a process listens on."""
    sockets, found = set(), set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(fd))
        except OSError:
            continue
    for table, length in (("tcp", 4), ("tcp6", 16)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                packed = bytes.fromhex(words[1].partition(":")[0])
                family = socket.AF_INET if length == 4 else socket.AF_INET6
                found.add(socket.inet_ntop(family, packed[::-1] if length == 4 else packed))
    return found


def test_what_is_forked_has_initialised_nothing_and_imports_nothing_heavy_again(tmp_path: Path) -> None:
    code = """if True:
        import os, sys, threading
        import torch
        def touched(*_): raise SystemExit("CUDA was initialised")
        torch.cuda._lazy_init = torch._C._cuda_init = touched
        from launcher.backends.agent import import_once, why_not_fork
        import_once("trainer", ("llama",))
        import_once("eval", ("llama",))
        print([why_not_fork(), threading.active_count(), torch.cuda.is_initialized(),
               torch.distributed.is_initialized(), os.environ.get("OMP_NUM_THREADS")])
        print({name: name in sys.modules for name in ("deepspeed", "tensorboard", "pyarrow", "scipy.special",
               "transformers.models.llama.modeling_llama", "deepspeed.runtime.zero.stage3")})
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        print(why_not_fork())
        sys.stdout.flush()
        os._exit(0)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, modules, after = done.stdout.splitlines()
    assert first == "['', 1, False, False, None]"
    assert "False" not in modules
    assert after == "2 threads are running"


@pytest.mark.parametrize(
    "words",
    [
        ["train", TINY, "steps=many"],
        ["compare", "no-such-run"],
        ["compare", "--help"],
        ["no-such-verb"],
    ],
)
def test_the_tests_own_fork_server_answers_as_the_command_does(words: list[str]) -> None:
    from forkserver import EXEC, Vernier

    found = []
    for kind in (EXEC, Vernier):
        process = kind([*VERNIER, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        out, err = process.communicate(timeout=120)
        found.append((process.returncode, out, err))
    assert found[0] == found[1]
