"""The `vernier` command, and what its verbs' arguments have in common."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from configs.console import console, tell

app = typer.Typer(
    name="vernier",
    help="Train language models, and tell to a thousandth of a percent whether a checkpoint is really better.",
    invoke_without_command=True,
    epilog="Words that are this field's or ours: docs/glossary.md. All verbs with their options: docs/cli.md.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# In the order of help, by the panel they stand in there.
PANELS = {
    "Train": ("init", "prepare", "plan", "train", "twin", "launch"),
    "Score": ("eval", "compare", "export"),
    "Watch": ("status", "logs", "board", "stop", "doctor"),
}
VERBS = tuple(verb for verbs in PANELS.values() for verb in verbs)


def complete_key(incomplete: str) -> list[str]:
    """The settings that a KEY=VALUE which is being typed may come to be."""
    from configs.load import known_keys

    keys = list(known_keys())
    sections = {key.rpartition(".")[0] for key in keys}
    return [f"{key}=" for key in keys if key.startswith(incomplete) and key not in sections]


ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or the name of a recipe.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that override the file.", autocompletion=complete_key),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's or sweep's folder, or a known run's name.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def panel(verb: str) -> str:
    """The panel of help that a verb stands in."""
    return next(name for name, verbs in PANELS.items() if verb in verbs)


def example(*lines: str) -> str:
    return "Example:\n\n" + "\n\n".join(f"  {line}" for line in lines)


def people(*, out: bool = False):  # type: ignore[no-untyped-def]  # rich is not imported for its name alone
    return console() if out else console(sys.stderr, soft_wrap=True)


def _tell_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        tell(f"vernier {version('vernier-lm')}")
        raise typer.Exit


@app.callback()
def overview(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Say which version this is.")
    ] = False,
) -> int:
    """What `vernier` alone does: shows the runs and configs here and what may come next, else help."""
    if context.invoked_subcommand is not None:
        return 0
    from launcher.overview import print_overview

    if not print_overview(people(out=True)) and (said := context.get_help()):  # rich has printed it, where it is there
        tell(said)
    return 0
