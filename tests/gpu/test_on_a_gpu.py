"""What only a GPU can show: NCCL, fp16 with its loss scale, bf16 scoring, offload. `make gpu-test`."""

from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, lines, losses, table_of, vernier

from configs.devices import gpu_count
from eval.tables import read_table

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu_count() == 0, reason="no GPU is visible (make gpu-test)")]


def train(run: Path, data: Path, *settings: str) -> Path:
    vernier("train", TINY, f"data.dir={data}", f"run.dir={run}", "nproc=1", "deterministic=true", *settings)
    return run


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp", "fp16"])
def test_every_stage_and_precision_trains_under_nccl(
    stage: int, precision: str, tiny_data: Path, tmp_path: Path
) -> None:
    settings = [f"zero.stage={stage}", f"precision={precision}", "optimizer.lr=2e-3"]
    found = losses(train(tmp_path / "run", tiny_data, *settings))
    assert found[-1] < 0.9 * found[0]


def test_an_fp16_overflow_uses_up_a_batch_and_makes_no_step(tiny_data: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", tiny_data, "precision=fp16", "deepspeed={fp16: {initial_scale_power: 32}}")
    skipped = [e for e in lines(run / "events.jsonl") if e["kind"] == "skipped"]
    found = lines(run / "metrics.jsonl")
    assert skipped
    assert [line["step"] for line in found] == list(range(1, 21))
    assert found[-1]["position"] == 19 + len(skipped)


def test_offload_agrees_with_training_on_the_device(tiny_data: Path, tmp_path: Path) -> None:
    plain = losses(train(tmp_path / "plain", tiny_data, "precision=fp32"))
    offloaded = losses(train(tmp_path / "offload", tiny_data, "precision=fp32", "zero.offload=cpu"))
    assert np.max(np.abs(np.array(plain) / np.array(offloaded) - 1)) < 1e-4


def test_scoring_in_bf16_again_gives_the_same_bits(tiny_data: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", tiny_data, "precision=bf16")
    model = run / "snapshots" / "step-00000020"
    vernier("eval", model, "--reference", tiny_data / "reference", "--out", tmp_path)
    (path,) = tmp_path.glob("*.parquet")
    assert np.array_equal(read_table(path).loss, read_table(table_of(run, 20)).loss)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sharded_weights_give_the_same_losses_under_nccl(dtype: str, tiny_data: Path, tmp_path: Path) -> None:
    model = train(tmp_path / "run", tiny_data, "precision=fp32") / "snapshots" / "step-00000020"
    found = {}
    for weights in ("replicated", "sharded"):
        options = ["--dtype", dtype, "--weights", weights, "--out", tmp_path / weights]
        vernier("eval", model, "--reference", tiny_data / "reference", *options)
        found[weights] = read_table(next((tmp_path / weights).glob("*.parquet"))).loss
    np.testing.assert_allclose(found["sharded"], found["replicated"], rtol=1e-5 if dtype == "fp32" else 1e-2)


def test_the_moving_average_is_kept_on_the_device_and_goes_on(tiny_data: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", tiny_data, "precision=bf16", "zero.stage=3", "ema.decay=0.9")
    assert (run / "ema" / "step-00000020" / "manifest.json").is_file()


def test_two_runs_are_the_same_bits_when_deterministic(tiny_data: Path, tmp_path: Path) -> None:
    first, second = (losses(train(tmp_path / name, tiny_data, "precision=bf16")) for name in "ab")
    assert first == second


def test_a_save_in_the_background_leads_to_the_same_bits(tiny_data: Path, tmp_path: Path) -> None:
    settings = ["precision=bf16", "zero.stage=3", "checkpoint.every=3", "checkpoint.keep=99", "snapshot.every=5"]
    for background in ("true", "false"):
        train(tmp_path / background, tiny_data, *settings, f"checkpoint.background={background}")
    assert losses(tmp_path / "true") == losses(tmp_path / "false")
    for step in (3, 12, 20):  # what was copied while the next step ran is what stood there before it
        files = [tmp_path / name / "checkpoints" / f"step-{step:08d}" for name in ("true", "false")]
        a, b = (file / "rank-00000.safetensors" for file in files)
        assert a.read_bytes() == b.read_bytes()


def test_dropout_does_not_depend_on_the_micro_batch(tiny_data: Path, tmp_path: Path) -> None:
    settings = ["precision=fp32", "model.attention_dropout=0.2"]
    found = [losses(train(tmp_path / micro, tiny_data, *settings, f"batch.micro={micro}")) for micro in ("16", "4")]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_forked_ranks_come_from_a_process_without_cuda_and_train_as_execd_ones_do(
    tiny_data: Path, tmp_path: Path
) -> None:
    runs = [train(tmp_path / start, tiny_data, f"launch.start={start}") for start in ("fork", "exec")]
    told = [(run / "logs" / "torchrun.log").read_text() for run in runs]
    assert "not forked" not in told[0]  # CUDA was not touched before the fork
    assert "not forked: --start is exec" in told[1]
    assert losses(runs[0]) == losses(runs[1])
    for step in (0, 10, 20):
        assert table_of(runs[0], step).read_bytes() == table_of(runs[1], step).read_bytes()
