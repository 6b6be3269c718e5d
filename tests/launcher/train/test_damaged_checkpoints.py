"""A damaged checkpoint is found before it is used and moved away, and the one before it leads to the same end."""

import hashlib
import json
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, by_agent, lines, losses, vernier

from configs.files.atomic import verify
from configs.run.directory import step_name
from trainer.checkpoint.find_whole import damage

FILES = ("manifest.json", "state.json", "rank-00000.safetensors", "rank-00001.safetensors")
STEPS = 14
SETTINGS = [f"steps={STEPS}", "checkpoint.every=1", "checkpoint.keep=99", f"snapshot.every={STEPS}"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


HARMS: tuple[Callable[[Path], None], ...] = (flip_a_bit, truncate, Path.unlink)


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def settings(data: Path, run: Path) -> list[str]:
    return [TINY, *SETTINGS, f"data.dir={data}", f"run.dir={run}", "eval.placement=none"]


@pytest.fixture(scope="module")
def straight(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs, with a checkpoint at each step."""
    run = tmp_path_factory.mktemp("straight") / "run"
    vernier("train", *settings(tiny_data, run))
    return run


def copy_to_go_on_from(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    (to / "state.json").unlink()  # it would say that the run is finished
    return to


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / step_name(step)


def weights(run: Path) -> str:
    return json.loads((run / "snapshots" / step_name(STEPS) / "manifest.json").read_text())["weights"]


def test_whatever_is_wrong_with_which_file_an_older_one_leads_to_the_same_bits(
    straight: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = copy_to_go_on_from(straight, tmp_path / "run")
    shutil.rmtree(run / "snapshots")
    cases = [(file, harm) for file in FILES for harm in HARMS]
    whole = STEPS - len(cases)
    damaged = dict(zip(range(STEPS, whole, -1), cases, strict=True))  # each of the newest in a way of its own
    for step, (file, harm) in damaged.items():
        harm(checkpoint(run, step) / file)
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    for name in ("optimizer.pt", "rank-00002.safetensors", "pytorch_model.bin"):
        (checkpoint(run, whole) / name).write_bytes(bomb)

    said = vernier("train", *settings(tiny_data, run)).stderr
    assert f"going on from step {whole}, written by 2 ranks" in said
    for step, (file, _) in damaged.items():
        assert f"; step {step}'s checkpoint is damaged: {step_name(step)}/{file}: " in said
        assert (run / "quarantine" / f"{step_name(step)}.1").is_dir()
    events = [line for line in lines(run / "events.jsonl") if line["kind"] == "quarantined"]
    assert [(e["step"], e["detail"]["file"]) for e in events] == [(step, file) for step, (file, _) in damaged.items()]
    assert all(event["detail"]["reason"] for event in events)
    assert not (tmp_path / "exploded").exists()
    assert losses(run) == losses(straight)
    assert weights(run) == weights(straight)


def test_every_bit_of_a_manifest_counts(straight: Path, tmp_path: Path) -> None:
    here = tmp_path / "checkpoint"
    shutil.copytree(checkpoint(straight, STEPS), here)
    manifest = here / "manifest.json"
    content = manifest.read_bytes()
    assert damage(here, STEPS) is None
    for place in range(0, len(content), 2):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 7
        manifest.write_bytes(changed)
        if damage(here, STEPS) is None:  # white space of another kind
            assert json.loads(changed) == json.loads(content)
    manifest.write_bytes(content)
    assert damage(here, STEPS - 1) is not None  # of another step


def test_where_none_is_whole_it_never_starts_anew_unasked(straight: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = copy_to_go_on_from(straight, tmp_path / "run")
    for step in range(1, STEPS - 1):
        shutil.rmtree(checkpoint(run, step))
    for step in (STEPS - 1, STEPS):
        flip_a_bit(checkpoint(run, step) / "rank-00001.safetensors")
    refused = [vernier("train", *settings(tiny_data, run), code=2).stderr for _ in range(2)]
    for said in refused:
        (told,) = [line for line in said.splitlines() if "no whole checkpoint left" in line]
        assert "--fresh" in told
    assert refused[0].count("rank-00001.safetensors: changed since it was written") == 2
    assert len(losses(run)) == STEPS
    assert len(list((run / "quarantine").iterdir())) == 2

    (run / "quarantine" / f"{step_name(STEPS)}.1").rename(checkpoint(run, STEPS))
    flip_a_bit(checkpoint(run, STEPS) / "rank-00001.safetensors")  # mended by hand
    assert f"going on from step {STEPS}," in vernier("train", *settings(tiny_data, run)).stderr
    vernier("train", *settings(tiny_data, run), "--fresh", "steps=5")
    assert len(losses(run)) == 5


def test_where_all_were_removed_or_their_disk_is_away_it_is_refused_too(
    straight: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = copy_to_go_on_from(straight, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    said = vernier("train", *settings(tiny_data, run), code=2).stderr
    assert "has no whole checkpoint left, though it has written some" in said
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(tmp_path / "unmounted")
    said = vernier("train", *settings(tiny_data, run), code=2).stderr
    assert "checkpoints is no directory, or a link that leads nowhere; is its disk there?" in said
    assert len(losses(run)) == STEPS


def test_what_another_node_finds_counts_for_all(straight: Path, tmp_path: Path) -> None:
    runs = [copy_to_go_on_from(straight, tmp_path / name) for name in ("first", "second")]
    truncate(checkpoint(runs[1], STEPS) / "state.json")
    command = [*by_agent(2), "tests.launcher.train.another_node", *map(str, runs)]
    subprocess.run(command, check=True, timeout=120, cwd=ROOT)
    told = {(run / "found").read_text() for run in runs}
    (said,) = told
    assert said.startswith(
        f"{step_name(STEPS - 1)} step {STEPS}'s checkpoint is damaged: {step_name(STEPS)}/state.json:"
    )
    assert (runs[0] / "quarantine" / f"{step_name(STEPS)}.1").is_dir()  # the first rank has moved it


def test_a_clock_of_another_step_is_damage(straight: Path, tmp_path: Path) -> None:
    """Of a folder that somebody has put together, hashes and all."""
    here = tmp_path / step_name(STEPS)
    shutil.copytree(checkpoint(straight, STEPS), here)
    older = (checkpoint(straight, STEPS - 1) / "state.json").read_bytes()
    (here / "state.json").write_bytes(older)
    manifest = json.loads((here / "manifest.json").read_bytes())
    del manifest["seal"]
    manifest["files"]["state.json"] = {"sha256": hashlib.sha256(older).hexdigest(), "bytes": len(older)}
    (here / "manifest.json").write_text(json.dumps(manifest))
    assert damage(here, STEPS) == (
        "state.json",
        f"its clock stands at step {STEPS - 1}, its directory is called {step_name(STEPS)}",
    )


def test_a_damaged_snapshot_that_is_made_again_gives_way_to_the_good_one(
    straight: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = copy_to_go_on_from(straight, tmp_path / "run")
    shutil.rmtree(checkpoint(run, STEPS))
    snapshot = run / "snapshots" / step_name(STEPS)
    flip_a_bit(sorted(snapshot.glob("*.safetensors"))[0])
    vernier("train", *settings(tiny_data, run))
    verify(snapshot, "snapshot")
    assert (run / "replaced" / f"{step_name(STEPS)}.1" / "snapshot").is_dir()
    (event,) = [line for line in lines(run / "events.jsonl") if line["kind"] == "replaced"]
    assert "is damaged" in event["message"]
    for made in (checkpoint(run, STEPS), snapshot):  # equal state, equal bytes
        for file in made.iterdir():
            assert file.read_bytes() == (straight / made.relative_to(run) / file.name).read_bytes(), file


def test_a_letter_in_one_snapshots_manifest_sets_that_step_alone_aside(
    straight: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    manifest = run / "snapshots" / step_name(0) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"files"', '"filet"'))
    scored = [word for word in settings(tiny_data, run) if word != "eval.placement=none"]
    said = vernier("train", *scored, "eval.placement=separate", code=1).stderr
    assert f"scored step {STEPS}: loss" in said
    assert "error: 1 snapshot could not be scored" in said
    assert f"step 0: {manifest}: changed since it was written" in said
    assert not [line for line in lines(run / "events.jsonl") if line["kind"] == "evaluator died"]
    assert [path.name[:13] for path in run.glob("losses/*/*.parquet")] == [step_name(STEPS)]
