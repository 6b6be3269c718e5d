"""`prepare` as a user meets it: the same data each time, nothing half there, no text on both sides."""

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from configs.errors import ConfigError, DataError
from configs.schema import Config
from eval.reference.set import load_reference
from eval.reference.tokenizer import open_tokenizer
from trainer.data import prepare as module
from trainer.data.integrity import check_data
from trainer.data.prepare import load_dataset_facts, prepare
from trainer.data.shards import Windows

PHRASE = " ".join(f"shared{n}" for n in range(60))


def corpus(folder: Path, count: int = 60) -> Path:
    draw = np.random.default_rng(0)
    path = folder / "corpus.jsonl"
    with open(path, "w") as file:
        for n in range(count):
            words = [f"w{k}" for k in draw.integers(0, 3000, 150)]
            middle = PHRASE if n % 7 == 0 else ""
            file.write(json.dumps({"text": f"{' '.join(words)} {middle} end {n}"}) + "\n")
    return path


def config(tmp_path: Path, out: str = "out", **changes: Any) -> Config:
    source = tmp_path / "corpus.jsonl"
    if not source.exists():
        corpus(tmp_path)
    mapping: dict[str, Any] = {
        "name": "t",
        "steps": 1,
        "seed": 3,
        "sequence_length": 32,
        "model": {"type": "llama"},
        "batch": {"global": 2},
        "data": {"source": str(source), "dir": tmp_path / out, "vocab_size": 500, **changes.pop("data", {})},
        "reference": {"documents": 20, "max_fraction": 0.4, "max_windows": 4, **changes.pop("reference", {})},
        **changes,
    }
    return Config.model_validate(mapping)


def quiet(_: str) -> None:
    pass


def test_prepared_twice_is_the_same_and_another_seed_is_not(tmp_path: Path) -> None:
    first = prepare(config(tmp_path, "a"), say=quiet)
    again = prepare(config(tmp_path, "b"), say=quiet)
    other = prepare(config(tmp_path, "c", seed=4), say=quiet)
    assert first["fingerprints"] == again["fingerprints"]
    for name in ("data", "reference_text", "reference_tokens"):
        assert first["fingerprints"][name] != other["fingerprints"][name]
    check_data(tmp_path / "a")
    assert load_dataset_facts(tmp_path / "a") == first
    assert first["train"]["windows"] == len(Windows(tmp_path / "a", 32))
    found = load_reference(tmp_path / "a" / "reference")
    assert found.tokens_fingerprint == first["fingerprints"]["reference_tokens"]
    assert found.documents == first["reference"]["documents"] == 20


def test_no_run_of_the_reference_set_is_in_the_training_tokens(tmp_path: Path) -> None:
    facts = prepare(config(tmp_path), say=quiet)
    assert facts["decontamination"]["shared_runs_across"] == 0
    assert facts["decontamination"]["largest_family"] == 9
    stream = np.load(tmp_path / "out" / "shards" / "train-00000.npy")
    runs = {stream[i : i + 50].tobytes() for i in range(len(stream) - 49)}
    texts = pq.read_table(tmp_path / "out" / "reference" / "documents.parquet")["text"].to_pylist()
    tokenizer = open_tokenizer(tmp_path / "out" / "tokenizer")
    for ids in tokenizer.encode(texts):
        small = ids.astype(stream.dtype)
        assert not any(small[i : i + 50].tobytes() in runs for i in range(len(small) - 49))
    assert (stream == tokenizer.eos_id).sum() == facts["train"]["documents"] == 40


