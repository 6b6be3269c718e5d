"""A sweep: one training with other settings and seeds, as members that share the data and the reference set.

Here it is written down, found again by a job array's index, and run on this machine. How its members are made is in
`launcher.sweep.members`, what came out of them in `launcher.sweep.table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.errors import ConfigError, DataError
from configs.files.atomic import read_json, write_atomic, write_json
from configs.load import dump_config, is_named, leaves, resolve
from configs.run.directory import RunDir
from configs.schema import NAME_PATTERN, Config
from configs.yaml.text import as_written
from launcher.backends.agent import one_thread
from launcher.sweep.members import DATA, Member, Sweep, members, told_once
from launcher.watch.run_index import SWEEP as FILE

__all__ = ["Member", "Sweep", "check_members", "member_of", "members", "read_sweep", "write_sweep"]


def check_members(
    sweep: Sweep, resolved: Callable[[Config], Config] = resolve, tell: Callable[[str], None] | None = None
) -> None:
    """Everything that can be found wrong with data, model and settings before any member starts.

    Args:
        resolved: fills in what hangs on the machine of the ranks; default that of this one.
        tell: told, once, what is allowed and perhaps not meant.

    Raises:
        ConfigError: what is wrong, a line each.
    """
    with one_thread():
        from trainer.check import check_run

    problems: dict[str, list[str]] = {}
    cautions: dict[str, list[str]] = {}
    for member in sweep.members:
        try:
            said: list[str] = []
            check_run(resolved(member.config), tell=said.append)
            for caution in said:
                cautions.setdefault(caution, []).append(member.name)
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(member.name)
    if problems:
        raise ConfigError(*told_once(problems, len(sweep.members), sweep.axes))
    if tell is not None and DATA in sweep.axes:
        tell(
            f"{DATA} is swept: only the data that eval.reference was prepared with is kept apart from it; other data "
            "may hold texts of it, and a member that has trained on them looks better than it is"
        )
    if tell is not None:
        for told in told_once(cautions, len(sweep.members), sweep.axes):
            tell(told)


def write_sweep(sweep: Sweep) -> Path:
    """Writes each member's train-config.yaml, then sweep.json, which says that all are there; gives the folder.

    The same sweep again changes nothing: what a member has already stays.

    Raises:
        ConfigError: another sweep, or a run, is in that place; names what differs.
    """
    if RunDir(sweep.path).config.is_file():
        raise ConfigError(f"{sweep.path}: is a run; name another place with --sweep-dir")
    if (sweep.path / FILE).exists():
        found = list(_differences(read_sweep(sweep.path), _content(sweep)))
        if found:
            tail = "go on with that one, or name another place with --sweep-dir"
            raise ConfigError(*(f"{sweep.path}: another sweep is there: {one}; {tail}" for one in found))
    try:
        for member in sweep.members:
            given = sweep.run(member).path / "train-config.yaml"
            if not given.is_file():  # that of a member which has trained is resolved for its machine
                given.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(given, dump_config(member.config), durable=True)
        if not (sweep.path / FILE).exists():
            write_json(sweep.path / FILE, _content(sweep), durable=True)
    except OSError as error:
        raise ConfigError(f"{sweep.path}: the sweep cannot be written ({error.strerror})") from None
    return sweep.path


def _content(sweep: Sweep) -> dict[str, Any]:
    settings = yaml.safe_load(dump_config(sweep.members[0].config))
    return {
        "kind": "sweep",
        "name": sweep.name,
        "config": sweep.source,
        "overrides": list(sweep.overrides),
        "sweep": {key: list(texts) for key, texts in sweep.axes.items()},
        "seeds": sweep.seeds,
        "settings": settings,  # of the first member
        "members": [{"name": m.name, "seed": m.seed, "values": m.values} for m in sweep.members],
    }


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What tells the sweep that is there from the one asked for, a line each."""
    swept = before["sweep"], now["sweep"]
    if swept[0].keys() != swept[1].keys():
        there, here = (" and ".join(keys) or "no key" for keys in swept)
        yield f"--sweep is over {there} there, over {here} now"
    for key in swept[0].keys() & swept[1].keys():
        if swept[0][key] != swept[1][key]:
            yield f"--sweep {key} is {','.join(swept[0][key])} there, {','.join(swept[1][key])} now"
    if before["seeds"] != now["seeds"]:
        yield f"--seeds is {before['seeds']} there, {now['seeds']} now"
    skipped = {"name", "run.dir", "nproc", "launch.", *swept[0], *swept[1]}
    was, is_now = dict(leaves(_today(before["settings"]))), dict(leaves(now["settings"]))
    for key in {**was, **is_now}:
        if not is_named(key, (*skipped, *(f"{one}." for one in skipped))) and was.get(key) != is_now.get(key):
            yield f"{key} is {as_written(was.get(key))} there, {as_written(is_now.get(key))} now"
    if swept[0] == swept[1] and before["seeds"] == now["seeds"] and before["members"] != now["members"]:
        yield f"its members are {before['members'][0]['name']} …, now {now['members'][0]['name']} …"


def _today(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the keys that have come since they were written, at their defaults."""
    try:
        return dict(yaml.safe_load(dump_config(Config.model_validate(settings))))
    except ValidationError:  # a key that is no more: it will be named
        return settings


def read_sweep(sweep_dir: Path) -> dict[str, Any]:
    """What sweep.json says: name, config, overrides, sweep (values by key), seeds, settings of the first member, and
    members (each with name, seed, values).

    Raises:
        DataError: there is none, or it is not one.
    """
    path = sweep_dir / FILE
    if not path.is_file():
        raise DataError(f"{sweep_dir}: not a sweep (it has no {FILE})")
    content = read_json(path)
    try:
        for member in content["members"]:
            if not NAME_PATTERN.fullmatch(member["name"]):
                raise ValueError(member["name"])
            int(member["seed"]), dict(member["values"])
        whole = content["kind"] == "sweep" and content["members"] and content.keys() >= {"sweep", "seeds", "settings"}
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise DataError(f"{path}: is not a sweep's file; move it away, and launch the sweep again")
    return dict(content)


def member_of(sweep_dir: Path, index: int) -> Path:
    """The run directory of the member with this index, from 0: a job array's task trains its train-config.yaml.

    Raises:
        ConfigError: there is no such member, or no such sweep.
    """
    found = read_sweep(sweep_dir)["members"]
    if not 0 <= index < len(found):
        raise ConfigError(f"{sweep_dir}: has no member {index}; they are 0 to {len(found) - 1}")
    run = sweep_dir / found[index]["name"]
    if not (run / "train-config.yaml").is_file():
        raise DataError(f"{run}: its train-config.yaml is missing; launch the sweep again")
    return run
