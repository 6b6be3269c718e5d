"""Settings: what a user writes is read, and what is wrong with it is said in a line each."""

import os
from pathlib import Path

import pytest

from configs import ConfigError, dump_config, load_config, resolve
from configs.load import differences, micro_batch


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problem(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", overrides)
    return str(caught.value)


@pytest.mark.parametrize("recipe", ["demo", "wsb"])
def test_shipped_recipes_load(recipe: str) -> None:
    assert load_config(recipe).name == recipe


def test_the_resolved_config_reads_back_to_the_same_settings(tmp_path: Path) -> None:
    config = resolve(load_config("demo", ["optimizer.lr=3e-4", "snapshot.at=[3,4]"]))
    again = load_config(write(tmp_path, dump_config(config)))
    assert again == config
    assert resolve(again) == config


def test_overrides_are_read_as_yaml_numbers() -> None:
    config = load_config("demo", ["optimizer.lr=3e-4", "snapshot.at=[1, 2]", "optimizer.betas=[0.8,0.9]"])
    assert config.optimizer.lr == 3e-4
    assert config.snapshot.at == [1, 2]
    assert config.optimizer.betas == (0.8, 0.9)


def test_extends_merges_over_the_recipe_beneath(tmp_path: Path) -> None:
    base = write(tmp_path, "extends: demo\noptimizer: {lr: 0.5}\n", "base.yaml")
    config = load_config(write(tmp_path, f"extends: {base.name}\nsteps: 300\noptimizer: {{eps: 1.0e-6}}\n"))
    assert (config.name, config.steps, config.optimizer.lr, config.optimizer.eps) == ("demo", 300, 0.5, 1e-6)


def test_another_kind_of_model_takes_the_place_of_the_one_beneath(tmp_path: Path) -> None:
    assert load_config("demo", ["model={path: runs/a}"]).model.fields == {}
    assert load_config("demo", ["model={type: gpt2}", "model.n_embd=48"]).model.fields == {"n_embd": 48}
    assert load_config("demo", ["model.hidden_size=64"]).model.fields["num_hidden_layers"] == 4
    own = write(tmp_path, "extends: demo\nmodel: {type: gpt2, n_embd: 48}\n")
    assert load_config(own).model.fields == {"n_embd": 48}


def test_extends_in_a_circle_is_said(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    path = write(tmp_path, "extends: a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(path)


def test_a_section_with_all_its_lines_commented_out_means_its_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "extends: demo\nrun:\n  # dir: x\n")).run.dir is None


def test_such_a_section_throws_nothing_away_that_the_recipe_beneath_sets(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "extends: demo\noptimizer:\n  # lr: 1\nmodel:\n"))
    assert config.optimizer == load_config("demo").optimizer
    assert config.model == load_config("demo").model


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizr.lr=1", "optimizr: unknown key; did you mean optimizer?"),
        ("optimizer.lrr=1", "optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        ("lr=1", "lr: unknown key; did you mean optimizer.lr?"),
        ("steps=many", "steps: 'many' should be a valid integer"),
        ("name=null", "name: is null or empty, and should be text; write '' for empty text"),
        ("optimizer.lr=-1", "optimizer.lr: -1 should be greater than 0"),
        ("precision=fp8", "precision: 'fp8' should be 'fp32', 'amp', 'bf16' or 'fp16'"),
        ("name=../up", "name: '../up' use up to 100 letters"),
        ("model={path: x, n_embd: 3}", "model: path brings its own config.json; remove n_embd"),
        ("model={n_embd: 3, type: null}", "model: give either path (a model directory) or type"),
        (
            "batch.global=15",
            "batch.global: 15 is not divisible by 2 ranks; nearest batches that are: 14 or 16",
        ),
        ("schedule.warmup_steps=500", "schedule.warmup_steps: 500 is longer than the training (steps: 480)"),
        ("sequence_length=4096", "sequence_length: 4096 is longer than model.max_position_embeddings (128)"),
        ("snapshot.at=[999]", "snapshot.at: 999 is after the last step (steps: 480)"),
        (
            "deepspeed.zero_optimization.stage=3",
            "deepspeed.zero_optimization.stage: set by Vernier; use zero.stage",
        ),
        ("nonsense", "'nonsense': expected key=value"),
    ],
)
def test_what_is_wrong_is_said_with_key_value_and_what_to_do(override: str, said: str) -> None:
    assert said in problem(override)


def test_fp16_without_a_gpu_is_refused_with_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = load_config("demo", ["precision=fp16"])  # which may be read anywhere
    with pytest.raises(ConfigError, match="precision: fp16 needs a GPU and none is visible; use fp32"):
        resolve(config)
    assert resolve(config, elsewhere=True).precision == "fp16"


def test_all_problems_are_said_at_once() -> None:
    assert (
        len(problem("batch.global=15", "schedule.warmup_steps=500", "zero.stage=0", "zero.offload=cpu").splitlines())
        == 3
    )


def test_broken_yaml_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nsteps: [1,\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: line \d"):
        load_config(path)


@pytest.mark.parametrize(("world", "micro", "expected"), [(1, 8, 8), (2, 8, 8), (1, 5, 4), (4, 8, 4), (16, 8, 1)])
def test_the_micro_batch_is_the_largest_divisor_not_above_the_bound(world: int, micro: int, expected: int) -> None:
    assert micro_batch(load_config("demo", [f"batch.micro={micro}", f"nproc={world}"]), world) == expected


def test_the_cores_of_a_task_of_srun_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads(**environment: str) -> int | None:
        with monkeypatch.context() as patch:
            for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS", "SLURM_CPUS_PER_TASK"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
            return resolve(load_config("demo", ["threads_per_rank=null"]), nproc=4).threads_per_rank

    task = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_CPUS_PER_TASK": "8"}
    assert threads() == 2  # four ranks share what this process sees
    assert threads(**task) == 8  # srun has bound each to its own
    assert threads(**task | {"SLURM_CPUS_PER_TASK": "3"}) == 3  # it has not
    assert threads(**task | {"TORCHELASTIC_RUN_ID": "x"}) == 2  # a torchrun in each task
    assert threads(**task | {"SLURM_STEP_NUM_TASKS": "1"}) == 2  # `vernier train` in a task


def test_settings_that_are_lists_differ_as_a_whole() -> None:
    before = load_config("tests/tiny.yaml", ["snapshot.at=[5,7]"])
    now = load_config("tests/tiny.yaml", ["snapshot.at=[3,7]", "optimizer.betas=[0.8,0.95]"])
    assert differences(before, now) == {
        "snapshot.at": ([5, 7], [3, 7]),
        "optimizer.betas": ([0.9, 0.95], [0.8, 0.95]),
    }
    assert differences(before, load_config("tests/tiny.yaml")) == {"snapshot.at": ([5, 7], [])}