def test_what_is_prepared_stays_and_other_settings_are_refused(tmp_path: Path) -> None:
    said: list[str] = []
    first = prepare(config(tmp_path), say=quiet)
    assert prepare(config(tmp_path), say=said.append) == first
    assert said == [f"{tmp_path / 'out'} is already prepared"]
    with pytest.raises(ConfigError, match=r"^reference\.documents: .* was prepared with 20, now it is 12; .*--fresh"):
        prepare(config(tmp_path, reference={"documents": 12}), say=quiet)
    fresh = prepare(config(tmp_path, reference={"documents": 12}), fresh=True, say=said.append)
    assert fresh["reference"]["documents"] == 12
    (old,) = tmp_path.glob("out.old-*")
    assert load_dataset_facts(old) == first
    (tmp_path / "out" / "shards" / "train-00000.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"cut short or changed.*--fresh"):
        prepare(config(tmp_path, reference={"documents": 12}), say=quiet)


@pytest.mark.parametrize("fresh", [False, True])
def test_interrupted_leaves_nothing_half_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    first = prepare(config(tmp_path), say=quiet) if fresh else None

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_shards", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(tmp_path), fresh=fresh, say=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl"] + ["out"] * fresh
    if fresh:
        assert load_dataset_facts(tmp_path / "out") == first
    else:
        with pytest.raises(DataError, match="run `vernier prepare CONFIG` first"):
            load_dataset_facts(tmp_path / "out")


def test_a_given_tokenizer_is_copied_and_may_move(tmp_path: Path) -> None:
    made = prepare(config(tmp_path, "a"), say=quiet)
    given = tmp_path / "a" / "tokenizer"
    again = prepare(config(tmp_path, "b", data={"tokenizer": given}), say=quiet)
    assert again["fingerprints"] == made["fingerprints"]
    given.rename(tmp_path / "moved")
    assert prepare(config(tmp_path, "b", data={"tokenizer": tmp_path / "moved"}), say=quiet) == again


def test_too_little_data_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"only 0 of 60 documents .* give more documents"):
        prepare(config(tmp_path, reference={"max_fraction": 0.001}), say=quiet)
    with pytest.raises(DataError, match="no window of"):
        prepare(config(tmp_path, sequence_length=100_000), say=quiet)
    with pytest.raises(ConfigError, match=r"data\.source: .*nowhere does not exist"):
        prepare(config(tmp_path, data={"source": str(tmp_path / "nowhere")}), say=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no prepared data"):
        prepare(config(tmp_path), say=quiet)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_two_at_once_on_one_directory_are_not_let_to_mix(tmp_path: Path) -> None:
    with open(tmp_path / ".out.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is being prepared by another process"):
            prepare(config(tmp_path), say=quiet)
    prepare(config(tmp_path), say=quiet)


def test_a_tokenizer_with_dropout_gives_the_same_data_each_time_and_it_is_said(tmp_path: Path) -> None:
    prepare(config(tmp_path, "plain"), say=quiet)
    given = tmp_path / "given"
    shutil.copytree(tmp_path / "plain" / "tokenizer", given)
    whole = json.loads((given / "tokenizer.json").read_text())
    whole["model"]["dropout"] = 0.1
    (given / "tokenizer.json").write_text(json.dumps(whole))
    asked = {"tokenizer": given}
    first, again = (prepare(config(tmp_path, name, data=asked), say=quiet) for name in ("a", "b"))
    assert first["fingerprints"] == again["fingerprints"]
    assert any("asks for dropout 0.1" in unmet for unmet in first["unmet"])
    assert first["fingerprints"]["tokenizer"] == load_dataset_facts(tmp_path / "plain")["fingerprints"]["tokenizer"]


def test_another_token_that_ends_documents_is_another_data_set(tmp_path: Path) -> None:
    prepare(config(tmp_path, "plain"), say=quiet)
    given = tmp_path / "given"
    shutil.copytree(tmp_path / "plain" / "tokenizer", given)
    prepare(config(tmp_path, data={"tokenizer": given}), say=quiet)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (given / name).is_file():
            settings = json.loads((given / name).read_text())
            (given / name).write_text(json.dumps({**settings, "eos_token": "a"}))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .* was prepared with eos_id 0, now it is \d+"):
        prepare(config(tmp_path, data={"tokenizer": given}), say=quiet)
