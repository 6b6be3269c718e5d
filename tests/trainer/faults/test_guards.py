"""The guards of training: which updates are refused, where training goes back, what it adapts when memory runs out."""

import json
import math
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, by_agent, lines

from configs.errors import VernierError
from configs.load import load_config
from configs.run.directory import RunDir
from eval.distributed.ranks import Ranks, join, leave
from trainer.checkpoint.checkpoint import Clock
from trainer.data.shards import FOLDER, Windows, write_shards
from trainer.faults.adaptations import (
    Adaptations,
    RestartRequested,
    read_adaptations,
    write_adaptations,
)
from trainer.faults.guards import MOST_NAMED, Guard, Spikes, recent_losses
from trainer.order import windows_at

NOTHING = torch.zeros((), dtype=torch.float64)


# Refused updates, at every stage: one group of two ranks for all.


@pytest.fixture(scope="module")
def refusals() -> list[dict]:
    done = subprocess.run(
        [*by_agent(2), "tests.trainer.faults.refusals", TINY],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 25
    return found


def test_a_refused_update_leaves_weights_and_moments_bit_for_bit(refusals: list[dict]) -> None:
    for case in refusals:
        assert (case["alike_before"], case["unchanged"], case["applied"]) == (True, True, False), case
        assert (case["skipped"], case["counted"]) == (1, 1), case


def test_after_it_training_is_that_of_a_run_that_never_saw_the_batch(refusals: list[dict]) -> None:
    for case in refusals:
        assert case["follows"] == [True, True], case
        assert (case["really_moved"], case["good_everywhere"]) == (True, True), case


def test_a_refused_update_leaves_the_loss_scale_of_fp16(refusals: list[dict]) -> None:
    kept = [case["scale_kept"] for case in refusals if case["precision"] == "fp16"]
    assert kept == [True] * 4


# Spikes


def noisy(count: int, seed: int = 0) -> list[float]:
    return (3 + 0.05 * np.random.default_rng(seed).standard_normal(count)).tolist()


def test_a_leap_is_a_spike_and_a_fall_is_none() -> None:
    spikes = Spikes(8.0, 128, noisy(200))
    found = spikes.look(4.0)
    assert found is not None
    recent = np.array(noisy(200)[-128:])
    median = np.median(recent)
    assert found.median == pytest.approx(median)
    assert found.z == pytest.approx((4.0 - median) / (1.4826 * np.median(np.abs(recent - median))))
    assert spikes.look(3.2) is None
    assert spikes.look(0.1) is None


def test_noise_and_falling_losses_are_no_spikes() -> None:
    draw = np.random.default_rng(1)
    spikes = Spikes(8.0, 128)
    for step in range(5000):
        loss = 2 + 8 * math.exp(-step / 100) + 0.05 * draw.standard_normal()
        assert spikes.look(loss) is None
        spikes.add(loss)


def test_fifteen_losses_are_too_few_to_tell_a_spike() -> None:
    assert Spikes(8.0, 128, noisy(15)).look(100.0) is None
    assert Spikes(8.0, 128, noisy(16)).look(100.0) is not None


def test_a_constant_series_has_a_spread_of_a_thousandth() -> None:
    spikes = Spikes(8.0, 128, [2.0] * 50)
    assert spikes.look(2.0) is None
    assert spikes.look(2.015) is None
    assert spikes.look(2.017) is not None
    assert Spikes(8.0, 128, [0.0] * 50).look(0.0) is None


def test_one_loss_that_is_not_finite_does_not_blind_it() -> None:
    spikes = Spikes(8.0, 16, [*noisy(15), math.nan, math.inf])
    spikes.add(math.nan)
    assert len(spikes.losses) == 15
    spikes.add(3.0)
    assert spikes.look(math.nan) is None
    assert spikes.look(9.0) is not None


# The guard itself, on a rank-group of one


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    before = dict(os.environ)
    yield join(torch.get_num_threads())
    leave()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def data(tmp_path: Path) -> Windows:
    """48 windows of 8 targets, of documents of 10 tokens each."""
    documents = [np.arange(9) for _ in range(39)]
    write_shards(tmp_path / "data" / FOLDER, documents, 9, 10, shard_tokens=100)
    return Windows(tmp_path / "data", 8)


def guard_of(tmp_path: Path, ranks: Ranks, data: Windows, *settings: str, losses: list[float] | None = None) -> Guard:
    config = load_config(TINY, ["batch.global=2", "batch.micro=1", *settings])
    (tmp_path / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    run = RunDir(tmp_path / "run")
    known = read_adaptations(run).passed_over
    return Guard(config, run, ranks, data, losses=losses or [], passed_over=known, finish_saving=lambda: None)


def checkpoint(run: RunDir, step: int, position: int) -> None:
    folder = run.checkpoints / f"step-{step:08d}"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"clock": {"position": position}}))


