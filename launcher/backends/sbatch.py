"""sbatch: what options a script sets, in which environment it is submitted, and what is said where it is refused.

Of one option sbatch takes the command line's before a variable's (SBATCH_…), and that before the script's own (man
sbatch, INPUT ENVIRONMENT VARIABLES). A variable of the user's is to count only where the script says nothing of the
matter, so others are kept from sbatch, and named.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.errors import ConfigError, VernierError
from configs.files.atomic import write_atomic
from launcher.backends.process import OWN_RANK
from launcher.jobs.site import Site
from launcher.jobs.spec import JobSpec

SUBMIT_S = 60.0
PROFILE = "of the site profile"
SHORT = {  # one-letter options of sbatch and srun, by their long names
    "A": "account",
    "C": "constraint",
    "G": "gpus",
    "J": "job-name",
    "K": "kill-on-bad-exit",
    "N": "nodes",
    "W": "wait",
    "a": "array",
    "c": "cpus-per-task",
    "n": "ntasks",
    "o": "output",
    "p": "partition",
    "q": "qos",
    "t": "time",
    "w": "nodelist",
    "x": "exclude",
}
SAME = {  # options that say the same thing in other words, as one of them
    "ntasks": "ntasks-per-node",
    "gpus": "gpus-per-node",
    "gpus-per-task": "gpus-per-node",
    "mem-per-cpu": "mem",
    "mem-per-gpu": "mem",
    "no-requeue": "requeue",
}
VARIABLES = {"time": "SBATCH_TIMELIMIT", "array": "SBATCH_ARRAY_INX", "mem": "SBATCH_MEM_PER_NODE"}  # not by the rule
NEVER = {"array": "--sweep makes arrays of jobs", "wait": "vernier status says how it stands"}
OWNERS = {  # where our own value of an option comes from
    "nodes": "launch.nodes",
    "ntasks-per-node": "launch.ranks_per_node",
    "cpus-per-task": "launch.cpus_per_rank",
    "gpus-per-node": "launch.gpus_per_node",
    "gres": "launch.gpus_per_node",
    "mem": "launch.memory",
    "time": "launch.time",
    "signal": "launch.signal_s",
    "job-name": "name",
    "output": "run.dir",
    "open-mode": "launch, so that each turn goes on with the log",
    "requeue": f"requeue {PROFILE}",
    "export": f"export {PROFILE}",
    **{key: f"queue.{key} {PROFILE}" for key in Site.model_fields["queue"].annotation.model_fields},  # type: ignore[union-attr]
}
OF_STEPS = (
    "nodes",
    "ntasks-per-node",
    "cpus-per-task",
    "export",
    "het-group",
    "kill-on-bad-exit",
)  # what srun is given
OF_PYXIS = ("container-image", "container-mounts", "container-workdir")
# Inside of a job Slurm has said with these what that job is, and a further job's srun would take them for its own
# options. What Slurm tells no job is the user's, and stays.
OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND")
OF_THE_USER = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SLURM_MPI_TYPE", "SLURM_DEBUG_FLAGS")
OF_A_RANK = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "OMPI_UNIVERSE_SIZE")
_SETTINGS = {  # a word of what sbatch says when it refuses → the option that it is about, or where to mend it
    "time limit": "time",
    "account": "account",
    "qos": "qos",
    "partition": "partition",
    "reservation": "reservation",
    "feature": "constraint",
    "gres": "gres",
    "generic resource": "gres",
    "memory": "mem",
    "node count": "nodes",
    "node configuration": "launch.nodes, launch.gpus_per_node, launch.cpus_per_rank and launch.memory",
    "processors": "cpus-per-task",
}
_MORE = {
    "time": ", and what sinfo says of the partition",
    "partition": ", and sinfo",
    "gres": f", and gpu_option and gpu_type {PROFILE}",
}


@dataclass(frozen=True)
class Script:
    """A script to submit. `component`: train, eval, or train+eval for a heterogeneous job."""

    component: str
    path: Path
    text: str
    spec: JobSpec

    def write(self) -> None:
        """Puts it where it is submitted from, and beside it what its job's supervisor is told."""
        write_atomic(self.path, self.text)
        self.spec.write()


