"""Kills trainings at random, round after round, and holds each against the run that was never killed: `make torture`.

What was done is in DIR/rounds.jsonl, so the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.run.directory import read_jsonl

from .killing import RECIPE, ROOT, said, start, stop_all, undergo
from .rounds import Round, Settings, draw_round
from .same import differences

CODE = ("configs", "eval", "trainer", "launcher")
INTERRUPTED = 130


class NoReference(Exception):
    """There is nothing to hold a killed run against."""


@dataclass(frozen=True)
class Places:
    """Where the data, the runs that nobody disturbs and those that are killed lie."""

    directory: Path

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def reference(self, settings: Settings) -> Path:
        """Of this code: another may train to other bits."""
        return self.directory / f"undisturbed-{_fingerprint()}" / settings.reference.name

    def run(self, round_: Round) -> Path:
        return self.directory / "killed" / f"seed-{round_.seed}-round-{round_.number:05d}"


def _fingerprint() -> str:
    """Of all that decides a run's bits."""
    digest = hashlib.sha256()
    files = sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))
    for path in [*files, ROOT / RECIPE]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def prepare(places: Places) -> None:
    """The data, once."""
    if not (places.data / "manifest.json").is_file():
        command = [sys.executable, "-m", "launcher.cli", "prepare", RECIPE, f"data.dir={places.data}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def undisturbed(settings: Settings, places: Places) -> Path:
    """The run that nobody kills; made where it is not there yet.

    Raises:
        NoReference: it did not end well.
    """
    run = places.reference(settings)
    whole = run.with_name(f"{run.name}.whole")
    if not whole.exists():
        shutil.rmtree(run, ignore_errors=True)
        run.parent.mkdir(parents=True, exist_ok=True)
        training = start(settings.reference, places.data, run)
        try:
            code = training.wait()
        finally:
            stop_all(training, run)
        if code:
            raise NoReference(f"{run}: nobody killed it, and it ended with {code}; see {said(run)}")
        whole.touch()
    return run


def play(round_: Round, places: Places) -> dict[str, Any]:
    """One round: facts of it for the log, with what went `wrong`. The run stays where something did."""
    straight, run = undisturbed(round_.settings, places), places.run(round_)
    for path in (run, said(run)):
        _remove(path)
    run.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    done = undergo(round_, places.data, run)
    scored = round_.settings.placement != "none"
    wrong = done.wrong or differences(straight, run, scored=scored)
    if not wrong:
        for path in (run, said(run)):
            _remove(path)
    return {
        **round_.facts(),
        "killed": [kill.fault for kill in done.fired],
        "not_killed": len(round_.kills) - len(done.fired),  # it was done before
        "attempts": done.attempts,
        "ending_s": round(done.ending_s, 2),
        "seconds": round(time.monotonic() - started, 1),
        "wrong": wrong,
    }


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def tell(facts: dict[str, Any]) -> str:
    """A line a round, and one for each thing that went wrong."""
    late = f", {facts['not_killed']} too late" if facts["not_killed"] else ""
    kills = "; ".join(facts["kills"]) + late
    line = f"{facts['number']:5d}  {facts['settings']:<24} {facts['seconds']:6.1f} s  {kills}: "
    return line + ("the same bits" if not facts["wrong"] else "\n       ".join(["WRONG", *facts["wrong"]]))


def main(arguments: list[str] | None = None) -> int:
    """Plays the rounds that have not been played; gives 1 where any of them went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.torture", description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=Path("build/torture"), help="where everything goes")
    parser.add_argument("--log", type=Path, help="JSON lines, a round each; default DIR/rounds.jsonl")
    parser.add_argument("--only", type=int, metavar="N", help="play round N alone, again if need be; not logged")
    parser.add_argument("--brief", action="store_true", help="the shorter rounds that the tests play")
    asked = parser.parse_args(arguments)
    # A shell that starts it in the background has it ignore Ctrl-C; whoever sends one by hand means it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    places = Places(asked.dir.resolve())
    places.directory.mkdir(parents=True, exist_ok=True)
    log = asked.log or places.directory / "rounds.jsonl"
    try:
        prepare(places)
        if asked.only is not None:
            facts = play(draw_round(asked.seed, asked.only, brief=asked.brief), places)
            print(tell(facts))
            return int(bool(facts["wrong"]))
        return _play_all(asked.seed, asked.rounds, places, log, brief=asked.brief)
    except NoReference as error:
        print(error)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the round that was being played")
        return INTERRUPTED


def _play_all(seed: int, rounds: int, places: Places, log: Path, *, brief: bool) -> int:
    played = {one["number"]: one for one in read_jsonl(log) if (one["seed"], one["brief"]) == (seed, brief)}
    for number in (n for n in range(rounds) if n not in played):
        facts = {**play(draw_round(seed, number, brief=brief), places), "brief": brief}
        played[number] = facts
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")
        print(tell(facts), flush=True)
        if facts["wrong"]:
            words = f"--seed {seed} --only {number}" + (" --brief" if brief else "")
            again = f"{sys.executable} -m tests.faults.torture --dir {places.directory} {words}"
            print(f"       again: {again}", flush=True)
    counted = [played[number] for number in range(rounds)]
    wrong = [one["number"] for one in counted if one["wrong"]]
    killed = Counter(fault for one in counted for fault in one["killed"])
    kills = sum(killed.values())
    print(f"{len(counted)} rounds of seed {seed}, {kills} kills; wrong: {len(wrong)} {wrong or ''}")
    print(", ".join(f"{fault} {count}" for fault, count in sorted(killed.items())))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
