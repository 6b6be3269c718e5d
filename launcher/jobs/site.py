"""Site profiles: what a cluster wants said in every job, in one YAML file, apart from what a run is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator

from configs.errors import ConfigError
from configs.schema import Settings
from configs.secret_names import assigned_secrets, holds_secret, is_secret
from configs.yaml.scalars import as_declared
from configs.yaml.text import parse_mapping

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What job scripts set themselves.
OURS = frozenset("RUN PYTHON RANK_PYTHON TMPDIR MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE".split())  # noqa: SIM905

Line = Annotated[str, Field(max_length=1000)]
Positive = Annotated[int, Field(ge=1)]


TO_A_SECRET = (
    "looks like a secret, which would stand in a script; set it in the shell that launches "
    "(jobs inherit it), or name a file of such lines as environment_file"
)


def _refuse_secrets(lines: list[str]) -> list[str]:
    for line in lines:
        name = next(assigned_secrets(line), None)
        if name is not None or holds_secret(line):
            raise ValueError(f"{name or 'a word of it'} {TO_A_SECRET}")
    return lines


class Queue(Settings):
    """Where jobs go: keys of sbatch, by sbatch's own names."""

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    reservation: Line | None = None
    exclude: Line | None = Field(None, description="nodes not to use, such as node[3,7-9]")
    nodelist: Line | None = Field(None, description="nodes to use")
    sbatch: list[Line] = Field(default_factory=list, description='further options, such as "--mail-type=FAIL"')

    @field_validator("partition", "account", "qos", "constraint", "reservation", "exclude", "nodelist")
    @classmethod
    def value_is_plain(cls, value: str | None) -> str | None:
        # In a line of #SBATCH, white space and quotes would end the value, and begin what nobody asked for.
        if value is not None and not re.fullmatch(r"[A-Za-z0-9_.,:;@%+=|&*!()\[\]/-]+", value):
            raise ValueError("has a character that sbatch would misread (white space, quotes, $, #, …)")
        return value

    @field_validator("sbatch")
    @classmethod
    def options_are_lines(cls, value: list[str]) -> list[str]:
        for one in value:
            if not one.startswith("-") or not one.isprintable():
                raise ValueError(f'{one!r} should be one option of sbatch, such as "--mail-type=FAIL"')
        return _refuse_secrets(value)


class Container(Settings):
    """What ranks run in."""

    kind: Literal["none", "pyxis", "enroot", "apptainer"] = "none"
    image: Line | None = Field(None, description="pyxis, enroot: an image's name or .sqsh; apptainer: a .sif")
    mounts: list[str] = Field(default_factory=list, description="folders to see inside: SRC or SRC:DEST[:ro]")
    options: list[str] = Field(default_factory=list, description="further options of srun, enroot or apptainer exec")

    @field_validator("options")
    @classmethod
    def options_hold_no_secrets(cls, value: list[str]) -> list[str]:
        return _refuse_secrets(value)


