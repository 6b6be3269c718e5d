"""What a run adapts to go on: kept in adapted.json, and smaller micro-batches when memory runs out."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY, lines

from configs.errors import DataError, VernierError
from configs.fault_injection import asked
from configs.load import load_config, micro_batch
from configs.run.directory import RunDir
from configs.schema import Config
from trainer.faults.adaptations import (
    Adaptations,
    RestartRequested,
    adapted,
    after_out_of_memory,
    is_out_of_memory,
    no_memory,
    read_adaptations,
    write_adaptations,
)
from trainer.faults.injected import forward_of

# Adaptations


def test_a_run_without_the_file_has_adapted_nothing(tmp_path: Path) -> None:
    assert read_adaptations(RunDir(tmp_path)) == Adaptations()


def test_adaptations_come_back_as_written(tmp_path: Path) -> None:
    made = Adaptations(micro=2, gradient_checkpointing=True, passed_over=(3, 4, 9), returns=2, from_step=10)
    run = RunDir(tmp_path)
    write_adaptations(run, made)
    first = (tmp_path / "adapted.json").read_bytes()
    write_adaptations(run, made)
    assert (tmp_path / "adapted.json").read_bytes() == first
    assert read_adaptations(run) == made
    assert [p.name for p in tmp_path.iterdir()] == ["adapted.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected an object with"),
        ('{"micro": 1}', "expected an object with"),
        (json.dumps({**Adaptations().__dict__, "micro": 0}), "micro: expected a number of windows or null, not 0"),
        (json.dumps({**Adaptations().__dict__, "passed_over": [2, 1]}), "passed_over: expected positions, ascending"),
        (json.dumps({**Adaptations().__dict__, "passed_over": 7}), "passed_over: expected positions, ascending"),
        (json.dumps({**Adaptations().__dict__, "returns": -1}), "returns: expected a count, not -1"),
        (json.dumps({**Adaptations().__dict__, "gradient_checkpointing": 1}), "expected true or false, not 1"),
    ],
)
def test_a_broken_file_is_one_line(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "adapted.json").write_text(content)
    with pytest.raises(DataError, match=r"adapted\.json") as caught:
        read_adaptations(RunDir(tmp_path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_adapted_config_is_never_larger_than_the_users() -> None:
    config = load_config(TINY)
    assert adapted(config, Adaptations()) == config
    less = adapted(config, Adaptations(micro=2, gradient_checkpointing=True))
    assert (less.batch.micro, less.gradient_checkpointing, less.batch.global_) == (2, True, config.batch.global_)
    assert adapted(config, Adaptations(micro=64)).batch.micro == config.batch.micro


# Out of memory


def test_what_is_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory of names"))


def test_it_halves_the_micro_batch_then_checkpoints_activations_then_gives_up(tmp_path: Path) -> None:
    config = load_config(TINY, ["batch.global=24", "batch.micro=12", "zero.stage=1"])
    run, seen = RunDir(tmp_path), []
    for _ in range(5):
        now = adapted(config, read_adaptations(run))
        with pytest.raises(RestartRequested) as again:
            after_out_of_memory(now, run, MemoryError("no more"), rank=1, world=2, step=7)
        assert again.value.exit_code == 75
        found = read_adaptations(run)
        seen.append((micro_batch(adapted(config, found), 2), found.gradient_checkpointing))
        if found.gradient_checkpointing:
            break
    assert seen == [(6, False), (3, False), (1, False), (1, True)]
    with pytest.raises(VernierError) as end:
        after_out_of_memory(adapted(config, read_adaptations(run)), run, MemoryError(), rank=1, world=2, step=7)
    assert not isinstance(end.value, RestartRequested)
    assert str(end.value) == (
        "rank 1 ran out of memory making step 7; what helps: zero.stage=2 or 3, zero.offload=cpu, more ranks, "
        "a shorter sequence_length, a smaller model"
    )
    events = lines(run.events)
    assert [e["kind"] for e in events] == ["out of memory"] * 4
    assert events[0]["message"] == (
        "rank 1 ran out of memory at step 7; going on with micro-batches of 6 windows in place of 12"
    )
    assert (events[0]["rank"], events[0]["step"]) == (1, 6)
    assert events[3]["detail"]["new"] == {"micro": 1, "gradient_checkpointing": True}


def test_ranks_that_run_out_together_halve_once(tmp_path: Path) -> None:
    config, run = load_config(TINY), RunDir(tmp_path)
    write_adaptations(run, Adaptations(passed_over=(5,), returns=1))
    for rank in (0, 1):
        with pytest.raises(RestartRequested):
            after_out_of_memory(config, run, MemoryError(), rank=rank, world=2, step=1)
    assert read_adaptations(run) == Adaptations(micro=2, passed_over=(5,), returns=1)


def test_where_it_may_not_adapt_it_fails_in_one_line(tmp_path: Path) -> None:
    config = load_config(TINY, ["guards.on_out_of_memory=fail"])
    with pytest.raises(VernierError, match=r"memory making step 1; what helps: batch\.micro lower, gradient_ch"):
        after_out_of_memory(config, RunDir(tmp_path), MemoryError(), rank=0, world=2, step=1)
    assert not (tmp_path / "adapted.json").exists()
    least = load_config(TINY, ["zero.stage=3", "zero.offload=cpu", "batch.micro=1", "gradient_checkpointing=true"])
    said = str(no_memory(least, rank=0, world=2, doing="setting up"))
    assert said.endswith("what helps: more ranks, a shorter sequence_length, a smaller model")


def test_faults_bend_losses_and_take_memory_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Config = load_config(TINY)
    ids = torch.zeros((3, 4))

    def loss(position: int, windows: int = 2, config: Config = config) -> float:
        return forward_of(lambda **_: torch.tensor(2.0), config)({"ids_BT": ids[:windows]}, position).item()

    try:
        for words, spoken in (("", False), ("nan=3 spike=4 windows=2", True)):
            monkeypatch.setenv("VERNIER_FAULTS", words)
            asked.cache_clear()
            assert loss(2) == 2.0
            assert math.isnan(loss(3)) is spoken
            assert loss(4) == (200.0 if spoken else 2.0)
            if spoken:
                with pytest.raises(torch.OutOfMemoryError):
                    loss(2, windows=3)
                assert loss(2, 3, adapted(config, Adaptations(gradient_checkpointing=True))) == 2.0
            else:
                assert loss(2, windows=3) == 2.0
    finally:
        monkeypatch.undo()
        asked.cache_clear()
