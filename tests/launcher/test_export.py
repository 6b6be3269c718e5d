"""A checkpoint as a model directory of its own: the best one, with a card; adapters added, or as they are."""

from pathlib import Path

from conftest import vernier
from transformers import AutoModelForCausalLM

from configs.files.atomic import MANIFEST


def test_the_best_snapshot_becomes_a_model_with_a_card_and_nothing_is_overwritten(
    tiny_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    said = vernier("export", tiny_run, "--out", out).stdout
    assert "step 20 of" in said
    card = (out / "README.md").read_text()
    assert "nats per token" in card
    assert not (out / MANIFEST).exists()
    AutoModelForCausalLM.from_pretrained(out)
    assert "is there already" in vernier("export", tiny_run, "--out", out, code=2).stderr
    assert "has no snapshot of step 7" in vernier("export", f"{tiny_run}@7", "--out", tmp_path / "b", code=2).stderr
    assert (
        "has no snapshot of step last" in vernier("export", f"{tiny_run}@last", "--out", tmp_path / "b", code=2).stderr
    )
    assert "is not a run directory" in vernier("export", tmp_path, "--out", tmp_path / "b", code=2).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    vernier("export", f"{tiny_run}@10", "--out", tmp_path / "ten")
    assert "after step 10" in (tmp_path / "ten" / "README.md").read_text()
