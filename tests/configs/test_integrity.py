"""What is read back is what was written, or is refused in a line: manifests, JSON of a run, lines, links and pipes."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest

from configs.errors import DataError
from configs.files.atomic import read_json, read_manifest, sha256_file, verify, whole_directory, write_json
from configs.files.json_lines import each_line, read_jsonl, sealed_line
from configs.files.manifests import parse_manifest
from configs.files.opening import open_to_write, read_bytes
from configs.files.seal import sealed
from configs.run.directory import RunDir, append_line
from configs.run.facts import read_run_manifest
from launcher.jobs.log import DAMAGED, add_job, read_jobs

FACT = {"sha256": "0" * 64, "bytes": 7}
MANIFESTS: dict[str, dict[str, Any]] = {
    "snapshot": {"step": 4, "tokens": 4096, "dtype": "fp32", "weights": "ab" * 32, "files": {"config.json": FACT}},
    "checkpoint": {"step": 4, "files": {"state.json": FACT, "rank-00000.safetensors": FACT}},
    "dataset": {"fingerprints": {"data": "ab"}, "files": {"dataset.json": FACT}},
    "reference": {"name": "tiny", "fingerprints": {"tokens": "ab"}, "files": {"reference.json": FACT}},
}


def a_letter_changed(text: bytes, chance: random.Random) -> bytes:
    changed = bytearray(text)
    changed[chance.randrange(len(text))] ^= 1 << chance.randrange(7)
    return bytes(changed)


@pytest.mark.parametrize("kind", MANIFESTS)
def test_no_letter_of_a_manifest_changes_unseen(kind: str) -> None:
    whole = {"kind": kind, **MANIFESTS[kind]}
    text = json.dumps(sealed(whole), indent=1).encode()
    assert parse_manifest(text, "step-00000004", kind) == whole
    chance = random.Random(3)
    for _ in range(200):
        try:
            found = parse_manifest(a_letter_changed(text, chance), "step-00000004", kind)
        except ValueError as error:
            said = str(error)
        else:
            said = "" if found == whole else "another manifest\n"  # white space counts for nothing
        assert "\n" not in said


@pytest.mark.parametrize("kind", MANIFESTS)
def test_an_older_manifest_is_held_to_its_keys(kind: str) -> None:
    """Without a seal: what is missing or unknown is damage, wherever it stands."""
    whole = {"kind": kind, **MANIFESTS[kind]}
    assert parse_manifest(json.dumps(whole).encode(), "any", kind) == whole
    for key in whole:
        for changed in (
            {k: v for k, v in whole.items() if k != key},
            {f"x{k}" if k == key else k: v for k, v in whole.items()},
        ):
            with pytest.raises(ValueError, match=r"changed since|expected a"):
                parse_manifest(json.dumps(changed).encode(), "any", kind)
    (name, *_) = whole["files"]
    for fact in ({"sha256": "0" * 64}, {"shb256": "0" * 64, "bytes": 7}, {"sha256": "0", "bytes": 7}, 7):
        with pytest.raises(ValueError, match=f"what it says of {re.escape(name)} is no size and hash"):
            parse_manifest(json.dumps({**whole, "files": {name: fact}}).encode(), "any", kind)
    with pytest.raises(ValueError, match="is no size and hash"):
        parse_manifest(json.dumps({**whole, "files": {"../else": FACT}}).encode(), "any", kind)


def test_a_step_in_another_steps_folder_is_damage() -> None:
    text = json.dumps({"kind": "checkpoint", **MANIFESTS["checkpoint"]}).encode()
    with pytest.raises(ValueError, match="it is of step 4, its directory is called step-00000100"):
        parse_manifest(text, "step-00000100", "checkpoint")
    parse_manifest(text, "a-copy-of-it", "checkpoint")


def test_without_hashes_the_json_files_are_hashed_all_the_same(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "d", {"kind": "test"}) as part:
        (part / "facts.json").write_text("{}")
        (part / "large.bin").write_bytes(b"12345678")
    (tmp_path / "d" / "large.bin").write_bytes(b"12345679")
    verify(tmp_path / "d", "test", hashes=False)
    (tmp_path / "d" / "facts.json").write_text("[]")
    with pytest.raises(DataError, match=r"facts\.json: changed since"):
        verify(tmp_path / "d", "test", hashes=False)


def test_a_digit_of_a_sealed_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "adapted.json"
    write_json(path, {"micro": 4, "passed_over": [3]})
    assert read_json(path) == {"micro": 4, "passed_over": [3]}
    path.write_text(path.read_text().replace("4", "6"))
    with pytest.raises(DataError, match=r"adapted\.json: changed since it was written"):
        read_json(path)


@pytest.mark.parametrize(
    "text",
    ['{"state": "done", "step": "twelve"}', '{"state": "dome"}', "[]", "{", '{"exit_code": "0"}', '{"failure": 3}'],
)
def test_a_damaged_state_is_told_and_not_believed(tmp_path: Path, text: str) -> None:
    run = RunDir(tmp_path)
    run.state.write_text(text)
    assert run.read_state() == {}
    with pytest.raises(DataError, match=r"state\.json: damaged .*; move it away, and the run goes on from its newest"):
        run.check_state()
    run.write_state("running", step=3)  # who trains writes it anew, and says so
    run.check_state()
    assert [event["kind"] for event in run.read_events()] == ["damaged"]


@pytest.mark.parametrize("text", ["", "\0" * 300])
def test_a_state_that_a_power_cut_left_empty_is_as_none(tmp_path: Path, text: str) -> None:
    run = RunDir(tmp_path)
    run.state.write_text(text)
    run.check_state()
    run.write_state("running", attempt=2, step=3)
    digit = run.state.read_text().replace('"step": 3', '"step": 8')
    run.state.write_text(digit)
    with pytest.raises(DataError, match="its seal does not fit"):
        run.check_state()


def test_a_runs_manifest_that_says_no_data_is_damaged(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_json(run.manifest, {"dbta": {"data": "ab"}})
    with pytest.raises(DataError, match=r"manifest\.json: damaged: data\.data is None"):
        read_run_manifest(run)


def test_a_changed_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(sealed_line({"step": step, "loss": step / 7}) for step in (1, 2, 3)))
    assert [line["step"] for line in read_jsonl(path)] == [1, 2, 3]
    path.write_text(path.read_text().replace('"loss": 0.2', '"loss": 0.3'))
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2 is damaged: changed since it was written"):
        read_jsonl(path)
    assert [line["step"] for line in read_jsonl(path, strict=False)] == [1, 3]
    assert [type(line) for line in each_line(path)] == [dict, str, dict]


def test_a_damaged_line_about_jobs_keeps_its_place(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for kind in ("submitted", "stop asked"):
        add_job(run, kind, component="train", job="7")
    run.jobs.write_text(run.jobs.read_text().replace("stop asked", "stop aske"))
    found = read_jobs(run)
    assert [line["kind"] for line in found] == ["submitted", DAMAGED]
    assert "jobs.jsonl: line 2 is damaged" in found[1]["why"]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    run = RunDir(tmp_path / "run")
    run.logs.mkdir(parents=True)
    for path in (run.lock, run.starter, run.events, run.metrics, run.jobs, run.logs / "rank-0.log"):
        path.symlink_to(precious)
        with pytest.raises(OSError, match="it is a symbolic link"):
            open_to_write(path, os.O_RDWR)
        with pytest.raises(DataError, match=f"{re.escape(path.name)}: is a symbolic link"):
            run.check_files()
        path.unlink()
    run.check_files()
    run.events.symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"):
        append_line(run.events, {})
    assert precious.read_text() == "keep me"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Only regular files are read: each of these would wait for a writer without end."""
    run = RunDir(tmp_path / "step-00000004")
    run.path.mkdir()
    for path in (run.manifest, run.state, run.lock, run.events, run.metrics):
        os.mkfifo(path)
        with pytest.raises(OSError, match="no regular file"):
            read_bytes(path)
        with pytest.raises(OSError, match="no regular file"):
            sha256_file(path)
        with pytest.raises(DataError, match="no regular file"):
            read_json(path)
        with pytest.raises(DataError, match="is no regular file"):
            run.check_files()
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        read_manifest(run.path)
    with pytest.raises(DataError, match="no regular file"):
        run.check_state()
    assert not run.is_held()
    assert run.last_heartbeat() == 0.0
