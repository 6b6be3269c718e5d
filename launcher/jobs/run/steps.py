"""What a job starts on its nodes: commands of srun, inside of a container where the site has one."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.jobs.plan import Component
from launcher.jobs.run.meet import Meeting
from launcher.jobs.spec import JobSpec

# Each node fills in its own. What programs write by the way goes to its own disk, into a folder of this job alone.
SCRATCH_READY = """mkdir -p -m 700 "$TMPDIR" && [ -O "$TMPDIR" ] && [ ! -L "$TMPDIR" ] || {
    echo "error: $TMPDIR cannot be made, or belongs to another user; scratch in the site profile names its folder" >&2
    exit 1
}
"""
# enroot hands on only the variables that it is told by name, and those of a task are known in the task. The image has
# its own PATH and libraries.
_BY_NAME = """for name in $(compgen -e); do
    case $name in PATH | HOME | PWD | OLDPWD | SHLVL | _ | LD_* | PYTHONPATH | PYTHONHOME | BASH_*) ;;
    *) set -- --env "$name" "$@" ;; esac
done; exec enroot start "$@\""""


def step(spec: JobSpec, group: Component, part: int | None, command: list[str], jobs: Path, scratch: str) -> list[str]:
    """srun with a command on each node of a rank-group. What a step does not inherit of Slurm's options is said again.

    Args:
        part: of a heterogeneous job; None: the job has one.
        jobs: the folder that tasks start in: no module lies there that `python -m` could take for ours.
        scratch: the folder on each node's own disk.
    """
    words = ["srun", *([] if part is None else [f"--het-group={part}"]), "--kill-on-bad-exit=1"]
    words += [f"--nodes={group.nodes}", f"--ntasks={group.nodes}", "--ntasks-per-node=1"]
    words += [f"--cpus-per-task={group.cpus_per_node}", "--export=ALL"]
    if spec.container == "pyxis":
        mounts = ",".join([*spec.mounts, f"{scratch}:{scratch}"])
        words += [f"--container-image={spec.image}", f"--container-mounts={mounts}", f"--container-workdir={jobs}"]
        words += spec.container_options
    return [*words, *spec.srun, *inside(spec, group, jobs, scratch), *command]


def inside(spec: JobSpec, group: Component, jobs: Path, scratch: str) -> list[str]:
    """The command that stands before that of the ranks, so that they are inside of a container."""
    if spec.container == "apptainer":
        binds = [word for mount in (*spec.mounts, scratch) for word in ("--bind", mount)]
        gpus = ["--nv"] if group.gpus_per_node else []
        return ["apptainer", "exec", *gpus, *binds, "--pwd", str(jobs), *spec.container_options, str(spec.image)]
    if spec.container == "enroot":
        mounts = [word for mount in (*spec.mounts, f"{scratch}:{scratch}") for word in ("--mount", mount)]
        first = ["bash", "-c", _BY_NAME, "enroot", "--rc", str(jobs / "enroot.rc")]
        return [*first, *mounts, *spec.container_options, str(spec.image)]
    return []


def prepare_container(spec: JobSpec, jobs: Path) -> None:
    """Has enroot not put an image's entry point before the command of the ranks."""
    if spec.container == "enroot":
        (jobs / "enroot.rc").write_text('exec "$@"\n')


def agent(spec: JobSpec, group: Component, meeting: Meeting, run: Path) -> list[str]:
    """One agent a node. Its own output goes to a log, and what ranks say to people to the job's: handed on as their
    stdin, the one stream that it leaves alone."""
    log = f'"$RUN/logs/{group.name}-torchrun-$SLURM_NODEID.log"'
    code = f'exec 0>&1 >>{log} 2>&1 && exec "$0" -m launcher.backends.agent --node-rank="$SLURM_NODEID" "$@"'
    options = [f"--nnodes={group.nodes}", f"--nproc-per-node={group.ranks_per_node}"]
    options += [f"--master-addr={meeting.address}", f"--master-port={meeting.port}"]
    options += [f"--shutdown-timeout={group.patience_s}", f"--start={spec.start}"]
    flags = group.arguments[:-1]  # the last is the config, which each member of a sweep has its own
    config = str(run / f"{group.name}-config.yaml")
    return ["bash", "-c", SCRATCH_READY + code, spec.rank_python, *options, group.module, *flags, config]


def preflight(spec: JobSpec, group: Component) -> list[str]:
    """Looks at a node before the ranks start."""
    gpus = ["--gpus", str(group.gpus_per_node)] if group.gpus_per_node else []
    code = SCRATCH_READY + 'exec "$0" -m launcher.preflight "$RUN" "$@"'
    return ["bash", "-c", code, spec.rank_python, *gpus]


def step_environment(group: Component, meeting: Meeting, variables: tuple[str, ...]) -> dict[str, str]:
    """The variables of a rank-group's steps. `variables`: names that the site gives, which count before ours."""
    own = {"MASTER_ADDR": meeting.address, "MASTER_PORT": str(meeting.port)}
    if meeting.here:
        own |= {name: os.environ.get(name) or "lo" for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    if group.threads and "OMP_NUM_THREADS" not in variables:
        own["OMP_NUM_THREADS"] = str(group.threads)
    return {**os.environ, **own}
