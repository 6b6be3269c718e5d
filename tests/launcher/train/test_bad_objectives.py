"""What cannot be meant of an objective is one line that says what to do, before a rank is started, and exit 2."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import vernier
from made_rows import CHATML, LLAMA, write_jsonl

TURN = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is so. " * 4}]
SMALL = ["steps=4", "epochs=null", "batch.global=4", "nproc=1", "reference.documents=10", "reference.max_fraction=0.4"]


def refused(*command: object, code: int = 2) -> str:
    said = vernier(*command, code=code).stderr
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, said
    return lines[0]


def config(folder: Path, recipe: str, rows: list[dict], model: Path, *settings: str) -> list[object]:
    source = write_jsonl(folder / "rows.jsonl", rows)
    vernier("init", folder, "--recipe", recipe, "--data", source, "--model", model)
    where = [f"data.dir={folder / 'data'}", f"run.dir={folder / 'run'}", "sequence_length=100"]
    return [folder / f"{recipe}.yaml", *where, *SMALL, *settings]


def chats(count: int = 60) -> list[dict]:
    return [
        {"messages": [{**TURN[0], "content": f"{at}?"}, {**TURN[1], "content": f"{at * 7} " * 9}]}
        for at in range(count)
    ]


def texts(count: int = 60) -> list[dict]:
    return [
        {"text": f"number {at * 13} is {'odd' if at % 2 else 'even'}", "label": "ab"[at % 2]} for at in range(count)
    ]


@pytest.mark.parametrize(
    ("recipe", "rows", "settings", "said"),
    [
        (
            "classify",
            [*texts(), {"text": "x", "label": "c"}],
            ["objective.labels=[a, b]"],
            "line 61: 'c' is none of objective.labels",
        ),
        ("classify", [{**row, "label": "a"} for row in texts()], [], "all texts have the one label 'a'"),
        ("classify", [*texts(), {"text": "x"}], [], "line 61, has no label"),
        ("classify", texts(), ["objective.problem=regression"], "line 1: 'a' is no number"),
        ("classify", texts(), ["data.packing=documents"], "does not go with objective.name: classify; use none"),
        ("chat-lora", [*chats(), {"text": "x"}], [], "line 61, has no messages"),
        ("chat-lora", [*chats(), {"messages": [TURN[0]]}], [], "line 61: no message is the assistant's"),
        ("chat-lora", [*chats(), {"messages": [{"content": "x"}]}], [], "message 1 has no role"),
        ("chat-lora", chats(), ["data.packing=stream"], "does not go with objective.name: instruct"),
        ("chat-lora", chats(), ["sequence_length=3"], "too short for the assistant to say a token"),
    ],
)
def test_rows_and_settings_are_refused_by_prepare(
    recipe: str,
    rows: list[dict],
    settings: list[str],
    said: str,
    sources: Path,
    tmp_path: Path,
) -> None:
    assert said in refused("prepare", *config(tmp_path, recipe, rows, sources / "model", *settings))
    assert not (tmp_path / "data").exists()


def test_a_template_that_raises_or_is_not_there_is_refused(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "model", tmp_path / "model")
    given = config(tmp_path, "chat-lora", chats(), tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{{ raise_exception('no such role') }}")
    assert "refuses a conversation: no such role" in refused("prepare", *given)
    template.write_text(CHATML.replace("{{ m['content'] }}", "{% if loop.last %}!{% endif %}{{ m['content'] }}"))
    rows = [{"messages": [*row["messages"], *row["messages"]]} for row in chats()]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert "writes a turn otherwise when others follow" in refused("prepare", *given)
    template.unlink()
    assert "has no chat template" in refused("prepare", *given)
    assert not (tmp_path / "data").exists()


def test_what_does_not_fit_the_model_is_refused_by_train(sources: Path, tmp_path: Path) -> None:
    given = config(tmp_path, "chat-lora", chats(), sources / "model")
    vernier("prepare", *given)
    assert "lora.targets: no module is named 'q_prog'; expected such as q_proj" in refused(
        "train", *given, "lora.targets=[q_prog]"
    )
    assert "freeze: no parameter is named" in refused("train", *given, "freeze=[nothing.*]")
    assert "sequence_length" in refused("train", *given, "sequence_length=4000")
    assert "epochs: 2, and steps: 4 is given as well" in refused("train", *given, "epochs=2")
    assert "objective.name: causal, and" in refused("train", *given, "objective.name=causal", "data.packing=documents")
    assert "lora.r: an adapter is to a model that is there" in refused("train", *given, LLAMA)
    long = ["sequence_length=600", "data.dir=" + str(tmp_path / "long")]
    vernier("prepare", *given, *long)
    model = json.loads((sources / "model" / "config.json").read_text())
    assert model["max_position_embeddings"] >= 600
