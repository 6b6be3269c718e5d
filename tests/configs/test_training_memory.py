"""The memory of a rank at its fullest moment: what its parts add up to, and how they hang on the settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.memory.training import GAPS, LARGE_BLOCK, NOTHING, Activations, Job, Tensors, host_beside_gpu, rank_memory

MIB = 1 << 20
COUNT = 100 * MIB  # parameters
PASS = Activations(
    layers=300 * MIB,
    logits=50 * MIB,
    working=10 * MIB,
    with_gradients=500 * MIB,
    loose=360 * MIB,
    loose_with_gradients=500 * MIB,
)


def job(stage: int, ranks: int = 4, **changed: object) -> Job:
    asked: dict = {"precision": "bf16", "accumulation": 1, "on_gpu": True, "activations": NOTHING}
    tensors = Tensors(COUNT, COUNT // 10, 1.0)
    return Job(tensors, stage=stage, ranks=ranks, **(asked | changed))


def gpu(stage: int, ranks: int = 4, **changed: object) -> int:
    return rank_memory(job(stage, ranks, **changed)).own


def test_of_tensors_only_those_below_the_block_are_loose() -> None:
    found = Tensors.of([LARGE_BLOCK // 4, LARGE_BLOCK // 4 - 1, 1])
    assert (found.parameters, found.largest) == (LARGE_BLOCK // 2, LARGE_BLOCK // 4)
    assert found.loose == pytest.approx(0.5)


def test_on_a_gpu_it_is_the_fullest_moment() -> None:
    part = COUNT // 4
    # 16-bit weights and gradients, masters and moments; then the update's gradients in fp32.
    assert gpu(0) == 2 * COUNT + 12 * COUNT + 2 * COUNT + 4 * COUNT
    # Weights, what this rank updates; its gradients, the bucket, and of that what goes to one rank.
    assert gpu(2) == 2 * COUNT + 12 * part + 2 * part + (2 * COUNT + 2 * part)
    # A bucket, and a second one in which it is sent.
    assert gpu(3) == 2 * part + 12 * part + 2 * part + 2 * 2 * COUNT
    for stage in (0, 1, 2, 3):
        found = rank_memory(job(stage))
        assert found.own == max(moment.total for moment in found.moments) + found.at_work
        assert found.total == found.own + found.fixed


def test_at_stage_3_a_module_s_own_parameters_are_whole_together() -> None:
    count, experts = 20 * 10**9, 16 * 10**8  # in two tensors, as experts' are
    few, many = (Tensors(count, experts // 2, 1.0, largest) for largest in (0, experts))
    needed = [rank_memory(replace(job(3, 1024), tensors=one)) for one in (few, many)]
    assert (few.at_once, many.at_once) == (10**9, experts)
    assert needed[1].own - needed[0].own == 2 * (experts - 10**9)
    assert Tensors(count, 2 * experts).at_once == 2 * experts
    assert Tensors(10, 5).at_once == 10


def test_more_ranks_and_higher_stages_take_less_and_accumulation_more() -> None:
    for stage in (1, 2, 3):
        held = [gpu(stage, ranks) for ranks in (2, 8, 64, 1024)]
        assert held == sorted(held, reverse=True)
        assert held[0] < gpu(0, 2)
        assert gpu(stage, accumulation=4, activations=PASS) >= gpu(stage, activations=PASS)
    assert gpu(2, offload=True) < gpu(2)
    assert host_beside_gpu(job(2, offload=True)) > host_beside_gpu(job(2))
    assert gpu(2, average=True) == gpu(2) + COUNT
    assert gpu(2, bucket_asked=10 * MIB) < gpu(2)


def test_activations_and_logits_are_in_the_backward_pass() -> None:
    found = rank_memory(job(2, 1024, activations=replace(PASS, layers=4000 * MIB)))
    assert found.moment == "in the backward pass"
    assert (found.parts["activations"], found.parts["logits"]) == (4010 * MIB, 50 * MIB)


def test_on_cpu_the_heap_of_small_blocks_keeps_its_largest_size() -> None:
    asked = job(2, precision="fp32", on_gpu=False, activations=PASS, saving=7, saving_at_end=9 * MIB)
    found = rank_memory(asked)
    parts = {name: size for name, size in found.parts.items() if name != "gaps"}
    part = COUNT  # of fp32, four ranks: 4 bytes ÷ 4
    blocks = 4 * COUNT + 3 * part + 7 + part + 4 * COUNT + part
    assert sum(parts.values()) == max(moment.total for moment in found.moments)
    assert sum(found.parts.values()) == blocks + int(GAPS[2] * PASS.loose)
    assert found.own - found.at_work == sum(found.parts.values())


def test_where_the_start_takes_most_that_is_said() -> None:
    found = rank_memory(job(3, 10_000, precision="fp32", on_gpu=False, bucket_asked=MIB))
    assert found.moment.startswith("at the start") is (found.parts.get("start") == found.start)
    assert found.start >= 4 * COUNT
