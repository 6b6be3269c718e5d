"""Sweeps: members and their names, what is refused, going on, and the table of what came out."""

from __future__ import annotations

import fcntl
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, vernier, wait_for
from rich.console import Console

from configs.errors import ConfigError, DataError
from configs.load import load_config
from eval.tables import LossTable, write_table
from launcher.launch.sweep_here import run_local
from launcher.sweep.members import members, split_values
from launcher.sweep.store import member_of, read_sweep, write_sweep
from launcher.sweep.table import compare_sweep, run_sweep_table, sweep_table

LR = "optimizer.lr=1e-4,3e-4,1e-3"
RUN_HERE = """
import sys
from rich.console import Console
from configs.errors import ConfigError
from launcher.launch.sweep_here import run_local
from launcher.sweep.members import members
source, folder, seeds, sweep, *overrides = sys.argv[1:]
try:
    sys.exit(run_local(members(source, overrides, [sweep], int(seeds)), console=Console(soft_wrap=True)))
except ConfigError as error:
    sys.exit(chr(10).join(error.problems))
"""


def tiny(tmp_path: Path, sweep: list[str], seeds: int = 1, overrides: tuple[str, ...] = ()):
    """A sweep of the tiny recipe; it is not written."""
    return members(TINY, [f"run.dir={tmp_path / 'run'}", f"data.dir={tmp_path / 'data'}", *overrides], sweep, seeds)


@contextmanager
def started_here(data: Path, run: Path, sweep: str, seeds: int) -> Iterator[subprocess.Popen[str]]:
    """The sweep of a small training, run on this machine, as a process of its own."""
    few = ("steps=4", "snapshot.every=4", "checkpoint.every=2", "schedule.warmup_steps=2", "nproc=1")
    given = [TINY, str(run), str(seeds), sweep, f"data.dir={data}", f"run.dir={run}", *few]
    command = [sys.executable, "-c", RUN_HERE, *given]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.kill()  # its ranks die with it


