"""What a secret is: by the words of a name, or by the form of a value; and what is no secret."""

from __future__ import annotations

import pytest

from configs.errors import ConfigError
from configs.load import load_config
from configs.secret_names import (
    assigned_secrets,
    holds_secret,
    is_secret,
    names_secret,
    shown_command,
    without_secrets,
)


@pytest.mark.parametrize(
    "name",
    """WANDB_KEY WANDB_API_KEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY HF_TOKEN HF_APPKEY TORCH_PKEY OPENAI_KEY SSH_KEY
    DB_PASSWORD PGPASSWORD MYSQL_PWD my_credentials GOOGLE_APPLICATION_CREDENTIALS BASIC_AUTH SESSION_COOKIE apiKey
    accessToken GITHUBTOKEN MYSECRET NETRC hf-token CLIENT_SECRETS""".split(),  # noqa: SIM905
)
def test_names_of_secrets(name: str) -> None:
    assert names_secret(name)


@pytest.mark.parametrize(
    "name",
    """TOKENIZERS_PARALLELISM KEYBOARD MONKEY AUTHOR GIT_AUTHOR_NAME NCCL_IB_PKEY UCX_IB_PKEY PWD OLDPWD PATH HF_HOME
    PASSIVE_MODE SECRETARY COMPASS BYPASS HOTKEY I_MPI_PIN SSH_AUTH_SOCK NCCL_SOCKET_IFNAME TOKENIZER""".split(),  # noqa: SIM905
)
def test_names_of_no_secrets(name: str) -> None:
    assert not names_secret(name)


@pytest.mark.parametrize(
    "value",
    [
        "https://user:pass@host/x",
        "postgres://me:s3cret@db:5432/runs",
        "redis://:hush@cache",
        "sk-proj-abcdefghijklmnop",
        "hf_abcdefghijklmnopqrst",
        "ghp_abcdefghijklmnopqrst",
        "AKIAABCDEFGHIJKLMNOP",
        "host=db user=me password=hush",
        "https://host/x?token=abc",
        "Bearer abcdefghijklmnop",
    ],
)
def test_values_that_are_secrets(value: str) -> None:
    assert holds_secret(value)
    assert is_secret("DATABASE_URL", value)
    assert "***" in without_secrets(value)
    assert not holds_secret(without_secrets(value))


@pytest.mark.parametrize(
    "value",
    ["https://host:8080/x", "me@host:/path", "hf_cache/models", "risk-averse-and-then-some", "a:b@c", "sk-1", ""],
)
def test_values_that_are_none(value: str) -> None:
    assert not holds_secret(value)
    assert without_secrets(value) == value


def test_a_count_of_tokens_is_none() -> None:
    assert not is_secret("MAX_TOKENS", "1024")
    assert is_secret("API_TOKENS", "a,b")


def test_a_line_of_shell_that_spells_a_secret_is_told_from_one_that_fetches_it() -> None:
    assert list(assigned_secrets("export WANDB_API_KEY=abc HF_HOME=/x")) == ["WANDB_API_KEY"]
    assert not list(assigned_secrets("""export HF_TOKEN=$(cat ~/.token) KEY="$OTHER" TOKENIZERS_PARALLELISM=true"""))


def test_a_command_is_written_down_without_its_secrets() -> None:
    command = [
        "train",
        "a.yaml",
        "model.pad_token_id=0",
        "deepspeed.comet.api_key=abc",
        "seed=3",
        "--token",
        "abc",
        "x=https://u:p@h/",
    ]
    shown = [
        "train",
        "a.yaml",
        "model.pad_token_id=0",
        "deepspeed.comet.api_key=***",
        "seed=3",
        "--token",
        "***",
        "x=https://u:***@h/",
    ]
    assert shown_command(command) == shown


def test_settings_that_hold_a_secret_are_refused_and_not_shown() -> None:
    for setting in ("data.source=https://me:hush@host/x", "deepspeed.comet.api_key=hush"):
        with pytest.raises(ConfigError) as caught:
            load_config("tests/tiny.yaml", [setting])
        assert "looks like a secret" in str(caught.value)
        assert "hush" not in str(caught.value)
    load_config("tests/tiny.yaml", ["model={type: llama, num_key_value_heads: 2, pad_token_id: 0}"])
