"""The `vernier` command, and what its verbs' arguments have in common."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from configs.console import console

app = typer.Typer(
    name="vernier",
    help="Train language models, and tell to a thousandth of a percent whether a checkpoint is really better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or a recipe: demo, wsb.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the file.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def example(*lines: str) -> str:
    return "Example:\n\n" + "\n\n".join(f"  {line}" for line in lines)


def people(*, out: bool = False):  # type: ignore[no-untyped-def]  # rich is not imported for its name alone
    return console() if out else console(sys.stderr, soft_wrap=True)