def finish_member(run: Path, change: float, *, step: int = 20, seed: int = 0, **state: object) -> None:
    """What a finished member leaves behind; `change` of its losses is relative."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").touch()
    (run / "state.json").write_text(json.dumps({"state": "done", "step": step, "steps": step, "exit_code": 0, **state}))
    shared, own = np.random.default_rng(5), np.random.default_rng(seed)
    tokens = shared.integers(32, 129, 80).astype(np.int32)
    table = LossTable(
        sample=np.arange(80),
        document=np.arange(80),
        tokens=tokens,
        bytes=tokens,
        loss=tokens * shared.normal(2.2, 0.3, 80) * (1 + change + own.normal(0, 0.002, 80)),
        meta={"reference": "ab" * 32, "reference_text": "t", "objective": "causal", "dtype": "fp32"},
    )
    write_table(run / "losses" / "tiny-abababab" / f"step-{step:08d}@causal.fp32.parquet", table)


def shown(sweep_dir: Path) -> str:
    """What `vernier compare SWEEPDIR` prints."""
    out = StringIO()
    assert run_sweep_table(sweep_dir, False, Console(file=out, width=200, highlight=False)) == 0
    return out.getvalue()


def test_members_are_all_values_times_all_seeds_and_share_data_and_reference_set(tmp_path: Path) -> None:
    sweep = tiny(tmp_path, [LR, "optimizer.betas=[0.9,0.95],[0.9,0.99]"], seeds=2)
    assert len(sweep.members) == 3 * 2 * 2
    assert [m.seed for m in sweep.members] == [3] * 6 + [4] * 6
    assert {m.config.data_dir for m in sweep.members} == {tmp_path / "data"}
    assert {m.config.reference_dir for m in sweep.members} == {tmp_path / "data" / "reference"}
    first = sweep.members[0]
    assert first.name == "tiny-lr1e-4-betas0.9_0.95-seed3"
    assert first.config.run_dir == tmp_path / "run-sweep" / first.name
    assert (first.config.optimizer.lr, first.config.optimizer.betas) == (1e-4, (0.9, 0.95))
    assert len({m.name for m in sweep.members}) == 12


def test_seeds_alone_are_a_sweep_and_one_member_is_none(tmp_path: Path) -> None:
    assert [m.name for m in tiny(tmp_path, [], seeds=2).members] == ["tiny-seed3", "tiny-seed4"]
    for asked in ([], ["optimizer.lr=1e-3"]):
        with pytest.raises(ConfigError, match="one member is no sweep"):
            tiny(tmp_path, asked)


def test_names_are_safe_and_unique_whatever_the_values_are(tmp_path: Path) -> None:
    long = ",".join(f"/{'deep/' * 30}{name}" for name in "ab")
    for sweep in (["baseline=/a b/x,/a_b/x,null"], [f"baseline={long}"], ["optimizer.name=adam,adamw"]):
        names = [m.name for m in tiny(tmp_path, sweep, seeds=2).members]
        assert len(set(names)) == len(names)
        assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) for name in names)
    names = [m.name for m in tiny(tmp_path, ["optimizer.name=adam,adamw", "schedule.name=linear,cosine"]).members]
    assert names[0] == "tiny-optimizer.name_adam-schedule.name_linear"


def test_commas_in_brackets_and_quotes_do_not_split() -> None:
    assert split_values("1e-4, 3e-4") == ["1e-4", "3e-4"]
    assert split_values("[0.9,0.95],[0.8,0.9]") == ["[0.9,0.95]", "[0.8,0.9]"]
    assert split_values("{a: 1, b: [2,3]},null") == ["{a: 1, b: [2,3]}", "null"]
    assert split_values("'a,b',c") == ["'a,b'", "c"]


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (["optimizer.lrr=1,2"], "optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        (["optimizer.lr"], "--sweep 'optimizer.lr': expected key=v1,v2, such as optimizer.lr=1e-4,3e-4"),
        (["optimizer.lr=1e-3,,2e-3"], "there is an empty value"),
        (["optimizer.lr=1e-3,0.001"], "optimizer.lr=1e-3 and optimizer.lr=0.001 are the same settings"),
        (["optimizer.lr=1,2", "optimizer.lr=3"], "--sweep optimizer.lr: given twice"),
        (["seed=1,2"], "--sweep seed: cannot be swept: use --seeds N"),
        (["data.vocab_size=512,1024"], "members share how data is prepared; prepare each, and sweep data.dir"),
        (["steps=10,20"], "steps: is set and swept"),
        (["eval.dtype=fp32,bf16"], "all scored in the same way"),
        (["optimizer.lr=1e-3,2e-3", f"guards.spike_steps={','.join(map(str, range(16, 616)))}"], "at most 1,000"),
    ],
)
def test_what_makes_no_sweep_is_refused_in_a_line(tmp_path: Path, sweep: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(tmp_path, sweep, overrides=("steps=20",))
    assert len(caught.value.problems) == 1
    assert said in caught.value.problems[0]
    assert not list(tmp_path.iterdir())


def test_data_is_swept_where_all_are_scored_on_one_set(tmp_path: Path) -> None:
    values = f"data.dir={tmp_path / 'a'},{tmp_path / 'b'}"
    with pytest.raises(ConfigError, match=r"data.dir: is swept, so all members must be scored on one set"):
        members(TINY, [f"run.dir={tmp_path / 'run'}"], [values])
    found = members(TINY, [f"run.dir={tmp_path / 'run'}", f"eval.reference={tmp_path / 'a/reference'}"], [values])
    assert [member.config.data_dir.name for member in found.members] == ["a", "b"]
    assert {member.config.reference_dir for member in found.members} == {tmp_path / "a/reference"}


def test_every_member_that_is_refused_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(tmp_path, ["optimizer.lr=-1,1e-3,often", "schedule.warmup_steps=2,30,40"])
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "optimizer.lr",
        "schedule.warmup_steps",
        "schedule.warmup_steps",
        "optimizer.lr",
    ]
    with pytest.raises(ConfigError, match=r"longer than the training .steps: 3. \(with steps=3\)"):
        tiny(tmp_path, ["steps=3,10"])


def test_a_sweep_is_written_once_and_another_in_its_place_is_refused(tmp_path: Path) -> None:
    sweep = tiny(tmp_path, [LR], seeds=2)
    path = write_sweep(sweep)
    content = read_sweep(path)
    assert [member["values"] for member in content["members"][:3]] == [
        {"optimizer.lr": "1e-4"},
        {"optimizer.lr": "3e-4"},
        {"optimizer.lr": "1e-3"},
    ]
    run = member_of(path, 4)
    assert run.name == "tiny-lr3e-4-seed4"
    config = load_config(run / "train-config.yaml")
    assert (config.name, config.seed, config.optimizer.lr, config.run_dir) == (run.name, 4, 3e-4, run)
    (run / "train-config.yaml").write_text(yaml.safe_dump({"as": "resolved"}))
    before = (path / "sweep.json").read_bytes()
    write_sweep(tiny(tmp_path, [LR], seeds=2))
    assert (path / "sweep.json").read_bytes() == before
    assert (run / "train-config.yaml").read_text() == "as: resolved\n"
    for asked, seeds, more, said in (
        (["optimizer.lr=1e-4,3e-4"], 2, (), "--sweep optimizer.lr is 1e-4,3e-4,1e-3 there, 1e-4,3e-4 now"),
        ([LR], 3, (), "--seeds is 2 there, 3 now"),
        ([LR], 2, ("steps=30",), "steps is 20 there, 30 now"),
        (["clip_grad_norm=1,2"], 2, (), "--sweep is over optimizer.lr there, over clip_grad_norm now"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            write_sweep(tiny(tmp_path, asked, seeds, more))
    assert (path / "sweep.json").read_bytes() == before


def test_a_task_beyond_the_array_and_a_folder_that_is_no_sweep_are_refused(tmp_path: Path) -> None:
    path = write_sweep(tiny(tmp_path, [LR]))
    with pytest.raises(ConfigError, match="has no member 3; they are 0 to 2"):
        member_of(path, 3)
    with pytest.raises(DataError, match=r"not a sweep \(it has no sweep.json\)"):
        member_of(tmp_path, 0)
    (path / "sweep.json").write_text('{"kind": "sweep", "members": [{"name": "../../etc"}]}')
    with pytest.raises(DataError, match="is not a sweep's file"):
        member_of(path, 0)


def test_the_table_ranks_finished_members_and_says_why_the_others_are_not_in_it(tmp_path: Path) -> None:
    sweep = tiny(tmp_path, [LR], seeds=3)
    path = write_sweep(sweep)
    for place, member in enumerate(sweep.members):
        change = {"1e-4": 0.02, "3e-4": 0.0, "1e-3": 0.05}[member.values["optimizer.lr"]]
        finish_member(path / member.name, change + 0.001 * member.seed, seed=place)
    failed, unscored, waiting = (path / sweep.members[i].name for i in (8, 6, 3))
    (failed / "state.json").write_text(
        json.dumps({"state": "failed", "step": 7, "steps": 20, "failure": {"rank": 0, "error": "out of memory"}})
    )
    for table in unscored.glob("losses/*/*"):
        table.unlink()
    (waiting / "snapshots" / "step-00000040").mkdir(parents=True)
    (waiting / "snapshots" / "step-00000040" / "manifest.json").touch()
    text = shown(path)
    assert re.search(r"1\s+3e-4\s+3\s", text)
    assert re.search(r"2\s+1e-4\s+1\s", text)
    assert "optimizer.lr=3e-4 wins; its margin to the runner-up, optimizer.lr=1e-4: +2." in text
    assert "counted among 3 pairs" in text
    assert f"not ranked: {failed.name}: failed at step 7 of 20: rank 0: out of memory" in text
    assert f"not ranked: {unscored.name}: done, but nothing of it is scored" in text
    assert f"not ranked: {waiting.name}: done, but step 40 is not scored yet (the last that is: 20)" in text
    content = sweep_table(path).to_json()
    json.dumps(content, allow_nan=False)
    assert content["winner"]["values"] == {"optimizer.lr": "3e-4"}
    assert content["winner"]["margin"]["told_apart"] is True
    assert content["winner"]["margin"]["percent"] == pytest.approx(2.0, abs=0.3)
    assert [len(value["members"]) for value in content["values"]] == [3, 1, 2]
    assert {one["member"] for one in content["not_ranked"]} == {failed.name, unscored.name, waiting.name}


def test_with_one_seed_the_noise_of_seeds_is_said_to_be_unknown(tmp_path: Path) -> None:
    sweep = tiny(tmp_path, [LR])
    path = write_sweep(sweep)
    with pytest.raises(DataError) as caught:
        sweep_table(path)
    assert "no member can be ranked yet" in caught.value.problems[0]
    assert caught.value.problems[1] == "tiny-lr1e-4: not started: not started"
    for place, member in enumerate(sweep.members):
        finish_member(path / member.name, 0.02 * place, seed=place)
    text = shown(path)
    assert "one seed each: how much another seed would change is unknown" in text
    assert "by seeds unknown" in text
    alone = {"json_out": False, "console": Console(quiet=True)}
    assert compare_sweep([str(path)], [], **alone) == 0
    assert compare_sweep([str(path / sweep.members[0].name)], [], **alone) is None
    with pytest.raises(ConfigError, match="--gate: does not go with a sweep"):
        compare_sweep([str(path)], ["--gate"], **alone)
    with pytest.raises(ConfigError, match="is a sweep, which is shown by itself"):
        compare_sweep([str(path), str(path)], [], **alone)


def test_settings_that_cannot_be_trained_are_told_before_anything_is_written(tmp_path: Path, tiny_data: Path) -> None:
    sweep = members(TINY, [f"run.dir={tmp_path / 'run'}", f"data.dir={tiny_data}"], ["model.num_attention_heads=4,5,7"])
    with pytest.raises(ConfigError) as caught:
        run_local(sweep, console=Console(quiet=True))
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "run-sweep").exists()


def test_a_sweep_that_was_stopped_goes_on_and_ends_in_its_table(tmp_path: Path, tiny_data: Path) -> None:
    run, folder, sweep = tmp_path / "run", tmp_path / "run-sweep", "optimizer.lr=5e-3,1e-3"
    names = [f"tiny-lr{lr}-seed{seed}" for seed in (3, 4) for lr in ("5e-3", "1e-3")]
    with started_here(tiny_data, run, sweep, 2) as first:
        wait_for(lambda: (folder / names[1] / "events.jsonl").is_file() or first.poll() is not None, 240)
        first.send_signal(signal.SIGTERM)
        told = first.communicate(timeout=240)[0]
    assert first.returncode == 75, told
    assert f"the sweep stopped at {names[1]}; the same command goes on" in told
    assert not (folder / names[2] / "state.json").exists()
    with started_here(tiny_data, run, sweep, 2) as second:
        told = second.communicate(timeout=400)[0]
    assert second.returncode == 0, told
    assert f"member 1 of 4: {names[0]} is finished and scored" in told
    assert "differences are paired by sample and by seed" in told
    content = sweep_table(folder).to_json()
    assert [len(value["members"]) for value in content["values"]] == [2, 2]
    assert content["not_ranked"] == []
    vernier("compare", *(folder / name for name in names[:2]))  # a member is a run like any other


def test_a_member_that_fails_does_not_stop_the_others_and_is_named(tmp_path: Path, tiny_data: Path) -> None:
    held = tmp_path / "run-sweep" / "tiny-lr5e-3" / "lock"
    held.parent.mkdir(parents=True)
    with open(held, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another trainer would
        with started_here(tiny_data, tmp_path / "run", "optimizer.lr=5e-3,1e-3", 1) as process:
            told = process.communicate(timeout=240)[0]
    assert process.returncode == 1, told
    assert "error: tiny-lr5e-3 failed:" in told
    assert "optimizer.lr=1e-3: the only value that can be ranked" in told
    assert "not ranked: tiny-lr5e-3: " in told
