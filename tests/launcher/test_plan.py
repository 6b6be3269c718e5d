"""`vernier plan`: its arithmetic against the paper's, against what a real run has left on the disk, and as typed."""

from __future__ import annotations

import io
import json
import random
import statistics
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import TINY, vernier
from rich.console import Console
from transformers import AutoModelForCausalLM

from configs.errors import ConfigError
from configs.load import dump_config, load_config, resolve
from configs.memory.saving import (
    checkpoint_bytes,
    checkpoints_kept,
    saving_copy,
    snapshot_bytes,
    snapshots_kept,
    training_state,
)
from configs.memory.scoring import MARGIN
from configs.memory.training import HOST_FIXED
from configs.run.directory import RunDir, step_name
from configs.schema import Config
from launcher.plan.estimate import Given, Plan, machine_memory, make_plan, warnings
from launcher.plan.model import find_model
from launcher.plan.report import print_plan, to_json
from launcher.plan.speed import read_size


def planned(*overrides: str) -> dict[str, Any]:
    config = resolve(load_config(TINY, list(overrides)))
    return dict(json.loads(json.dumps(to_json(make_plan(config, Given(flops=1e12))))))


def told_of(*overrides: str) -> str:
    console = Console(file=io.StringIO(), soft_wrap=True, width=200)
    print_plan(make_plan(resolve(load_config(TINY, list(overrides))), Given(flops=1e12)), console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def stored(directory: Path) -> int:
    """Bytes of the tensors in a directory's safetensors files, their headers left out."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with open(path, "rb") as file:
            (header,) = struct.unpack("<Q", file.read(8))
        total += path.stat().st_size - 8 - header
    return total


def test_stages_of_zero_are_those_of_the_paper() -> None:
    told = []
    for stage in (0, 1, 2, 3):  # figure 1 of Rajbhandari et al.: 7.5 B parameters, 64 ranks, K = 12
        state = training_state(7_500_000_000, precision="fp16", stage=stage, ranks=64)
        told.append(round(state.device / 1e9, 1))
    assert told == [120.0, 31.4, 16.6, 1.9]


def test_full_precision_offloading_and_the_average() -> None:
    state = training_state(1000, precision="fp32", stage=0, ranks=4)
    assert (state.weights, state.gradients, state.optimizer) == (4000, 4000, 8000)
    state = training_state(1000, precision="amp", stage=2, ranks=4, offload=True, average=True)
    assert (state.weights, state.gradients, state.optimizer, state.average) == (4000, 1000, 3000, 1000)
    assert (state.device, state.host) == (4000, 5000)
    copy = saving_copy(1000, dtype="bf16", ranks=4, average=True)
    assert (copy.checkpoint, copy.snapshot, copy.average, copy.most) == (4000, 500, 500, 5000)


def test_checkpoints_and_snapshots_take_what_was_planned(tiny_run: Path, tiny_data: Path) -> None:
    found = planned(f"data.dir={tiny_data}", f"run.dir={tiny_run}")
    run = RunDir(tiny_run)
    assert found["parameters"] == json.loads(run.manifest.read_text())["parameters"]
    assert found["notes"] == []
    for kind, folder in (("checkpoint", run.checkpoints), ("snapshot", run.snapshots)):
        steps = run.whole_steps(folder)
        assert len(steps) == found["disk"][f"{kind}s"]
        for step in steps:
            assert stored(folder / step_name(step)) == pytest.approx(found["disk"][kind], rel=0.05)
    held = [path.stat().st_size for path in (run.checkpoints / step_name(20)).glob("rank-*.safetensors")]
    assert len(held) == found["ranks"]
    assert max(held) == pytest.approx(found["saving_a_rank"]["checkpoint"], rel=0.05)
    with open(run.metrics) as file:
        last = [json.loads(line) for line in file][-1]
    assert (last["tokens"], last["ranks"], last["micro"]) == (found["tokens"], found["ranks"], found["micro"])


def made(steps: int, every: int, at: list[int]) -> list[int]:
    return sorted({*range(every, steps + 1, every), *at, steps})


def test_what_is_kept_is_counted_as_retention_keeps_it() -> None:
    draw = random.Random(1)
    for _ in range(500):
        steps, every, keep = draw.randint(1, 60), draw.randint(1, 20), draw.randint(1, 5)
        keep_every = draw.choice([None, draw.randint(1, 30)])
        at = sorted(draw.sample(range(steps + 1), min(3, steps)))
        asked = {"every": every, "keep_every": keep_every}

        there: list[int] = []
        most = 0
        for step in made(steps, every, []):
            there.append(step)
            most = max(most, len(there))
            there = [s for s in there if s in there[-keep:] or (keep_every and s % keep_every == 0)]
        assert checkpoints_kept(steps, keep=keep, **asked) >= most  # type: ignore[arg-type]
        assert checkpoints_kept(steps, keep=keep, **asked) <= most + 1  # type: ignore[arg-type]

        everything = {0, *made(steps, every, at)}
        assert snapshots_kept(steps, at=at, keep=None, **asked) == len(everything)  # type: ignore[arg-type]
        there, most = [], 0
        best = draw.choice(sorted(everything))
        for step in sorted(everything):
            there.append(step)
            most = max(most, len(there))
            there = [s for s in there if s in (*there[-keep:], best) or (keep_every and s % keep_every == 0)]
        assert most <= snapshots_kept(steps, at=at, keep=keep, **asked) <= most + 3  # type: ignore[arg-type]


def test_before_data_is_prepared_the_vocabulary_is_that_of_the_settings(tmp_path: Path) -> None:
    told = vernier("plan", TINY, f"data.dir={tmp_path / 'none'}").stdout
    assert "is not prepared, so its vocabulary is taken to have 512 entries (data.vocab_size)" in told
    assert "2 ranks × 4 × 2 = 16 windows a step" in told
    assert "1,024 a step; 20 steps: 20,480\n" in told
    assert "written in the background" in told
    asked = [f"data.dir={tmp_path / 'none'}", "model.vocab_size=600", "checkpoint.background=false"]
    found = json.loads(vernier("plan", TINY, *asked, "--json").stdout)
    assert found["notes"] == []
    assert found["saving_a_rank"]["background"] is False


def test_a_model_by_path_is_counted_from_its_files(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    snapshot = tiny_run / "snapshots" / step_name(20)
    settings = [f"data.dir={tiny_data}", f"model={{path: {snapshot}}}"]
    config = resolve(load_config(TINY, settings))
    expected = json.loads((tiny_run / "manifest.json").read_text())["parameters"]
    assert find_model(config, None).parameters == expected
    strange = tmp_path / "strange"
    strange.mkdir()
    described = json.loads((snapshot / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**described, "model_type": "unheard-of"}))
    for path in snapshot.glob("*.safetensors"):
        (strange / path.name).symlink_to(path)
    model = find_model(resolve(load_config(TINY, [settings[0], f"model={{path: {strange}}}"])), None)
    assert (model.name, model.parameters) == ("unheard-of", expected)
    for path in strange.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ConfigError, match="has no safetensors files"):
        find_model(resolve(load_config(TINY, [settings[0], f"model={{path: {strange}}}"])), None)


def test_flops_are_of_the_experts_that_a_token_goes_through(tiny_data: Path) -> None:
    few, all_of_them = (
        make_plan(
            resolve(
                load_config(
                    TINY,
                    [
                        f"data.dir={tiny_data}",
                        "model={type: mixtral, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
                        "num_attention_heads: 4, num_key_value_heads: 2, num_local_experts: 4, "
                        f"num_experts_per_tok: {chosen}}}",
                    ],
                )
            ),
            Given(flops=1e12),
        )
        for chosen in (1, 4)
    )
    assert few.model.parameters == all_of_them.model.parameters == all_of_them.work.parameters
    assert few.work.parameters == few.model.parameters - 2 * 3 * 3 * 32 * 64


def test_what_does_not_fit_is_said_with_the_settings_that_change_it(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("launcher.plan.estimate.machine_memory", lambda: 64 << 30)
    disk = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=256 << 30))
    monkeypatch.setattr("launcher.plan.estimate.shutil", disk)
    large = ["model.hidden_size=16384", "model.num_hidden_layers=4", "model.intermediate_size=65536"]
    told = told_of(f"data.dir={tiny_data}", *large, "ema.decay=0.9")
    memory, disk = (line for line in told.splitlines() if line.startswith("does not fit: "))
    assert "are more than this machine's" in memory
    for setting in ("zero.stage=3 needs", "snapshot.dtype=bf16 needs", "ema.decay=null needs"):
        assert setting in memory
    assert "set checkpoint.keep or snapshot.keep, or another run.dir" in disk
    config = resolve(load_config(TINY, [f"data.dir={tiny_data}"]))
    assert warnings(make_plan(config)) == []


def test_the_memory_of_a_container_is_what_it_may_take(tmp_path: Path) -> None:
    (tmp_path / "max").write_text("max\n")
    assert machine_memory(tmp_path / "max") == psutil.virtual_memory().total
    (tmp_path / "max").write_text("4096\n")
    assert machine_memory(tmp_path / "max") == 4096


def test_wrong_settings_are_refused_in_one_line(tiny_data: Path) -> None:
    told = vernier("plan", TINY, f"data.dir={tiny_data}", "model.hiden_size=3", code=2).stderr
    assert told == "error: model.hiden_size: llama has no such field; did you mean hidden_size?\n"
    told = vernier("plan", TINY, f"data.dir={tiny_data}", "model={type: nemotron}", code=2).stderr
    assert told.startswith("error: model: transformers cannot build type nemotron as a causal LM: ")
    assert told.count("\n") == 1
    assert "batch.global: 15 is not divisible by 2 ranks" in vernier("plan", TINY, "batch.global=15", code=2).stderr


def test_sizes_of_what_is_saved() -> None:
    assert checkpoint_bytes(10) == 120
    assert checkpoint_bytes(10, average=True) == 160
    assert snapshot_bytes(10, "bf16") == 20


def config_of(data: Path, *overrides: str) -> Config:
    return resolve(load_config(TINY, [f"data.dir={data}", *overrides]))


def plan_of(data: Path, *overrides: str, **given: Any) -> Plan:
    return make_plan(config_of(data, *overrides), Given(**({"flops": 1e12} | given)))


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["precision=bf16", "model.num_key_value_heads=4"],
        ["precision=amp", "gradient_checkpointing=true"],
    ],
    ids=["fp32", "bf16", "amp, checkpointed"],
)
def test_activations_are_what_a_real_forward_pass_keeps(tiny_data: Path, settings: list[str]) -> None:
    config = config_of(tiny_data, *settings)
    plan = make_plan(config, Given(flops=1e12))
    assert plan.activations_known
    found = plan.job.activations
    model = AutoModelForCausalLM.from_config(
        plan.model.built.config, dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32
    )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(plan.here.micro, config.sequence_length, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "amp"),
    ):
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    # Beside what is saved there are the output, the ids, positions, and under amp the weights' 16-bit copies.
    assert sum(kept.values()) == pytest.approx(found.layers, rel=0.1, abs=3 * hidden.nbytes)
    logits = ids.numel() * model.config.vocab_size * 4
    assert 2 * logits <= found.logits <= 5 * logits


def test_a_rank_holds_its_parts_and_the_fixed_overhead_is_a_row_of_its_own(tiny_data: Path) -> None:
    found = planned(f"data.dir={tiny_data}")
    peak = found["peak_a_rank"]
    assert peak["own"] == sum(peak["parts"].values()) + peak["at_work"]
    assert peak["total"] == peak["own"] + peak["fixed"]
    assert peak["fixed"] == HOST_FIXED
    assert found["machine"]["needed"] == 2 * peak["total"]
    assert peak["fits"] is True
    told = told_of(f"data.dir={tiny_data}")
    for part in ("weights", "activations", "logits", "process", "total"):
        assert sum(line.split()[:1] == [part] for line in told.splitlines()) == 1


def test_checkpointing_keeps_less_and_a_larger_micro_batch_more(tiny_data: Path) -> None:
    plain, again = (plan_of(tiny_data, f"gradient_checkpointing={on}").job.activations for on in ("false", "true"))
    assert again.layers < plain.layers / 2
    one, four = (plan_of(tiny_data, f"batch.micro={micro}").job.activations for micro in (1, 4))
    assert four.layers == pytest.approx(4 * one.layers, rel=0.1)


def test_the_largest_micro_batch_fits_and_the_next_does_not(tiny_data: Path) -> None:
    wide = ["batch.global=256", "sequence_length=64"]
    needed = {micro: plan_of(tiny_data, *wide, f"batch.micro={micro}").memory.total for micro in (8, 16, 32)}
    assert needed[8] < needed[16] < needed[32]
    room = int((needed[16] + needed[32]) / 2 / (1 - MARGIN))
    assert plan_of(tiny_data, *wide, memory=f"{room}B").largest_micro == 16
    nothing = plan_of(tiny_data, *wide, memory="1MiB")
    assert nothing.largest_micro is None
    assert "are more than the 2.0 MiB that they have; " in warnings(nothing)[0]
    assert "gradient_checkpointing=true needs" in warnings(nothing)[0]
    assert warnings(plan_of(tiny_data, *wide, memory="64GiB")) == []


def test_scaling_goes_over_stages_and_ranks_that_divide_the_batch(tiny_data: Path) -> None:
    found = planned(f"data.dir={tiny_data}", "batch.global=1024")
    assert found["scaling_left_out"] == []
    rows = {(row["ranks"], row["zero_stage"]): row for row in found["scaling"]}
    assert sorted(rows) == [(2**power, stage) for power in range(11) for stage in range(4)]
    assert rows[2, 2]["total"] == found["peak_a_rank"]["total"]
    assert rows[2, 2]["step_s"] == found["time"]["step_s"]
    assert rows[1024, 3]["nodes"] == 512
    assert all(row["ranks"] * row["micro"] * row["accumulation"] == 1024 for row in rows.values())
    for stage in range(4):
        held = [rows[2**power, stage]["own"] for power in range(11)]
        assert held == sorted(held, reverse=True)
    few = planned(f"data.dir={tiny_data}", "batch.global=24")
    assert few["scaling_left_out"] == [16, 32, 64, 128, 256, 512, 1024]


def test_several_nodes_are_the_world_that_is_planned_for(tiny_data: Path) -> None:
    plan = plan_of(tiny_data, "launch.nodes=2", "launch.ranks_per_node=4")
    assert (plan.ranks, plan.ranks_here, plan.here.nodes) == (8, 4, 2)
    assert plan.host_bytes == 4 * plan.memory.total
    with pytest.raises(ConfigError, match=r"batch\.global: 16 is not divisible by 12 ranks"):
        plan_of(tiny_data, "launch.nodes=3", "launch.ranks_per_node=4")
    on_gpus = plan_of(tiny_data, "launch.gpus_per_node=2", "launch.nodes=2", "precision=bf16", memory="80GiB")
    assert on_gpus.on_gpu
    assert on_gpus.memory.at_work == 0


def test_time_is_from_what_is_given_or_from_what_the_run_has_measured(tiny_run: Path, tiny_data: Path) -> None:
    plan = plan_of(tiny_data, flops=1e9)
    assert plan.here.time is not None
    a_token = 6 * plan.model.parameters + 12 * 2 * 48 * 64  # two layers, four heads of 12
    assert plan.work.flops_a_token == a_token
    assert plan.here.time.compute_s == pytest.approx(16 * 64 * a_token / 2 / 1e9)
    measured = make_plan(config_of(tiny_data, f"run.dir={tiny_run}"))
    assert measured.speed is not None
    assert measured.here.time is not None
    assert measured.speed.source.startswith("from 19 steps of ")
    lines = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()][1:]
    rate = statistics.median(line["tokens_per_s"] for line in lines)
    assert measured.here.time.compute_s == pytest.approx(16 * 64 / rate)
    assert measured.here.time.total_s == measured.here.time.compute_s  # what the step sent is in it
    times = {(row.ranks, row.stage): row.time for row in measured.table[0]}
    assert measured.here.time == times[2, 2]
    assert times[4, 2] is not None
    assert times[4, 2].communication_s > 0
    tried = make_plan(config_of(tiny_data))
    assert tried.speed is not None
    assert "of what a multiplication does here on 1 CPU threads" in tried.speed.source


def test_a_checkpointed_run_takes_as_long_as_it_has_taken(tmp_path: Path, tiny_data: Path) -> None:
    settings = [f"run.dir={tmp_path}", "gradient_checkpointing=true"]
    config = config_of(tiny_data, *settings)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    rows = [{"step": step, "tokens_per_s": 1000.0, "ranks": 2} for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = make_plan(config)
    assert plan.here.time is not None
    assert plan.here.time.total_s == pytest.approx(1.024)
    without = make_plan(config_of(tiny_data, settings[0]))
    assert without.here.time is not None
    assert without.here.time.total_s == pytest.approx(1.024 * 3 / 4)


def test_where_nothing_can_be_tried_the_plan_has_no_time(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones

    def full(*shape: Any, **options: Any) -> torch.Tensor:
        if len(shape) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ones(*shape, **options)

    monkeypatch.setattr(torch, "ones", full)
    console = Console(file=io.StringIO(), soft_wrap=True, width=200)
    plan = make_plan(config_of(tiny_data))
    print_plan(plan, console)
    assert plan.speed is None
    assert "cannot be tried here, say --flops" in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_is_given_wrongly_is_refused(tiny_data: Path) -> None:
    assert [read_size(text, "--memory") for text in ("80GiB", "1.5k", "2MB", "7", "4 G")] == [
        80 << 30,
        1500,
        2_000_000,
        7,
        4_000_000_000,
    ]
    for wrong in ("lots", "", "-1G", "3XB"):
        with pytest.raises(ConfigError, match=r"--memory: .* expected a size such as 80GiB"):
            plan_of(tiny_data, memory=wrong)
    with pytest.raises(ConfigError, match=r"--flops: -1\.0; expected"):
        plan_of(tiny_data, flops=-1.0)
    with pytest.raises(ConfigError, match=r"--bandwidth: 0\.0; expected GB/s"):
        plan_of(tiny_data, bandwidth=0.0)