def train(guard: Guard, clock: Clock, bad: set[int], until: int) -> Clock:
    """What the loop does, for batches whose gradient is not finite at some positions."""
    while clock.position < until:
        if guard.passes_over(clock.position):
            clock = replace(clock, position=clock.position + 1)
            continue
        fails = clock.position in bad
        assert guard.refuses(clock, NOTHING, 1, torch.tensor(math.nan if fails else 1.0)) is fails
        clock = Clock(clock.step + (not fails), clock.position + 1, 0, clock.idle + 1 if fails else 0)
        guard.after(not fails, clock, NOTHING)
    return clock


def test_the_windows_of_a_batch_lead_to_their_documents(data: Windows) -> None:
    assert len(data) == 48
    assert data.documents(np.array([0])).tolist() == [0]
    assert data.documents(np.array([1])).tolist() == [0, 1]  # tokens 8 to 16 of documents of 10
    assert data.documents(np.array([47, 12])).tolist() == [9, 10, 37, 38]
    assert data.documents(np.array([], np.int64)).tolist() == []
    with pytest.raises(IndexError):
        data.documents(np.array([48]))


def test_k_bad_batches_in_a_row_go_back_and_are_passed_over(tmp_path: Path, ranks: Ranks, data: Windows) -> None:
    guard = guard_of(tmp_path, ranks, data)
    checkpoint(guard.run, 4, position=6)
    said = "at step 6 the batches at positions 7–9 gave no finite gradient"
    with pytest.raises(RestartRequested, match=said) as again:
        train(guard, Clock(), {2, 3, 7, 8, 9}, 20)
    assert "going back to the checkpoint of step 4 and passing over the batches at positions 7–9" in str(again.value)
    assert read_adaptations(guard.run) == Adaptations(passed_over=(7, 8, 9), returns=1, from_step=4)
    events = lines(guard.run.events)
    assert [e["kind"] for e in events] == ["skipped"] * 5 + ["went back"]
    documents = data.documents(
        np.concatenate([windows_at(p, batch=2, windows=48, seed=guard.config.seed) for p in (7, 8, 9)])
    )
    assert events[-1]["detail"]["positions"] == [7, 8, 9]
    assert events[-1]["detail"]["documents"] == documents.tolist()
    assert events[-1]["detail"]["documents_in_all"] == len(documents) <= MOST_NAMED
    assert f"documents {documents[0]}, {documents[1]}, " in events[-1]["message"]

    again = guard_of(tmp_path, ranks, data)
    assert train(again, Clock(4, 6), {7, 8, 9}, 20) == Clock(4 + 14 - 3, 20)


@pytest.mark.parametrize(("step", "first"), [(0, 0), (3, 3)])
def test_the_second_time_it_passes_over_what_led_there_too(
    step: int, first: int, tmp_path: Path, ranks: Ranks, data: Windows
) -> None:
    """Weights that an update spoilt are spoilt again where only the batches after it are passed over."""
    run = guard_of(tmp_path, ranks, data).run
    if step:
        checkpoint(run, step, position=first)
    for passed in (range(7, 10), range(4, 13), range(first, 16)):
        with pytest.raises(RestartRequested):
            train(guard_of(tmp_path, ranks, data), Clock(step, first), set(range(7, 100)), 60)
        assert read_adaptations(run).passed_over == tuple(passed)
    assert read_adaptations(run) == Adaptations(passed_over=tuple(range(first, 16)), returns=3, from_step=step)
    with pytest.raises(VernierError, match=r"after training had gone back to .* 3 times; lower optimizer\.lr") as end:
        train(guard_of(tmp_path, ranks, data), Clock(step, first), set(range(7, 100)), 60)
    assert not isinstance(end.value, RestartRequested)
    assert read_adaptations(run).returns == 3


def test_going_back_with_a_newer_checkpoint_counts_anew(tmp_path: Path, ranks: Ranks, data: Windows) -> None:
    run = guard_of(tmp_path, ranks, data).run
    write_adaptations(run, Adaptations(micro=1, passed_over=(1,), returns=3, from_step=2))
    checkpoint(run, 3, position=4)
    with pytest.raises(RestartRequested):
        train(guard_of(tmp_path, ranks, data, "guards.non_finite=1"), Clock(3, 4), {5}, 20)
    assert read_adaptations(run) == Adaptations(micro=1, passed_over=(1, 5), returns=1, from_step=3)


