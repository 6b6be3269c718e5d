"""What is a hang, which rank is named for it, and in which words. Real ranks that hang are in test_watchdog."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from trainer.faults.hang_verdict import Hang, LastSeen, hang_of_store, judge, seen
from trainer.faults.heartbeat import Heard, Heartbeat, Said, Stack, StoreClient

HANG_S = 100.0  # a rank is silent after 25 s
NOW = 1000.0
WAITS = Stack("in all_reduce\n", "torch/distributed.py:1 (all_reduce): work.wait()", waits=True)
SLEEPS = Stack("in data\n", "data.py:7 (read): time.sleep(1)", waits=False)


def rank(number: int, **facts: Any) -> Heartbeat:
    """One that has waited for the others for long enough, unless told otherwise."""
    waiting = Heartbeat(number, NOW, "node", 100 + number, 5, "step", rests=False, still_s=120.0, stack=WAITS)
    return replace(waiting, **facts)


def verdict(own: Heartbeat, *others: Heartbeat | tuple[int, float, Heartbeat | None]) -> Hang | None:
    """Others were heard just now, or so many seconds ago: (rank, seconds, last heartbeat)."""
    heard = {}
    for other in others:
        if isinstance(other, Heartbeat):
            heard[other.rank] = LastSeen(NOW, other)
        else:
            number, quiet_s, last = other
            heard[number] = LastSeen(NOW - quiet_s, last)
    return judge(NOW, own, heard, HANG_S)


MOVES = {"still_s": 2.0, "stack": None}
SCORES = {"rests": True, "doing": "scoring", "stack": None}


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param([rank(0, still_s=99.0), rank(1)], id="not for long enough"),
        pytest.param([rank(0), rank(1, **MOVES)], id="another one is slow"),
        pytest.param([rank(0), rank(1, still_s=49.0)], id="another one made a step within half the time"),
        pytest.param([rank(0), rank(1), rank(2, **SCORES)], id="another one scores"),
        pytest.param([rank(0, **SCORES), rank(1, stack=SLEEPS)], id="the judge itself scores"),
        pytest.param([rank(0), (1, 20.0, rank(1, **MOVES))], id="another one may be frozen, or its sign late"),
        pytest.param([rank(0), (1, 20.0, None)], id="another one may not have begun"),
        pytest.param([rank(0, **MOVES), (1, 99.0, rank(1))], id="one is frozen, and nobody waits for it yet"),
        pytest.param([rank(0), rank(1, **SCORES), (2, 99.0, rank(2))], id="one is frozen while another one scores"),
    ],
)
def test_it_is_no_hang_where_somebody_is_at_work_or_may_be(ranks: list[Any]) -> None:
    assert verdict(*ranks) is None


WAITING = "rank 0 waits at step 5, in torch/distributed.py:1 (all_reduce): work.wait()"


@pytest.mark.parametrize(
    ("ranks", "culprits", "words", "stacks"),
    [
        pytest.param(
            [rank(0, stack=SLEEPS)],
            [0],
            "rank 0 (host node, pid 100) hangs: no progress for 120 s, at step 5, doing step; "
            "it is in data.py:7 (read): time.sleep(1)",
            [0],
            id="alone",
        ),
        pytest.param(
            [rank(0), rank(1), rank(2, stack=SLEEPS, still_s=110.0, doing="data")],
            [2],
            "rank 2 (host node, pid 102) hangs: no progress for 110 s, at step 5, doing data; "
            "it is in data.py:7 (read): time.sleep(1)",
            [2, 0, 1],
            id="one does not wait for the others",
        ),
        pytest.param(
            [rank(0), rank(1, stack=None)],
            [1],
            "rank 1 (host node, pid 101) hangs: no progress for 120 s, at step 5, doing step; it gave no stack",
            [0],
            id="one gives no stack",
        ),
        pytest.param(
            [rank(0), *(rank(number, step=4) for number in range(1, 10)), rank(10)],
            [*range(1, 10)],
            "rank 1 (host node, pid 101) hangs: no progress for 120 s, at step 4, doing step; "
            "it is in torch/distributed.py:1 (all_reduce): work.wait(); so do ranks 2, 3, 4, 5, 6, 7 and 2 more",
            [*range(1, 10), 0, 10],
            id="all wait and some are behind",
        ),
        pytest.param(
            [rank(1), rank(0), rank(2, ended=True)],
            [0, 1],
            "all ranks hang and none stands out; rank 0 (host node, pid 100): no progress for 120 s, at step 5, "
            "doing step; it is in torch/distributed.py:1 (all_reduce): work.wait(); rank 2 had ended",
            [0, 1],
            id="all wait at the same step and one had ended",
        ),
        pytest.param(
            [rank(0), (1, 25.0, rank(1, time=NOW - 110.0, **MOVES)), rank(2)],
            [1],
            "rank 1 (host node, pid 101) does not answer: its process is frozen or gone, so it gives no stack; "
            f"its last sign was 110 s ago, at step 5, doing step; {WAITING}",
            [0, 2],
            id="one is silent",
        ),
        pytest.param(
            [rank(1, stack=SLEEPS), rank(0), *((number, 30.0, None) for number in (2, 3))],
            [2, 3],
            "rank 2 does not answer: its process is frozen or gone, so it gives no stack; "
            f"it has given no sign since the start; neither do rank 3; {WAITING}",
            [0, 1],
            id="two never said a word",
        ),
        pytest.param(
            [rank(0, rests=True, doing="saving"), (1, 100.0, rank(1, time=NOW - 100.0, **SCORES))],
            [1],
            "rank 1 (host node, pid 101) does not answer: its process is frozen or gone, so it gives no stack; "
            f"its last sign was 100 s ago, at step 5, doing scoring; {WAITING}",
            [0],
            id="one froze for as long as a hang while all could rest",
        ),
    ],
)
def test_the_culprit_of_a_hang_is_named(ranks: list[Any], culprits: list[int], words: str, stacks: list[int]) -> None:
    hang = verdict(*ranks)
    assert hang is not None
    assert hang.words == words
    assert hang.culprits == culprits
    assert list(hang.stacks) == stacks  # what matters most first: an event shows eight


@pytest.mark.parametrize(("holder", "culprit"), [(0, 0), (None, 2)])
def test_a_store_that_does_not_answer_is_blamed_on_who_holds_it(holder: int | None, culprit: int) -> None:
    hang = hang_of_store(rank(2), "node:29500", holder)
    whose = "rank 0, which holds it," if holder == 0 else "its host, or torchrun there,"
    assert hang.words.startswith(f"the store that joins the ranks (node:29500) does not answer: {whose} is frozen or")
    assert "; rank 2 (host node, pid 102): no progress for 120 s, at step 5" in hang.words
    assert hang.culprits == [culprit]


def test_a_rank_that_says_the_same_again_is_silent() -> None:
    first = seen({}, {1: rank(1), 2: None, 3: rank(3)}, 10.0)
    then = seen(first, {1: rank(1), 2: None, 3: rank(3, time=NOW + 1)}, 20.0)
    assert {number: one.since for number, one in then.items()} == {1: 10.0, 2: 10.0, 3: 20.0}
    back = seen(then, {1: None, 2: rank(2)}, 30.0)
    assert back == {1: LastSeen(10.0, rank(1)), 2: LastSeen(30.0, rank(2))}


def test_one_rank_at_a_time_is_the_teller_and_only_it_reads_what_all_say() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [StoreClient("127.0.0.1", store.port, 1, number, 4) for number in range(3)]  # rank 3 has not begun
    for client in clients:
        client.start()

    def say(number: int, **wish: Any) -> Heard:
        clients[number].out.put(Said(rank(number), **wish))
        heard = clients[number].answers.get(timeout=30)
        assert heard is not None
        return heard

    assert [say(number) for number in range(3)] == [Heard(told=False)] * 3
    assert say(2, looks=True) == Heard(told=False, teller=0, beats={0: rank(0)})
    assert say(0, looks=True) == Heard(told=False, teller=0, beats={1: rank(1), 2: rank(2), 3: None})
    with ThreadPoolExecutor() as pool:  # both notice that rank 0 is silent
        tellers = {heard.teller for heard in pool.map(lambda number: say(number, looks=True, follows=0), (1, 2))}
    assert len(tellers) == 1
    teller = tellers.pop()
    assert teller in (1, 2)
    assert set(say(teller, looks=True).beats) == {0, 1, 2, 3} - {teller}
    assert set(say(0, looks=True).beats) == {teller}  # it came back, too late to judge
    say(teller, tells=True)
    assert say(0).told
    for client in clients:
        client.out.put(None)
        client.join(timeout=30)
        assert not client.is_alive()
