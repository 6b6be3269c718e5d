"""`vernier launch --on skypilot`: a SkyPilot task file for clouds and Kubernetes. Nothing is started here.

One node runs `vernier train`, which scores beside the training; of several nodes each runs a torchrun, and the ranks
score between steps. What a run writes goes to a bucket or a volume, where one is named: nodes come and go.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from configs.errors import ConfigError
from configs.load import dump_config
from configs.secret_names import is_secret
from configs.yaml.text import SettingsDumper
from launcher.backends.process import carried
from launcher.jobs.plan import JobPlan

DATA, REFERENCE, MODEL, RUNS = (f"/vernier/{name}" for name in ("data", "reference", "model", "runs"))
PORT = 29500
PYTHON = ".venv/bin/python"  # which `make setup` makes
TRIES = 20
OF_THIS_MACHINE = re.compile(r".*_(HOME|DIR|CACHE|PATH|FILE|IFNAME)")  # variables that mean nothing elsewhere
STORES = re.compile(r"[a-z0-9]+://")
SETUP_FAILS = (
    """trap 'code=$?; [ -n "${BASH_SOURCE[1]-}" ] || """
    """{ echo "error: site profile: $BASH_COMMAND: exit code $code" >&2; exit 1; }' ERR"""
)
STATE = "import json, sys; s = json.load(open(sys.argv[1])); print('again' if s.get('again') else s.get('exit_code'))"


