"""Classes of the user's own that are called around training steps: docs/callbacks.md, tried as it stands there."""

import json
import os
import re
import sqlite3
from pathlib import Path

import pytest
from conftest import ROOT, TINY, lines, vernier

SETTINGS = [TINY, "nproc=2", "steps=12", "eval.placement=none", "snapshot.every=4", "checkpoint.every=4"]
WHOLE = """
import json
class All:
    def __init__(self, context):
        self.path, self.was = context.directory / f"seen-{context.rank}.jsonl", context.step
    def tell(self, *said):
        with open(self.path, "a") as file:
            file.write(json.dumps([str(one) for one in said]) + "\\n")
    def on_step_begin(self, step): self.tell("begin", step)
    def on_before_optimizer_step(self, step): self.tell("before", step)
    def on_after_optimizer_step(self, step): self.tell("after", step)
    def on_step_end(self, line): self.tell("end", line["step"])
    def on_snapshot(self, step, directory): self.tell("snapshot", step, (directory / "manifest.json").is_file())
    def on_checkpoint(self, step, directory): self.tell("checkpoint", step, (directory / "manifest.json").is_file())
    def on_end(self, step): self.tell("over", step)
"""
RAISES = """
class Raises:
    def __init__(self, context):
        self.rank = context.rank
    def on_after_optimizer_step(self, step):
        if step == 5 and self.rank == 1:
            raise KeyError("no such table")
class Misspelt:
    def on_step_ended(self, line):
        pass
"""


def example() -> str:
    """The class that docs/callbacks.md shows."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/callbacks.md").read_text(), re.DOTALL)[0]


def test_a_log_in_sqlite_has_each_step_once_also_after_a_kill(tiny_data: Path, tmp_path: Path) -> None:
    code, run = tmp_path / "my_callbacks.py", tmp_path / "run"
    code.write_text(example())
    assert len(example().strip().splitlines()) <= 26
    command = ["train", *SETTINGS, f"data.dir={tiny_data}", f"run.dir={run}", f"callbacks=[{code}:SqliteLog]"]
    # Killed when the checkpoint of step 8 is whole: the log has steps after it, which are made again.
    vernier(*command, code=1, env={**os.environ, "VERNIER_FAULTS": "kill=thinned:0:3"})
    assert json.loads((run / "state.json").read_text())["state"] == "failed"
    vernier(*command)
    with sqlite3.connect(run / "steps.sqlite") as database:
        logged = database.execute("select step, loss, lr from steps order by step").fetchall()
    assert logged == [(line["step"], line["loss"], line["lr"]) for line in lines(run / "metrics.jsonl")]
    assert len(logged) == 12


def test_each_rank_is_called_at_the_same_steps_in_the_order_of_a_step(tiny_data: Path, tmp_path: Path) -> None:
    code, run = tmp_path / "mine.py", tmp_path / "run"
    code.write_text(WHOLE)
    vernier("train", *SETTINGS, f"data.dir={tiny_data}", f"run.dir={run}", f"callbacks=[{code}:All]")
    seen = [[json.loads(line) for line in (run / f"seen-{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]
    assert seen[0] == seen[1]
    steps = [[kind, step] for kind, step, *_ in seen[0] if kind not in ("snapshot", "checkpoint")]
    assert [one for one in steps if one[0] != "end"] == [
        *([kind, str(step)] for step in range(1, 13) for kind in ("begin", "before", "after")),
        ["over", "12"],
    ]
    assert [step for kind, step in steps if kind == "end"] == [str(step) for step in range(1, 13)]
    assert [one[1:] for one in seen[0] if one[0] == "snapshot"] == [[str(s), "True"] for s in (0, 4, 8, 12)]
    assert [one[1:] for one in seen[0] if one[0] == "checkpoint"] == [[str(s), "True"] for s in (4, 8, 12)]


def test_what_it_raises_ends_training_with_its_name_or_drops_it(tiny_data: Path, tmp_path: Path) -> None:
    code, run = tmp_path / "mine.py", tmp_path / "run"
    code.write_text(RAISES)
    command = ["train", *SETTINGS, f"data.dir={tiny_data}", f"run.dir={run}", f"callbacks=[{code}:Raises]"]
    said = vernier(*command, code=1).stderr
    named = f"callbacks: {code}:Raises raised KeyError in on_after_optimizer_step: 'no such table'"
    failure = json.loads((run / "state.json").read_text())["failure"]
    assert failure["rank"] == 1
    assert failure["error"].startswith(named)
    assert named in said
    assert "Traceback" in (run / "logs" / "rank-1.log").read_text()
    done = vernier(*command, "callbacks_may_fail=true")
    assert f"caution: {named}; training goes on without it" in done.stderr + (run / "events.jsonl").read_text()
    assert json.loads((run / "state.json").read_text())["state"] == "done"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mine.py:Absent", "has no class Absent; it has Misspelt, Raises"),
        ("mine.py:Misspelt", "on_step_ended is never called; what is: on_step_begin, "),
        ("absent.py:One", "there is no file"),
        ("no_such_module:One", "No module named 'no_such_module'"),
        ("mine.py", "expected module:Class, or FILE.py:Class"),
    ],
)
def test_one_that_cannot_be_had_is_refused_before_a_rank_starts(
    tiny_data: Path, tmp_path: Path, name: str, why: str
) -> None:
    (tmp_path / "mine.py").write_text(RAISES)
    place = f"{tmp_path}/{name}" if name.partition(":")[0].endswith(".py") else name
    run = tmp_path / "run"
    done = vernier("train", *SETTINGS, f"data.dir={tiny_data}", f"run.dir={run}", f"callbacks=[{place}]", code=2)
    assert why in " ".join(done.stderr.split())
    assert not run.exists()