class Site(Settings):
    """A cluster's own settings. Where a run has the same key (launch.gpus_per_node, …) the run's counts."""

    queue: Queue = Queue()
    eval_queue: Queue | None = Field(
        None, description="of the evaluation's job; default as `queue`, whose account counts where this names none"
    )
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    gpu_type: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = Field(None, description="such as a100")
    cpus_per_rank: Positive | None = None
    memory: Annotated[str, Field(pattern=r"^\d+[KMGT]?$")] | None = Field(
        None, description="host memory a node, as Slurm takes it (64G; 0: all of it)"
    )
    requeue: bool = Field(True, description="false: the site forbids requeueing; a successor is submitted instead")
    export: Literal["ALL", "NONE"] = Field("ALL", description="whether a job sees the environment it is submitted in")
    modules: list[Line] = Field(default_factory=list, description="`module load` each")
    setup: list[Line] = Field(
        default_factory=list, description="shell lines at the start of a job, as they are; one that fails ends it"
    )
    environment: dict[str, str] = Field(default_factory=dict, description="variables of all ranks, to the letter")
    environment_file: Path | None = Field(
        None, description="a file of NAME=value lines, to the letter, read by jobs: the place for secrets"
    )
    scratch: str = Field("/tmp", description="folder on each node's own disk; $NAME is read there")
    python: str | None = Field(None, description="the Python of ranks; default the one that launches")
    srun: list[Line] = Field(default_factory=list, description="further options of srun")
    container: Container = Container()
    template: Path | None = Field(None, description="own train.sbatch.j2, or a folder with it, eval.sbatch.j2, …")
    login: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@:][A-Za-z0-9_.@:-]*$")] | None = Field(
        None, description="the login node, as ssh reaches it from outside"
    )
    ssh_options: list[Line] = Field(default_factory=list, description="of --on ssh, such as -p 2222")
    accelerators: Line | None = Field(None, description="of --on skypilot, such as H100:8")

    @field_validator("setup", "srun", "modules", "ssh_options")
    @classmethod
    def lines_hold_no_secrets(cls, value: list[str]) -> list[str]:
        return _refuse_secrets(value)

    @property
    def evaluators_queue(self) -> Queue:
        """Where the evaluation's job goes. Who pays is the same unless it is said: an account is no place."""
        own = self.eval_queue
        if own is None:
            return self.queue
        if own.account is not None or any(map(_names_account, own.sbatch)):
            return own
        further = [*own.sbatch, *filter(_names_account, self.queue.sbatch)]
        return own.model_copy(update={"account": self.queue.account, "sbatch": further})

    @field_validator("scratch")
    @classmethod
    def scratch_is_a_path(cls, value: str) -> str:
        # It stands in double quotes, where a node may fill in a variable, and nothing else means anything.
        if not re.fullmatch(r"(?=[/$])([A-Za-z0-9_./-]|\$[A-Za-z_]\w*|\$\{[A-Za-z_]\w*\})+", value, re.ASCII):
            raise ValueError("should be a path of letters, digits and _ . - /, with $NAME where a node has its own")
        return value

    @field_validator("environment")
    @classmethod
    def variables_are_no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a variable")
            if "\0" in text:
                raise ValueError(f"{name}: has a zero byte")
            if name in OURS or name.startswith("SLURM_"):
                raise ValueError(
                    f"{name} is set in every job{'; scratch names its folder' if name == 'TMPDIR' else ''}"
                )
            if is_secret(name, text):
                raise ValueError(f"{name} {TO_A_SECRET}")
        return value


def _names_account(option: str) -> bool:
    return option.startswith(("-A", "--account"))


def site_folder() -> Path:
    """Where profiles lie by name."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "vernier" / "sites"


def load_site(name: str | None) -> Site:
    """The profile of that name or file; without one `default.yaml` of the profiles, or nothing special.

    Raises:
        ConfigError: there is none, or it has a key or value that cannot be.
    """
    if name is None:
        path = site_folder() / "default.yaml"
        if not path.is_file():
            return Site()
    else:
        path = Path(name)
        if not path.is_file():
            path = site_folder() / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in site_folder().glob("*.yaml"))) or "none yet"
            raise ConfigError(f"--site: {name} is no file, and no profile in {site_folder()} (there: {known})")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--site: {path} cannot be read: {error}") from None
    told = parse_mapping(text, f"--site: {path}")
    try:
        site = Site.model_validate(as_declared(told, Site))
    except ConfigError as error:
        raise ConfigError(*(f"--site: {path}: {problem}" for problem in error.problems)) from None
    except ValidationError as error:
        raise ConfigError(*(f"--site: {path}: {problem}" for problem in _problems(error))) from None
    if site.container.kind != "none" and site.container.image is None:
        raise ConfigError(f"--site: {path}: container.image: missing; {site.container.kind} needs one")
    beside = {
        key: path.absolute().parent / value.expanduser()
        for key, value in (("environment_file", site.environment_file), ("template", site.template))
        if value is not None
    }
    return site.model_copy(update=beside)


def _problems(error: ValidationError) -> Iterator[str]:
    sections: dict[str, type[Settings]] = {"queue": Queue, "eval_queue": Queue, "container": Container}
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = sections.get(str(item["loc"][0]), Site).model_fields
            yield f"{key}: unknown key; known: {', '.join(known)}"
        elif item["type"] == "string_type" and item["input"] is None:
            yield f"{key}: is null or empty, and should be text; write '' for empty text, 'null' for that word"
        elif key.startswith("environment."):  # what is told may be a secret
            yield f"{key}: should be text, true, false or a number"
        else:
            said = item["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
            said = said.replace("String should", "should")
            hidden = key == "environment" or TO_A_SECRET in said or isinstance(item["input"], (dict, list))
            yield f"{key}:{'' if hidden else ' ' + repr(item['input'])} {said}"
