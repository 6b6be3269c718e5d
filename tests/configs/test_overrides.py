"""What is said on the command line is put over the config, and throws away nothing that it does not name."""

import pytest

from configs import ConfigError, load_config
from configs.yaml.overrides import apply_overrides

SIZES = {"hidden_size": 48, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("model", "override", "lost", "instead"),
    [
        ({"type": "llama", **SIZES}, "model.type=gpt2", "hidden_size, num_hidden_layers", "'model={type: gpt2, …}'"),
        ({"path": "runs/a"}, "model.type=gpt2", "path", "'model={type: gpt2, …}'"),
        ({"type": "llama", **SIZES}, "model.type=null", "hidden_size, num_hidden_layers", "set each of them"),
        ({"type": "llama", **SIZES}, "model=", "type, hidden_size, num_hidden_layers", "set each of them"),
    ],
)
def test_no_part_of_a_model_is_thrown_away_unnamed(
    model: dict[str, object], override: str, lost: str, instead: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        apply_overrides({"model": model}, [override])
    assert f"would throw away what the config sets in model: {lost}; " in str(refused.value)
    assert instead in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_directory_takes_the_place_of_a_model_and_says_of_what(caplog: pytest.LogCaptureFixture) -> None:
    told = apply_overrides({"model": {"type": "llama", **SIZES}, "steps": 3}, ["model.path=a@5"])
    assert told == {"model": {"path": "a@5"}, "steps": 3}
    said = "model.path: a@5 takes the place of model.type, model.hidden_size, model.num_hidden_layers in the config"
    assert caplog.messages == [said]


@pytest.mark.parametrize("override", ["optimizer=null", "optimizer="])
def test_no_section_is_emptied_unnamed(override: str) -> None:
    with pytest.raises(ConfigError, match="optimizer: null would throw away what the config sets in optimizer: lr"):
        load_config("demo", [override])


def test_no_value_makes_way_for_a_section_unnamed() -> None:
    with pytest.raises(ConfigError, match=r"deepspeed.a.b: '1' would throw away .* in deepspeed: a;"):
        apply_overrides({"deepspeed": {"a": 5}}, ["deepspeed.a.b=1"])


def test_what_loses_nothing_or_names_it_is_taken() -> None:
    model = {"model": {"type": "llama", **SIZES}, "deepspeed": {"a": None, "b": {"c": 1}}}
    for override in ("model.type=llama", "model.hidden_size=64", "model={hidden_size: 64}", "eval=", "model.type=gpt2"):
        beneath = {"model": {"type": "llama"}} if override == "model.type=gpt2" else model
        apply_overrides(beneath, [override])
    assert apply_overrides(model, ["model={type: gpt2}", "model.n_embd=48"])["model"].keys() == {"type", "n_embd"}
    assert apply_overrides(model, ["model={path: a}"])["model"] == {"path": "a"}
    assert apply_overrides(model, ["deepspeed.b=null"])["deepspeed"]["b"] is None
    assert apply_overrides(model, ["deepspeed.a={x: one}"])["deepspeed"]["a"] == {"x": "one"}
