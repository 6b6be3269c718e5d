"""What can be found wrong before a rank starts: with data, model and reference set, and with what is there of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from configs.console import is_supervised
from configs.errors import ConfigError
from configs.files.atomic import read_manifest, verify
from configs.run.directory import RunDir
from configs.run.facts import read_reference_facts
from configs.schema import Config
from eval.distributed.ranks import environment_ranks
from eval.reference.set import tokenizer_fingerprint
from trainer.callbacks.baseline import check_baseline
from trainer.callbacks.dispatch import find_callbacks
from trainer.checkpoint.resume_compat import check_changes
from trainer.data.examples import open_windows
from trainer.data.integrity import AT_START_BYTES
from trainer.data.prepare import load_dataset_facts, no_target
from trainer.data.prepared_by import settings_in
from trainer.model.build import check_model_settings
from trainer.model.effects import loss_is_off
from trainer.objectives import objective_of


def check_run(
    config: Config,
    *,
    extend: bool = False,
    fresh: bool = False,
    force: bool = False,
    tell: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], Any]:
    """Everything that can be found wrong before a rank starts: gives (data facts, Hugging Face config).

    Args:
        fresh: what is in the run directory will be moved away, so it need not fit.
        force: go on with what may not change, too.
        tell: told, in a line each, what is allowed and perhaps not meant.

    Raises:
        ConfigError: what is wrong, a line each.
    """
    # A rank that `vernier` has started comes after its check; and each node's first hashes all beside the training.
    first = environment_ranks()[2] == 0 and not is_supervised()
    facts = load_dataset_facts(config.data_dir, AT_START_BYTES if first else 0)
    check_prepared_for(config, facts)
    fingerprint = tokenizer_fingerprint(config.data_dir / "tokenizer")
    hf = check_model_settings(config, facts, fingerprint)
    if tell is not None and loss_is_off(hf):
        tell(
            "caution: model: its experts are trained without the loss that balances their load, since its "
            "output_router_logits is false"
        )
    if config.eval.placement != "none":
        if first and not config.reference_dir.is_relative_to(config.data_dir):
            verify(config.reference_dir, "reference")
        _check_reference(config, fingerprint, hf, tell)
    windows = open_windows(config, config.data_dir, facts["prefix_id"])
    if len(windows) < 1:
        raise ConfigError(
            f"sequence_length: {config.sequence_length} is longer than all training tokens; prepare more data"
        )
    if not windows.any_target():
        raise ConfigError(no_target(config.sequence_length, len(windows)))
    find_callbacks(config.callbacks)
    check_baseline(config, facts["fingerprints"]["data"])
    run = RunDir(config.run_dir)
    if run.path.exists() and not run.path.is_dir():
        raise ConfigError(f"run.dir: {run.path} is a file; name a directory")
    if not fresh:
        check_changes(config, extend=extend, force=force)
    return facts, hf


def check_prepared_for(config: Config, facts: dict[str, Any]) -> None:
    """Refuses data that was prepared for another objective, or to be packed otherwise.

    Raises:
        ConfigError: it was.
    """
    before = settings_in(facts)
    for key, now in (("objective.name", config.objective.name), ("data.packing", config.packing)):
        if before[key] != now:
            raise ConfigError(
                f"{key}: {now}, and {config.data_dir} was prepared with {before[key]}; prepare it anew with this "
                "config: vernier prepare CONFIG --fresh, or another data.dir"
            )


def _check_reference(config: Config, tokenizer: str, hf: Any, tell: Callable[[str], None] | None) -> None:
    """Refuses a reference set that the model, once trained, could not be scored on; tells of other windows."""
    directory, objective = config.reference_dir, objective_of(config)
    read_manifest(directory, "reference")
    facts = read_reference_facts(directory)
    own = facts.get("objective", "causal")
    if own not in objective.scored_as:
        raise ConfigError(
            f"objective.name: {config.objective.name}, and {directory} is for the objective {own}; prepare the data "
            "anew with this config (--fresh, or another data.dir), or set eval.reference"
        )
    if facts["tokenizer"]["fingerprint"] != tokenizer:
        raise ConfigError(
            f"eval.reference: {directory} has another tokenizer than the data; tokenize it again: "
            f"vernier prepare --reference {directory} --tokenizer {config.data_dir / 'tokenizer'} --out NEW_DIR"
        )
    longest = getattr(hf.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and facts["sequence_length"] > longest:
        raise ConfigError(
            f"eval.reference: windows of {directory} have {facts['sequence_length']} tokens, the model {longest}; "
            "prepare a reference set with a shorter sequence_length"
        )
    if tell is not None and facts["sequence_length"] != config.sequence_length:
        tell(
            f"caution: sequence_length: training has {config.sequence_length}, the windows of the reference set "
            f"{directory} have {facts['sequence_length']}: scores are of another length of context than training's; "
            f"for a set in windows of {config.sequence_length}: vernier prepare --reference {directory} "
            f"--tokenizer {config.data_dir / 'tokenizer'} --sequence-length {config.sequence_length} --out NEW_DIR"
        )
