"""Saving in the background: training waits for the copy and for nothing else, whatever becomes of the save."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from configs.errors import VernierError
from eval.distributed.ranks import Ranks
from trainer.checkpoint.async_save import HostCopy, NotCurrent, Saver
from trainer.checkpoint.collective_write import SaveFailed


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, torch.device("cpu"), dist.new_group(backend="gloo"))
    dist.destroy_process_group()


def saver_of(ranks: Ranks, **given) -> Saver:
    settings = {
        "background": True,
        "check_current": lambda: None,
        "tell": lambda *words: None,
        "given_up": lambda: None,
    }
    return Saver(ranks, **(settings | given))


def filled(memory: HostCopy, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    state = torch.full((1000,), value)
    memory.refill(1, state.nbytes)
    place = memory.take(state, torch.float32, later=True)
    memory.seal()
    return state, place


def test_an_update_waits_for_the_copy_and_not_for_the_write(alone: Ranks) -> None:
    saver, memory = saver_of(alone), HostCopy()
    state, place = filled(memory, 1.0)
    written, may_end = [], threading.Event()

    def write(_: Ranks) -> None:
        may_end.wait(30)
        written.append(place.clone())

    saver.submit([write], [memory], lambda good: None)
    memory.wait_until_taken()
    assert not written
    state.fill_(2.0)  # the update
    may_end.set()
    saver.wait()
    assert torch.equal(written[0], torch.ones(1000))


def test_a_save_that_fails_lets_training_go_on_and_the_next_job_too(alone: Ranks) -> None:
    told, given_up, done, ends = [], [], [], []
    saver = saver_of(alone, tell=lambda *words: told.append(words), given_up=lambda: given_up.append(True))

    def fails(_: Ranks) -> None:
        raise SaveFailed("rank 0: no room")

    for turn in (1, 2):
        memory = HostCopy()
        filled(memory, 1.0)
        saver.submit([fails, lambda _, turn=turn: done.append(turn)], [memory], ends.append)
        memory.wait_until_taken()
        saver.wait()
        assert saver.failed == turn
    assert told == [("rank 0: no room", last, turn == 2) for turn in (1, 2) for last in (False, True)]
    assert given_up == [True]
    assert done == [1, 2]
    assert ends == [False, False]
    saver.submit([], [], ends.append)
    saver.wait()
    assert saver.failed == 0


def test_an_attempt_that_has_lost_its_run_writes_nothing_and_hears_of_it_before_its_next_update(alone: Ranks) -> None:
    def lost() -> None:
        raise VernierError("attempt 1 is no longer current")

    saver, memory, done = saver_of(alone, check_current=lost), HostCopy(), []
    filled(memory, 1.0)
    saver.submit([done.append], [memory], lambda good: None)
    memory.wait_until_taken()
    deadline = time.monotonic() + 30
    while saver.error is None and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(NotCurrent, match="no longer current"):
        saver.check()
    assert not done