def test_in_fp16_only_a_loss_that_is_not_finite_counts(tmp_path: Path, ranks: Ranks, data: Windows) -> None:
    guard = guard_of(tmp_path, ranks, data)
    guard.config = guard.config.model_copy(update={"precision": "fp16"})
    for idle in range(1, 100):
        guard.after(False, Clock(0, idle, 0, idle), NOTHING)
    with pytest.raises(VernierError, match=r"100 batches in a row.*lower optimizer\.lr"):
        guard.after(False, Clock(0, 100, 0, 100), NOTHING)
    for idle in (1, 2):
        guard.after(False, Clock(0, idle, 0, idle), NOTHING + math.nan)
    with pytest.raises(RestartRequested):
        guard.after(False, Clock(0, 3, 0, 3), NOTHING + math.inf)


def test_by_default_a_spike_is_told_and_its_update_made(tmp_path: Path, ranks: Ranks, data: Windows) -> None:
    guard = guard_of(tmp_path, ranks, data, losses=noisy(40))
    assert not guard.refuses(Clock(40, 41), NOTHING + 300, 1, None)
    guard.after(True, Clock(41, 42), NOTHING + 300)
    for step, loss in ((41, 300.0), (42, 3.0), (43, 1.0)):
        guard.on_step_end({"step": step, "position": step, "loss": loss})
    (event,) = lines(guard.run.events)
    assert (event["kind"], event["step"]) == ("spike", 41)
    assert event["message"].startswith("step 41: the loss 300 is ")
    assert "of the last 40 updates (batch 41, document" in event["message"]
    assert event["detail"]["position"] == 41
    assert event["detail"]["z"] > 1000
    assert event["detail"]["documents"]


def test_without_a_threshold_nothing_is_looked_for(tmp_path: Path, ranks: Ranks, data: Windows) -> None:
    guard = guard_of(tmp_path, ranks, data, "guards.spike_z=null", "guards.on_spike=skip", losses=noisy(40))
    assert not guard.refuses(Clock(40, 40), NOTHING + 1e9, 1, None)
    guard.on_step_end({"step": 41, "position": 40, "loss": 1e9})
    assert not guard.run.events.exists()


SKIP = ("guards.on_spike=skip", "guards.spike_steps=16")


def decisions(guard: Guard, clock: Clock, batches: list[float]) -> tuple[list[bool], Clock, list[float]]:
    """(which updates are made, the clock, the losses of those)."""
    made, losses = [], []
    for loss in batches:
        refused = guard.refuses(clock, NOTHING + 4 * loss, 4, None)
        clock = Clock(clock.step + (not refused), clock.position + 1, 0, clock.idle + 1 if refused else 0)
        guard.after(not refused, clock, NOTHING + 4 * loss)
        made.append(not refused)
        if not refused:
            losses.append(guard.measured["loss"])
    return made, clock, losses


def test_a_spike_is_skipped_where_asked_for(tmp_path: Path, ranks: Ranks, data: Windows) -> None:
    guard = guard_of(tmp_path, ranks, data, *SKIP)
    made, clock, losses = decisions(guard, Clock(), [*noisy(20), 300.0, 3.0])
    assert made == [True] * 20 + [False, True]
    assert clock == Clock(21, 22)
    assert losses == [*noisy(20), 3.0]
    (event,) = lines(guard.run.events)
    assert "no update was made with it" in event["message"]
    assert (event["step"], event["detail"]["position"]) == (21, 20)


def test_losses_that_stay_high_are_a_new_level_after_a_quarter_of_the_steps(
    tmp_path: Path, ranks: Ranks, data: Windows
) -> None:
    made, _, _ = decisions(guard_of(tmp_path, ranks, data, *SKIP), Clock(), [*noisy(20), *[9.0] * 12, 3.0, 90.0])
    assert made == [True] * 20 + [False] * 4 + [True] * 9 + [False]


def test_going_on_anywhere_gives_the_same_decisions(tmp_path: Path, ranks: Ranks, data: Windows) -> None:
    draw = np.random.default_rng(5)
    batches = [loss * 50 if draw.random() < 0.3 else loss for loss in noisy(80)]
    batches[40:50] = [20.0] * 10
    whole, _, _ = decisions(guard_of(tmp_path, ranks, data, *SKIP), Clock(), batches)
    assert 10 < whole.count(False) < 40
    for cut in range(1, 80, 3):
        run = RunDir(tmp_path / "run")
        first, clock, losses = decisions(guard_of(tmp_path, ranks, data, *SKIP), Clock(), batches[:cut])
        run.metrics.write_text("".join(json.dumps({"step": i + 1, "loss": x}) + "\n" for i, x in enumerate(losses)))
        with open(run.metrics, "a") as file:
            file.write(json.dumps({"step": clock.step + 1, "loss": 77.0}) + "\n")  # written after the checkpoint
        known = recent_losses(run, ranks, clock.step, 16)
        assert known == losses[-17:]
        rest, _, _ = decisions(guard_of(tmp_path, ranks, data, *SKIP, losses=known), clock, batches[cut:])
        assert first + rest == whole, cut


# Faults that the environment asks for
