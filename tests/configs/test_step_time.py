"""The model of step times: its formulas against the papers', and what it does over ranks."""

from __future__ import annotations

import pytest

from configs.memory.step_time import GB, Links, Work, sent_a_step, step_time

WORK = Work(parameters=1_000_000, layers=10, attention=512, sequence_length=128)


def seconds(**changed: object) -> float:
    asked: dict = {
        "parameters": 1_000_000,
        "stage": 2,
        "ranks": 4,
        "tokens": 4096,
        "accumulation": 1,
        "weight_bytes": 2,
        "bucket": 500_000_000,
        "flops": 1e12,
        "links": Links(4, 100 * GB, 10 * GB, 0.0),
    }
    return step_time(WORK, **(asked | changed)).total_s


def test_flops_a_token_are_those_of_the_palm_paper() -> None:
    assert WORK.flops_a_token == 6 * 1_000_000 + 12 * 10 * 512 * 128


def test_volumes_are_those_of_the_zero_paper() -> None:
    def sent(stage: int, accumulation: int = 1) -> int:
        return sent_a_step(1000, stage=stage, accumulation=accumulation, weight_bytes=2)

    assert [sent(stage) for stage in (0, 1, 2, 3)] == [4000, 4000, 4000, 6000]
    # A micro-batch more: stage 2 scatters its gradients, stage 3 gathers its weights twice besides.
    assert [sent(stage, 4) for stage in (0, 1, 2, 3)] == [4000, 4000, 10_000, 24_000]


def test_one_rank_sends_nothing_and_more_ranks_compute_less_each() -> None:
    alone = step_time(
        WORK,
        parameters=10**6,
        stage=0,
        ranks=1,
        tokens=4096,
        accumulation=1,
        weight_bytes=2,
        bucket=10**6,
        flops=1e12,
        links=Links(),
    )
    assert alone.communication_s == 0
    assert alone.compute_s == pytest.approx(4096 * WORK.flops_a_token / 1e12)
    assert seconds() == pytest.approx(alone.compute_s / 4 + 4e6 * 3 / 4 / 100e9)


def test_between_nodes_the_slower_link_counts_and_each_hop_takes_its_time() -> None:
    near, far = seconds(ranks=4), seconds(ranks=8)
    assert far > near / 2  # half the computing, but ten times as long on the way
    assert far - seconds(ranks=8, links=Links(4, 100 * GB, 20 * GB, 0.0)) == pytest.approx(4e6 * 7 / 8 * (1 / 2e10))
    late = Links(4, 100 * GB, 10 * GB, 1e-3)
    assert seconds(ranks=8, links=late) - far == pytest.approx(2 * 7 * 1e-3)  # a bucket, there and back
    assert seconds(ranks=8, links=late, bucket=250_000) - far == pytest.approx(4 * 2 * 7 * 1e-3)


def test_stage_3_sends_beside_its_computing_and_checkpointing_computes_a_third_more() -> None:
    slow, quick = Links(4, 0.1 * GB, 1 * GB, 0.0), Links(4, 1e6 * GB, 1 * GB, 0.0)
    assert seconds(stage=3, links=slow) == pytest.approx(6e6 * 3 / 4 / 1e8)
    assert seconds(stage=3, links=quick) == pytest.approx(4096 * WORK.flops_a_token / 4 / 1e12)
    again = seconds(stage=3, links=quick, checkpointing=True)
    assert again / seconds(stage=3, links=quick) == pytest.approx(4 / 3)
