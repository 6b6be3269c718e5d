"""Slurm: turns a plan into sbatch scripts by the templates of slurm/."""

from __future__ import annotations

import re
import shlex
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from launcher.backends.sbatch import Script, given_twice
from launcher.jobs.plan import JobPlan
from launcher.jobs.spec import JobSpec

TEMPLATES = Path(__file__).parents[2] / "slurm"
QUEUES = ("queue", "eval_queue")


def render(plan: JobPlan, template: Path | None = None, exclude: tuple[str, ...] = ()) -> list[Script]:
    """The scripts of a plan; the training's first.

    Args:
        template: a file in place of the training's template (of a heterogeneous job, of its), or a folder with any of
            train.sbatch.j2, eval.sbatch.j2, het.sbatch.j2 and parts.j2; what it lacks is Vernier's own.
        exclude: nodes not to use, besides the site's.

    Raises:
        ConfigError: something cannot be said in a script, or the template cannot be read.
    """
    if plan.het:
        names = {"train+eval": "het.sbatch"}
    elif plan.eval is None or plan.members:
        names = {"train": "train.sbatch"}
    else:
        names = {"train": "train.sbatch", "eval": "eval.sbatch"}
    _refuse_options_given_twice(plan, names, template)
    scripts = []
    for component, name in names.items():
        facts = _facts(plan, component, name, exclude)
        spec = JobSpec.of(plan, component, facts["script"], facts["rank_python"], facts["mounts"])
        scripts.append(Script(component, facts["script"], _rendered(plan, component, name, template, exclude), spec))
    return scripts


def _refuse_options_given_twice(plan: JobPlan, names: dict[str, str], template: Path | None) -> None:
    """Refuses further options of a site profile that would override those of the job, or be overridden, in silence.

    Raises:
        ConfigError: a line for each.
    """
    site = plan.site
    bare = {key: getattr(site, key) and getattr(site, key).model_copy(update={"sbatch": []}) for key in QUEUES}
    without = replace(plan, site=site.model_copy(update=bare))
    problems: list[str] = []
    for component, name in names.items():
        text = _rendered(without, component, name, template, ())
        for part in component.split("+"):
            problems += given_twice(site, text, evaluator=part == "eval")
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def _rendered(plan: JobPlan, component: str, name: str, template: Path | None, exclude: tuple[str, ...]) -> str:
    import jinja2

    folders = [TEMPLATES]
    own = template or plan.site.template
    file = own if own is not None and own.is_file() and component != "eval" else None
    if own is not None and own.is_dir():
        folders.insert(0, own)
    elif own is not None and not own.exists():
        raise ConfigError(f"--template: {own} is not there; expected a file or a folder of *.sbatch.j2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is a shell script; what is put in goes through `q` or `o`
    )
    environment.filters |= {"q": lambda value: shlex.quote(str(value)), "o": in_option}
    facts = _facts(plan, component, name, exclude)
    asked = str(file or f"{name}.j2")
    try:
        source = file.read_text(encoding="utf-8") if file is not None else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--template: {asked} cannot be read: {error}") from None
    try:
        if source is not None:
            code = environment.compile(source, asked, asked)
            read = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        else:
            read = environment.get_template(asked)
        text = read.render(facts)
    except Exception as error:  # a template is a program, and may fail like one
        where, line = _place(error, asked, folders)
        said = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"--template: {where}{f', line {line}' if line else ''}: {' '.join(said.split())}") from None
    return text.lstrip("\n")


def _place(error: Exception, asked: str, folders: list[Path]) -> tuple[str, int | None]:
    """Which template failed, and in which line: the innermost one that the error came through."""
    line = getattr(error, "lineno", None)  # of a syntax error
    if line is not None:
        return str(getattr(error, "filename", None) or asked), line
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == asked or Path(frame.filename).parent in folders:
            return frame.filename, frame.lineno
    return asked, None


def _facts(plan: JobPlan, component: str, name: str, exclude: tuple[str, ...]) -> dict[str, Any]:
    """What templates may use."""
    config, site, run = plan.config, plan.site, plan.run
    container = site.container
    _refuse_unsayable(plan)
    main = _excluding(site.queue, exclude)
    beside = _excluding(site.evaluators_queue, exclude)
    inside = container.kind != "none"
    log = run.path / "logs" / f"slurm-{component}-{'%A_%a' if plan.members else '%j'}.out"
    mounts = [*container.mounts]
    for path in dict.fromkeys((plan.work_dir, run.path.parent, config.data_dir, config.reference_dir)):
        mounts.append(f"{path}:{path}")
    return {
        "name": config.name,
        "train": plan.train,
        "eval": plan.eval,
        "queue": beside if component == "eval" else main,
        "eval_queue": beside,
        "launch": config.launch,
        "memory": config.launch.memory or site.memory,
        "site": site,
        "container": container,
        "mounts": mounts,
        "work_dir": plan.work_dir,
        "jobs_dir": run.scripts,
        "run_dir": run.path,
        "log": log,
        "script": run.scripts / name,
        "python": sys.executable,
        "rank_python": site.python or ("python3" if inside else sys.executable),
        "sweep": plan.members > 0,
        "members": plan.members,
        "at_once": plan.at_once,
    }


def _refuse_unsayable(plan: JobPlan) -> None:
    """Refuses names that no script, or not this one's, can hold.

    Raises:
        ConfigError: says which.
    """
    config, site = plan.config, plan.site
    paths = {
        "run.dir": plan.run.path,
        "the current folder": plan.work_dir,
        "data.dir": config.data_dir,
        "eval.reference": config.reference_dir,
    }
    problems = []
    for what, path in paths.items():
        if not str(path).isprintable():
            problems.append(f"{what}: {str(path)!r} has a line break or control character; no job script can hold it")
        elif site.container.kind != "none" and re.search(r"""[\s,:;"'\\#$]""", str(path)):
            problems.append(
                f"{what}: {str(path)!r} has white space, quotes or one of , : ; # $ \\, which {site.container.kind} "
                "cannot mount; use another path"
            )
    if "\\" in str(plan.run.path):
        problems.append(f"run.dir: {str(plan.run.path)!r} has a backslash, which Slurm drops from a log's name")
    if site.container.kind == "enroot":
        problems += [
            f"--site: environment.{name}: has a line break, which enroot does not hand on"
            for name, value in site.environment.items()
            if "\n" in value
        ]
    if problems:
        raise ConfigError(*problems)


def _excluding(queue: Any, nodes: tuple[str, ...]) -> Any:
    if not nodes:
        return queue
    return queue.model_copy(update={"exclude": ",".join([*([queue.exclude] if queue.exclude else []), *nodes])})


def in_option(value: object) -> str:
    """A path as a line of #SBATCH takes it: in quotes, with % (which begins a pattern) only where we mean it."""
    text = str(value)
    folder, separator, last = text.rpartition("/")
    text = folder.replace("%", "%%") + separator + last
    if re.fullmatch(r"[A-Za-z0-9_./%+=:@,-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
