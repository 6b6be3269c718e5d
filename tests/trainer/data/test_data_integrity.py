"""Changed data are never trained on in silence: refused before a rank starts, or the run ends and names the file."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, VERNIER, vernier, wait_for

from configs.errors import DataError, VernierError
from trainer.data import integrity
from trainer.data.integrity import DataWatch, check_data

FILES = (
    "dataset.json",
    "manifest.json",
    "shards/train-00000.npy",
    "shards/train-00000.documents.npy",
    "reference/documents.parquet",
    "reference/samples.parquet",
    "reference/reference.json",
    "reference/manifest.json",
    "tokenizer/tokenizer.json",
)


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_data, tmp_path / "data")


def flip(path: Path) -> None:
    """Changes one letter or digit in the middle, as nothing but a hash would show."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    at = next(i for i in range(middle, len(content)) if path.suffix != ".json" or chr(content[i]).isdigit())
    with open(path, "r+b") as file:  # in place: whoever has it mapped reads on
        file.seek(at)
        file.write(bytes([content[at] ^ 1]))


@pytest.mark.parametrize("name", FILES)
def test_a_change_at_equal_size_is_found_wherever_it_is(name: str, data: Path) -> None:
    check_data(data)
    size = (data / name).stat().st_size
    flip(data / name)
    assert (data / name).stat().st_size == size
    with pytest.raises(DataError):
        check_data(data)


def test_a_file_put_back_is_good_again_and_a_hidden_one_or_a_note_is_no_data(data: Path) -> None:
    shard = data / "shards" / "train-00000.npy"
    good = shard.read_bytes()
    flip(shard)
    with pytest.raises(DataError, match="changed since it was written"):
        check_data(data)
    shard.write_bytes(good)
    (data / "NOTES.txt").write_text("mine")
    (data / "shards" / ".nfs0001").write_text("")
    check_data(data)
    (data / "shards" / "train-00001.npy").write_bytes(good)  # would be trained on
    with pytest.raises(DataError, match=r"train-00001\.npy: is none of the files that `prepare` wrote"):
        check_data(data)


def test_a_manifest_without_its_list_of_files_is_not_believed(data: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    for broken in ({**manifest, "files": {}}, {**manifest, "files": {"x": 1}}):
        (data / "manifest.json").write_text(json.dumps(broken))
        with pytest.raises(DataError, match=r"manifest\.json: changed since it was written"):
            check_data(data)


def test_of_large_data_the_smallest_files_are_hashed_at_once_and_the_rest_beside_training(data: Path) -> None:
    shard = data / "shards" / "train-00000.npy"
    flip(shard)
    check_data(data, at_most=shard.stat().st_size)  # as if it were terabytes
    flip(data / "reference" / "reference.json")
    with pytest.raises(DataError, match=r"reference\.json"):
        check_data(data, at_most=shard.stat().st_size)
    flip(data / "reference" / "reference.json")
    watch = DataWatch(data, 40, active=True)
    with pytest.raises(VernierError, match=r"train-00000\.npy: changed .* since step 40 may be wrong") as told:
        watch.finish()
    assert told.value.exit_code == 1


def test_what_is_changed_while_a_run_reads_it_is_found(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "LOOK_EVERY_S", 0.05)
    watch = DataWatch(data, 0, active=True)
    shard = data / "shards" / "train-00000.npy"
    os.utime(shard)  # written to, as it was
    time.sleep(0.2)
    watch.on_step_begin(1)
    flip(shard)
    wait_for(lambda: bool(watch._found), 10)
    with pytest.raises(VernierError, match=r"train-00000\.npy"):
        watch.on_step_begin(1)
    idle = DataWatch(data, 0, active=False)
    idle.finish()  # one process a node looks


def test_changed_data_are_refused_before_a_rank_starts_and_prepare_says_what_is_wrong(
    data: Path, tmp_path: Path
) -> None:
    assert "all as they were written" in vernier("prepare", "--verify", data).stdout
    flip(data / "shards" / "train-00000.npy")
    (data / "reference" / "samples.parquet").unlink()
    said = vernier("train", TINY, f"data.dir={data}", f"run.dir={tmp_path / 'run'}", code=2).stderr
    assert f"vernier prepare --verify {data}" in said
    assert not (tmp_path / "run").exists()
    said = vernier("prepare", "--verify", data, code=3).stdout
    assert "reference/samples.parquet is missing" in said
    assert "train-00000.npy: changed since it was written" in said
    found = json.loads(vernier("prepare", "--verify", data, "--json", code=3).stdout)
    assert [one["file"] for one in found["damaged"]] == ["reference/samples.parquet", "shards/train-00000.npy"]
    assert "is not prepared data" not in vernier("prepare", "--verify", data / "reference", code=3).stdout


def test_a_run_whose_data_change_does_not_end_as_done(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [TINY, f"data.dir={data}", f"run.dir={run}", "eval.placement=none", "steps=150", "checkpoint.every=500"]
    training = subprocess.Popen([*VERNIER, "train", *settings], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for((run / "metrics.jsonl").is_file)
    flip(data / "shards" / "train-00000.npy")
    _, said = training.communicate(timeout=120)
    assert training.returncode == 1
    assert "train-00000.npy: changed since it was written" in said
    assert "what was trained since step 0 may be wrong" in said
    assert json.loads((run / "state.json").read_text())["state"] == "failed"
    vernier("train", *settings, code=2)  # it does not go on with them either