def options_of(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of each option in a list of words: `-N2`, `-N 2`, `--nodes=2` and `--nodes 2` are one."""
    name = None
    for word in words:
        if word.startswith("--"):
            if name is not None:
                yield name, ""
            name, equals, value = word[2:].partition("=")
            if equals:
                yield name, value
                name = None
        elif word.startswith("-") and len(word) > 1:
            if name is not None:
                yield name, ""
            name = SHORT.get(word[1], word[1])
            if word[2:]:
                yield name, word[2:].removeprefix("=")
                name = None
        elif name is not None:
            yield name, word
            name = None
    if name is not None:
        yield name, ""


def set_by(text: str) -> dict[str, str]:
    """What a script sets, each with the option that does."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            for name, value in options_of(_words(line.removeprefix("#SBATCH "))):
                found[_matter(name, value)] = f"--{name}={value}" if value else f"--{name}"
    return found


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # sbatch's to refuse
        return line.split()


def _matter(name: str, value: str) -> str:
    """What an option is about, under one name."""
    return "gpus-per-node" if name == "gres" and value.startswith("gpu") else SAME.get(name, name)


def given_twice(site: Site, text: str, *, evaluator: bool) -> Iterator[str]:
    """A line for each further option of a site profile that a job sets already: one of the two would count in silence.

    Args:
        text: a script as it is without those.
        evaluator: it is the evaluator's.
    """
    ours = set_by(text)
    section = "eval_queue" if evaluator and site.eval_queue is not None else "queue"
    for line in (site.evaluators_queue if evaluator else site.queue).sbatch:
        for name, value in options_of(_words(line)):
            matter = _matter(name, value)
            if matter in ours or matter in NEVER:
                said = f"the job says so by {_owner(matter, section)}" if matter in ours else NEVER[matter]
                yield f"--site: {section}.sbatch: {line!r} would override another option: {said}; leave it out here"
    steps = (*OF_STEPS, *(OF_PYXIS if site.container.kind == "pyxis" else ()))
    for line in site.srun:
        for name, value in options_of(_words(line)):
            matter = _matter(name, value)
            if matter in steps:
                said = f"ranks are started with their own; see {_owner(matter, section)}"
                yield f"--site: srun: {line!r} would override another option: {said}; leave it out here"


def _owner(matter: str, section: str = "queue") -> str:
    return OWNERS.get(matter, f"--{matter}").replace("queue.", f"{section}.")


def set_aside(text: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of the user's for sbatch that do not count for a script, each with why, in a line."""
    ours = set_by(text)
    found = {}
    for matter, option in ours.items():
        names = _variables(matter)
        gpus = matter == "gpus-per-node" and environment.get("SBATCH_GRES", "").startswith("gpu")
        if option.startswith("--gres") or gpus:
            names.append("SBATCH_GRES")
        for name in names:
            if name in environment:
                found[name] = f"{name} does not count: the job has {option} by {_owner(matter)}"
    for matter, why in NEVER.items():
        name = _variables(matter)[0]
        if name in environment:
            found.setdefault(name, f"{name} does not count: {why}")
    return found


def _variables(matter: str) -> list[str]:
    """The variables by which sbatch takes an option, and others that say the same."""
    same = [matter, *(name for name, of in SAME.items() if of == matter)]
    return [VARIABLES.get(name, f"SBATCH_{name.upper().replace('-', '_')}") for name in same]


def submit_environment(text: str = "") -> dict[str, str]:
    """What sbatch, and by it a job, inherits: ours, without what a job or rank that we may be in ourselves was given.

    Args:
        text: the script; variables of the user's for what it says itself are left out as well.
    """
    left_out = {*OWN_RANK, *set_aside(text, os.environ)}
    given: tuple[str, ...] = OF_A_RANK
    if "SLURM_JOB_ID" in os.environ:
        given += OF_A_JOB
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        given += ("OMPI_",)  # mpirun tells its ranks by OMPI_MCA_… where it is
    return {
        name: value
        for name, value in os.environ.items()
        if name not in left_out and (name in OF_THE_USER or not name.startswith(given))
    }


def submit(script: Script, *options: str, site: Site | None = None) -> str:
    """Submits a script; gives the job's id.

    Raises:
        ConfigError: there is no sbatch here, or it refuses; says what it said.
        VernierError: it does not answer, or not with a job: nobody knows whether there is one.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("--on: slurm: sbatch is not on this machine's PATH; launch from a login node of the cluster")
    command = ["sbatch", "--parsable", *options, str(script.path)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SUBMIT_S,
            check=False,
            env=submit_environment(script.text),
        )
    except subprocess.TimeoutExpired:
        raise VernierError(f"sbatch has not answered for {SUBMIT_S:.0f} s; see squeue whether it has the job") from None
    if done.returncode != 0:
        said = done.stderr.strip() or f"(nothing, and exit code {done.returncode})"
        raise ConfigError(f"{script.component}: its job is refused by sbatch{_where(said, script, site)}\n{said}")
    jobs = [line.split(";")[0] for line in done.stdout.split() if re.fullmatch(r"\d+(;.*)?", line)]
    if not jobs:
        raise VernierError(
            f"{script.component}: sbatch gave no number of a job; see squeue whether it has one\n{done.stdout.strip()}"
        )
    return jobs[-1]


def _where(said: str, script: Script, site: Site | None) -> str:
    """The setting, or variable, that what sbatch said is about."""
    matter = next((about for word, about in _SETTINGS.items() if word in said.lower()), None)
    if matter is None:
        return ""
    if matter not in OWNERS:
        return f"; see {matter}"
    if matter not in set_by(script.text):
        used = [name for name in _variables(matter) if name in os.environ]
        if used:
            return f"; see {used[0]} in your environment"
    own = script.component == "eval" and site is not None and site.eval_queue is not None
    return f"; see {_owner(matter, 'eval_queue' if own else 'queue')}{_MORE.get(matter, '')}"


def release(job: str) -> None:
    """Lets a job go that was submitted to be held.

    Raises:
        VernierError: it is still held; says how to let it go.
    """
    done = subprocess.run(["scontrol", "release", job], capture_output=True, text=True, timeout=SUBMIT_S, check=False)
    if done.returncode != 0:
        raise VernierError(f"job {job} is held, and was not let go ({done.stderr.strip()}): scontrol release {job}")