class _Dumper(SettingsDumper):
    """Texts of several lines as they are read, not as one line with escapes."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def render_task(plan: JobPlan, *, accelerators: str | None = None, runs: str | None = None) -> str:
    """The task file's text.

    Args:
        accelerators: such as H100:8; default the site's, or its gpu_type with the plan's GPUs.
        runs: where the run directory is to outlive the nodes: a bucket such as s3://mine/runs (one node), or the name
            of a SkyPilot volume that all nodes mount.

    Raises:
        ConfigError: the plan cannot be said as a task.
    """
    several = plan.train.nodes > 1
    if several and (runs is None or STORES.match(runs)):
        raise ConfigError(
            f"launch.nodes: {plan.train.nodes} nodes write into one run directory, which needs a volume that all "
            f"mount{'; a bucket is none' if runs else ''}: sky volumes apply, then name the volume"
        )
    _check_paths(plan)
    gpus, each = _gpus(plan, accelerators)
    mounts: dict[str, Any] = {DATA: str(plan.config.data_dir)}
    if not plan.config.reference_dir.is_relative_to(plan.config.data_dir):
        mounts[REFERENCE] = str(plan.config.reference_dir)
    if plan.config.model.path is not None:
        mounts[MODEL] = str(plan.config.model.path)
    task: dict[str, Any] = {"name": _name(plan.config.name), "num_nodes": plan.train.nodes}
    task["resources"] = _resources(plan, gpus)
    task["workdir"] = str(plan.work_dir)
    if runs is not None and STORES.match(runs):
        mounts[RUNS] = {"source": runs, "mode": "MOUNT_CACHED"}
    elif runs is not None:
        task["volumes"] = {RUNS: runs}
    task["file_mounts"] = mounts
    names = [name for name in carried(os.environ) if not name.startswith("VERNIER_")]
    environment = {name: os.environ[name] for name in names if not OF_THIS_MACHINE.fullmatch(name)}
    environment |= plan.site.environment
    if environment:
        task["envs"] = environment
    secret = secret_names()
    if secret:
        task["secrets"] = dict.fromkeys(secret)  # names alone: sky launch --secret NAME takes the value from its shell
    task["setup"] = "\n".join([*([SETUP_FAILS, *plan.site.setup] if plan.site.setup else []), "make setup"])
    run_dir = f"{RUNS}/{plan.config.name}" if runs is not None else _folder_there(plan)
    config = _config_there(plan, run_dir, inline=several, reference=REFERENCE in mounts)
    task["run"] = _script(plan, config, run_dir, several=several, each=each)
    return _head(plan, secret, runs) + yaml.dump(task, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def secret_names() -> list[str]:
    """Variables here that ranks may need and that no file may hold."""
    ours = {name: value for name, value in os.environ.items() if name.startswith(("HF_", "HUGGING_FACE_"))}
    return sorted(name for name, value in ours.items() if is_secret(name, value))


def _folder_there(plan: JobPlan) -> str:
    """The run directory in what is sent along of this one, where nothing else keeps it."""
    inside = plan.run.path.is_relative_to(plan.work_dir)
    return str(plan.run.path.relative_to(plan.work_dir)) if inside else f"runs/{plan.config.name}"


def _name(name: str) -> str:
    """As SkyPilot takes names: no three marks in a row, none at the end."""
    return re.sub(r"[._-]+", "-", name).strip("-")


def _check_paths(plan: JobPlan) -> None:
    if not (plan.work_dir / ".ci" / "install-torch").is_file():
        raise ConfigError(
            f"--on: skypilot: {plan.work_dir} is sent along and set up there by `make setup`, and is no checkout of "
            "Vernier; launch from the folder of one"
        )
    if plan.config.baseline is not None:
        raise ConfigError(f"baseline: {plan.config.baseline} is not taken along by --on skypilot; set baseline=null")


def _gpus(plan: JobPlan, accelerators: str | None) -> tuple[str | None, int]:
    """(SkyPilot's accelerators, ranks a node)."""
    asked = accelerators or plan.site.accelerators
    wanted = plan.train.gpus_per_node
    if asked is None and wanted and plan.site.gpu_type:
        asked = f"{plan.site.gpu_type}:{wanted}"
    if asked is None:
        if wanted:
            raise ConfigError(
                f"launch.gpus_per_node: {wanted} GPUs of which kind? put accelerators: H100:{wanted} into --site"
            )
        return None, plan.train.ranks_per_node
    found = re.fullmatch(r"([A-Za-z0-9._-]+)(?::(\d+))?", asked)
    if not found:
        raise ConfigError(f"accelerators: {asked!r} should be a kind and a number, such as H100:8")
    count = int(found[2] or 1)
    if wanted and count != wanted:
        raise ConfigError(f"accelerators: {asked} has {count} GPUs a node, launch.gpus_per_node is {wanted}")
    if plan.train.ranks_per_node > count:
        raise ConfigError(f"accelerators: {asked} has {count} GPUs a node for {plan.train.ranks_per_node} ranks")
    return f"{found[1]}:{count}", plan.train.ranks_per_node


def _resources(plan: JobPlan, gpus: str | None) -> dict[str, Any]:
    out: dict[str, Any] = {"accelerators": gpus} if gpus else {"cpus": f"{plan.train.cpus_per_node}+"}
    memory = plan.config.launch.memory or plan.site.memory
    if memory and memory not in ("0", "0G"):
        number, unit = re.fullmatch(r"(\d+)([KMGT]?)", memory).groups()  # type: ignore[union-attr]
        gib = int(number) * {"K": 2**-20, "": 2**-10, "M": 2**-10, "G": 1, "T": 1024}[unit]
        out["memory"] = f"{max(1, round(gib))}+"
    return out


def _config_there(plan: JobPlan, run_dir: str, *, inline: bool, reference: bool) -> str:
    """The settings as the ranks read them over there."""
    config = plan.config
    score = {"reference": Path(REFERENCE if reference else f"{DATA}/reference")}
    if not reference and config.reference_dir != config.data_dir / "reference":
        score["reference"] = Path(DATA) / config.reference_dir.relative_to(config.data_dir)
    if inline and config.eval.placement != "none":
        score["placement"] = "inline"  # type: ignore[assignment]
    return dump_config(
        config.model_copy(
            update={
                "run": config.run.model_copy(update={"dir": Path(run_dir)}),
                "data": config.data.model_copy(
                    update={"dir": Path(DATA), "source": "python-stdlib", "tokenizer": None}
                ),
                "model": config.model.model_copy(update={"path": Path(MODEL) if config.model.path else None}),
                "eval": config.eval.model_copy(update=score),
            }
        )
    )


def _script(plan: JobPlan, config: str, run_dir: str, *, several: bool, each: int) -> str:
    given = f"/tmp/vernier-{_name(plan.config.name)}.yaml"
    flags = " ".join(word for word in plan.train.arguments if word.startswith("--"))
    flags = f"{flags} " if flags else ""
    lines = [f"cat >{given} <<'END OF SETTINGS'", config.rstrip("\n"), "END OF SETTINGS"]
    if not several:
        return "\n".join([*lines, f"exec .venv/bin/vernier train {given} {flags}".rstrip(), ""])
    state = shlex.quote(f"{run_dir}/state.json")
    return "\n".join(
        [
            *lines,
            'MASTER_ADDR=$(echo "$SKYPILOT_NODE_IPS" | head -n1)',
            f"for _ in $(seq {TRIES}); do",
            f"    {PYTHON} -m launcher.backends.agent --nproc-per-node={each} \\",
            '        --nnodes="$SKYPILOT_NUM_NODES" --node-rank="$SKYPILOT_NODE_RANK" \\',
            f'        --master-addr="$MASTER_ADDR" --master-port={PORT} \\',
            f"        --shutdown-timeout={plan.train.patience_s} --start={plan.config.launch.start} \\",
            f"        trainer {flags}{given}",
            "    # The agent turns every exit code into 1: how it ended, and whether it starts again, the run says.",
            f"    said=$({PYTHON} -c {shlex.quote(STATE)} {state})",
            '    [ "$said" = again ] || break',
            "done",
            'case $said in None | again | "") exit 1 ;; *) exit "$said" ;; esac',
            "",
        ]
    )


def _head(plan: JobPlan, secret: list[str], runs: str | None) -> str:
    words = "".join(f" --secret {name}" for name in secret)
    lines = [
        f"Trains {plan.config.name}. Written by `vernier launch --on skypilot`.",
        f"sky launch{words} FILE; as a managed job, which goes on after a preemption: sky jobs launch{words} FILE",
    ]
    if runs is None:
        lines.append(
            f"The run stays on the node's own disk, in ~/sky_workdir/{_folder_there(plan)}: copy it before sky down."
        )
    if plan.train.nodes > 1 and plan.eval is not None:
        lines.append("Of several nodes the training ranks score between steps (eval.placement: inline).")
    return "".join(f"# {line}\n" for line in lines)
