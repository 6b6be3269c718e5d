"""No scalar changes its meaning on the way from YAML to a setting and back; what would is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import ConfigError, dump_config, load_config, resolve
from configs.schema import Config
from configs.yaml.scalars import as_declared
from configs.yaml.text import dump_yaml, parse_yaml

# Each is a number, a truth or a date to some reader of YAML 1.1 or 1.2, or to none.
SPELLINGS = "12:00:00 1:20 0644 007 089 0o17 0x1F 0b11 1_000 1__0 1_0.5 1.10 1. .5 1e3 3e-4 12e03 -7".split()  # noqa: SIM905
SPELLINGS += "+5 .inf .NaN 2024-01-01 2024-01-01T10:00:00Z yes no on off y N true FALSE null ~ = << a".split()  # noqa: SIM905
SPELLINGS += ["", " x", "a: b", "#x", "x\ny"]


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", [text for text in SPELLINGS[:-5] if text not in ("null", "~")])
def test_a_text_field_takes_the_letters_that_were_written(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"extends: demo\ndata: {{source: [{text}], text_field: {text}, dir: {text}}}\n")
    for config in (load_config(path), load_config("demo", [f"data.{key}={text}" for key in ("text_field", "dir")])):
        assert config.data.text_field == text
        assert config.data.dir == Path(text)
    assert load_config(path).data.source == [text]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("steps=1_000", 1000),
        ("steps=1e3", 1000),
        ("steps='1000'", 1000),
        ("seed=0", 0),
        ("optimizer.lr=3e-4", 3e-4),
        ("optimizer.lr=.5", 0.5),
        ("optimizer.lr=1", 1.0),
        ("model.rope_theta=1e4", 1e4),
        ("model.vocab_size=32_000", 32000),
        ("model.tie_word_embeddings=false", False),
        ("model.tie_word_embeddings=null", None),
        ("model.label='0644'", "0644"),
        ("launch.preflight=no", False),
        ("launch.preflight=on", True),
        ("deterministic=False", False),
        ("launch.time=12:00:00", "12:00:00"),
        ("launch.time=90", "90"),
        ("launch.memory=0", "0"),
        ("launch.memory=", None),
        ("name=1.10", "1.10"),
    ],
)
def test_a_field_takes_what_a_reader_sees(override: str, value: Any) -> None:
    found: Any = load_config("demo", [override]).model_dump()
    for part in override.partition("=")[0].split("."):
        found = found[part]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps=0644", "steps: '0644' should be a valid integer, written plainly, such as 1000"),
        ("steps='0644'", "steps: '0644' should be a valid integer"),
        ("steps=12:00", "steps: '12:00' should be a valid integer"),
        ("steps=1__0", "steps: '1__0' should be a valid integer"),
        ("steps=true", "steps: 'true' should be a valid integer"),
        ("steps=2024-01-01", "steps: '2024-01-01' should be a valid integer"),
        ("steps=0x1F", "steps: '0x1F' should be a valid integer"),
        ("optimizer.lr=1:20", "optimizer.lr: '1:20' should be a valid number"),
        ("optimizer.betas=[0.9, 00.95]", "optimizer.betas.1: '00.95' should be a valid number"),
        ("snapshot.at=[007]", "snapshot.at.0: '007' should be a valid integer"),
        ("zero.stage=true", "zero.stage: 'true' should be 0, 1, 2 or 3"),
        ("launch.board=1:20", "launch.board: '1:20' should be a valid boolean"),
        ("model.tie_word_embeddings=no", "model.tie_word_embeddings: 'no' is text to some readers of YAML"),
        ("model.hidden_size=0644", "model.hidden_size: '0644' is text to some readers of YAML"),
        ("deepspeed.x={y: [on]}", "deepspeed.x.y.0: 'on' is text to some readers of YAML"),
        ("stepz=0644", "stepz: unknown key; did you mean steps?"),
        ("optimizr={x: on}", "optimizr: unknown key; did you mean optimizer?"),
        ("data.text_field={x: on}", "data.text_field: should be a valid string"),
        ("steps=" + "9" * 5000, "steps: has a value that cannot be read"),
        ("deepspeed=!!timestamp 2024-01-01", "deepspeed: line 1 is not YAML"),
        ("deepspeed=&a {x: *a}", "deepspeed: line 1 is not YAML: found unconstructable recursive node"),
    ],
)
def test_what_could_be_another_number_is_refused_in_one_line(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("demo", [override])
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


def test_all_such_values_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("demo", ["steps=0644", "optimizer.lr=1:20", "model.vocab_size=010"])
    assert len(refused.value.problems) == 3


def test_what_is_dumped_reads_back_the_same_here_and_elsewhere() -> None:
    texts = {text: text for text in SPELLINGS}
    mapping = {
        "name": "x",
        "deepspeed": {**texts, "list": SPELLINGS, "numbers": [1, -7, 1.5, 1e-8, 1e16, 1e22, 3e-4, True, None]},
    }
    dumped = dump_yaml(mapping)
    assert as_declared(parse_yaml(dumped, "x"), Config) == mapping
    assert yaml.safe_load(dumped) == mapping
    assert yaml.load(dumped, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) == mapping


def test_a_resolved_config_full_of_such_texts_reads_back_the_same(tmp_path: Path) -> None:
    odd = ["name=1e3", "launch.time=1:20", "data.text_field=on", "data.source=[0644, 2024-01-01, 1.10]"]
    odd += ["model.label='3e-4'", "deepspeed={x: '089', 1.10: '1_000'}", "data.prompt_field=007"]
    config = resolve(load_config("demo", odd))
    dumped = dump_config(config)
    assert load_config(write(tmp_path, dumped)) == config
    assert yaml.safe_load(dumped)["launch"]["time"] == "1:20"
    assert Config.model_validate(yaml.safe_load(dumped)) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\nsteps: 1\nname: y\n", r"mine.yaml: line 3: the key 'name' is given twice \(before in line 1\)"),
        ("optimizer:\n  lr: 1\n  eps: 1\n  'lr': 2\n", "mine.yaml: line 4: the key 'lr' is given twice"),
        ("data: {source: [{a: 1, a: 1}]}\n", "mine.yaml: line 1: the key 'a' is given twice"),
        ("? [a]\n: 1\n", "mine.yaml: line 1: a key should be a name"),
        ("- 1\n", "mine.yaml: expected settings as `key: value` lines, found a list"),
        ("12\n", "mine.yaml: expected settings as `key: value` lines, found a single value"),
    ],
)
def test_a_key_given_twice_is_refused_with_file_and_line(text: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    beside = write(tmp_path, "extends: mine.yaml\n", "beside.yaml")
    for source in (path, beside):
        with pytest.raises(ConfigError, match=said):
            load_config(source)


def test_a_key_given_twice_in_an_overrides_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="model: line 1: the key 'type' is given twice"):
        load_config("demo", ["model={type: llama, type: gpt2}"])


def test_what_an_anchor_brings_may_be_set_anew() -> None:
    told = parse_yaml("a: &a {x: 1, y: one}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\n", "x")
    assert as_declared({"deepspeed": told}, Config)["deepspeed"]["c"] == {"x": 3, "y": "one"}
