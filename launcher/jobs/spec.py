"""What a job's supervisor is told: the rank-groups of the job and what the site wants, as a file beside its script."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import DataError
from configs.files.atomic import read_json, write_json
from configs.run.directory import RunDir
from launcher.jobs.plan import Component, JobPlan


@dataclass(frozen=True)
class JobSpec:
    """A job as it was launched. Its settings are in the run, this is what they do not say.

    Attributes:
        component: train, eval, or train+eval for a heterogeneous job.
        groups: its rank-groups, training's first.
        script: what sbatch is given again where the site does not queue a job again.
        rank_python: the Python of the ranks; inside of a container, the container's.
        mounts: of the container, SRC:DEST each.
        srun: further options of srun.
        scratch: folder on each node's own disk; may have $NAME in it.
        variables: names that the script exports by the site's word, which count before ours and the file's.
        tasks: of an array: each is a member of the sweep; 0: a single run.
    """

    component: str
    groups: tuple[Component, ...]
    script: str
    rank_python: str
    container: str
    image: str | None
    container_options: tuple[str, ...]
    mounts: tuple[str, ...]
    srun: tuple[str, ...]
    scratch: str
    environment_file: str | None
    variables: tuple[str, ...]
    requeue: bool
    signal_s: int
    start: str
    preflight: bool
    board: bool
    tasks: int

    @staticmethod
    def of(plan: JobPlan, component: str, script: Path, rank_python: str, mounts: list[str]) -> JobSpec:
        """Of one of a plan's jobs."""
        site, launch = plan.site, plan.config.launch
        return JobSpec(
            component=component,
            groups=tuple(group for group in plan.components if group.name in component.split("+")),
            script=str(script),
            rank_python=rank_python,
            container=site.container.kind,
            image=site.container.image,
            container_options=tuple(site.container.options),
            mounts=tuple(mounts),
            srun=tuple(site.srun),
            scratch=site.scratch,
            environment_file=None if site.environment_file is None else str(site.environment_file),
            variables=tuple(site.environment),
            requeue=site.requeue,
            signal_s=launch.signal_s,
            start=launch.start,
            preflight=launch.preflight and component == "train",
            board=launch.board and component == "train",
            tasks=plan.members,
        )

    def write(self) -> None:
        """Writes it beside its script."""
        write_json(_path(Path(self.script).parent, self.component), asdict(self))


def read_spec(run: RunDir, component: str) -> JobSpec:
    """What was launched.

    Raises:
        DataError: it is not there, or not as it was written.
    """
    path = _path(run.scripts, component)
    try:
        found: dict[str, Any] = dict(read_json(path))
        groups = tuple(_component(one) for one in found.pop("groups"))
        lists = {key: tuple(value) for key, value in found.items() if isinstance(value, list)}
        return JobSpec(groups=groups, **{**found, **lists})
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}); vernier launch writes it anew") from None


def _component(found: dict[str, Any]) -> Component:
    return Component(**{**found, "arguments": tuple(found["arguments"])})


def _path(scripts: Path, component: str) -> Path:
    return scripts / f"{component}.json"
