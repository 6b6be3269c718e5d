"""What a run has had to change to go on, kept in RUN/adapted.json for its next start: micro-batch, checkpointed
activations, batches that are passed over. The run's config stays as the user wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from configs.errors import EXIT_STOPPED, DataError, VernierError
from configs.files.atomic import read_json, write_json
from configs.load import micro_batch
from configs.run.directory import RunDir
from configs.schema import Config
from eval.distributed.ranks import PeerFailure, Ranks

FILE = "adapted.json"
_WITHOUT = "remove it, and the run goes on as its config says"


class RestartRequested(VernierError):
    """The ranks must start anew, with what `adapted.json` now says; `str()` of it is why. Ends with exit code 75."""

    exit_code = EXIT_STOPPED


@dataclass(frozen=True)
class Adaptations:
    """What differs from the config.

    Attributes:
        micro: most windows a rank takes at once; None as configured.
        gradient_checkpointing: activations are checkpointed, whatever the config says.
        passed_over: data positions that are never trained on, ascending.
        returns: how often training went back since checkpoint `from_step` was its newest.
    """

    micro: int | None = None
    gradient_checkpointing: bool = False
    passed_over: tuple[int, ...] = ()
    returns: int = 0
    from_step: int = 0


def read_adaptations(run: RunDir) -> Adaptations:
    """What the run has adapted; nothing where there is no file.

    Raises:
        DataError: the file is not what `write_adaptations` writes.
    """
    path = _path(run)
    if not path.exists():
        return Adaptations()
    try:
        found = read_json(path)
    except DataError as error:
        raise DataError(f"{error}; {_WITHOUT}") from None
    problem = _problem(found)
    if problem is not None:
        raise DataError(f"{path}: {problem}; {_WITHOUT}")
    return Adaptations(**{**found, "passed_over": tuple(found["passed_over"])})


def shared_adaptations(run: RunDir, ranks: Ranks) -> Adaptations:
    """What the first rank reads, on every rank: another node may see an older file for a moment. A collective.

    Raises:
        DataError: as `read_adaptations`.
    """
    text, problem = b"", ""
    if ranks.is_rank_zero:
        try:
            text = json.dumps(asdict(read_adaptations(run))).encode()
        except DataError as error:
            problem = str(error)
    _, words = ranks.first_message(problem)
    if words:
        raise DataError(words) if ranks.is_rank_zero else PeerFailure(words)
    box = torch.zeros(ranks.broadcast_int(len(text)), dtype=torch.uint8)
    if ranks.is_rank_zero:
        box = torch.tensor(list(text), dtype=torch.uint8)
    found = json.loads(bytes(ranks.broadcast(box).tolist()))
    return Adaptations(**{**found, "passed_over": tuple(found["passed_over"])})


def write_adaptations(run: RunDir, adaptations: Adaptations) -> None:
    """Puts them on the disk. Ranks that write the same at once leave the same."""
    run.path.mkdir(parents=True, exist_ok=True)
    write_json(_path(run), asdict(adaptations), durable=True)


def adapted(config: Config, adaptations: Adaptations) -> Config:
    """The config to train by: never a larger micro-batch, never less checkpointing than configured."""
    micro = min(config.batch.micro, adaptations.micro or config.batch.micro)
    return config.model_copy(
        update={
            "batch": config.batch.model_copy(update={"micro": micro}),
            "gradient_checkpointing": config.gradient_checkpointing or adaptations.gradient_checkpointing,
        }
    )


def _path(run: RunDir) -> Path:
    return run.path / FILE


def _problem(found: Any) -> str | None:
    names = set(asdict(Adaptations()))
    if not isinstance(found, dict) or set(found) != names:
        return f"expected an object with {', '.join(sorted(names))}"
    passed = found["passed_over"]
    if not isinstance(passed, list) or not all(map(_is_count, passed)) or passed != sorted(set(passed)):
        return "passed_over: expected positions, ascending"
    if found["micro"] is not None and not (_is_count(found["micro"]) and found["micro"] > 0):
        return f"micro: expected a number of windows or null, not {found['micro']!r}"
    if not isinstance(found["gradient_checkpointing"], bool):
        return f"gradient_checkpointing: expected true or false, not {found['gradient_checkpointing']!r}"
    for name in ("returns", "from_step"):
        if not _is_count(found[name]):
            return f"{name}: expected a count, not {found[name]!r}"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# What allocators say that have no error type of their own: the CPU's, the CUDA runtime's, cuBLAS's.
_NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be had. (What the kernel's OOM killer ends is told by nobody.)"""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def less_memory(
    config: Config, world: int, before: Adaptations, *, checkpoints: bool
) -> tuple[Adaptations, str] | None:
    """(what to adapt so that a step takes less memory, in words); None where nothing is left, or may not be.

    The micro-batch is halved; at one window activations are checkpointed. The global batch, and which windows are in
    it, stay: accumulation grows.

    Args:
        config: that training runs by, `before` included.
        checkpoints: whether the model's activations can be.
    """
    micro = micro_batch(config, world)
    if config.guards.on_out_of_memory == "fail":
        return None
    if micro > 1:
        share = config.batch.global_ // world
        smaller = max(m for m in range(1, micro // 2 + 1) if share % m == 0)
        return replace(before, micro=smaller), f"micro-batches of {smaller} windows in place of {micro}"
    if checkpoints and not config.gradient_checkpointing:
        words = "activations checkpointed (micro-batches are of 1 window)"
        return replace(before, micro=1, gradient_checkpointing=True), words
    return None


def after_out_of_memory(
    config: Config, run: RunDir, error: BaseException, *, rank: int, world: int, step: int, checkpoints: bool = True
) -> NoReturn:
    """A training step did not fit: writes down for the next start what takes less. For the rank that ran out, alone;
    on several at once each writes the same.

    Args:
        config: that training runs by, earlier adaptations included.
        step: the one that was being made.
        checkpoints: whether the model's activations can be.

    Raises:
        RestartRequested: with what is written to `adapted.json`.
        VernierError: nothing is left to adapt, or guards.on_out_of_memory is "fail".
    """
    found = less_memory(config, world, read_adaptations(run), checkpoints=checkpoints)
    if found is None:
        raise no_memory(config, rank=rank, world=world, doing=f"making step {step}") from error
    after, change = found
    told = f"rank {rank} ran out of memory at step {step}; going on with {change}"
    adapt(run, config, world, after, told, str(first_line(error)), step=step - 1, rank=rank)
    raise RestartRequested(told) from error


def adapt(
    run: RunDir, config: Config, world: int, after: Adaptations, told: str, error: str, *, step: int, rank: int
) -> None:
    """Writes down what `less_memory` gave, and an event that says so."""
    write_adaptations(run, after)
    micro = micro_batch(config, world)
    old = {"micro": micro, "gradient_checkpointing": config.gradient_checkpointing}
    new = {"micro": after.micro or micro, "gradient_checkpointing": after.gradient_checkpointing}
    run.add_event("out of memory", told, step=step, rank=rank, error=error, old=old, new=new)


@contextmanager
def memory_errors(config: Config, ranks: Ranks, doing: str) -> Iterator[None]:
    """What does not fit inside ends in a line that says what helps: a smaller micro-batch alone would not.

    Args:
        doing: as in `no_memory`.

    Raises:
        VernierError: in the place of torch's own error.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise no_memory(config, rank=ranks.rank, world=ranks.world, doing=doing) from error


@contextmanager
def adapting_to_memory(
    config: Config, run: RunDir, ranks: Ranks, *, step: Callable[[], int], checkpoints: bool
) -> Iterator[None]:
    """Steps that do not fit start the ranks again with smaller ones, as `after_out_of_memory` has it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        after_out_of_memory(
            config, run, error, rank=ranks.rank, world=ranks.world, step=step(), checkpoints=checkpoints
        )


def no_memory(config: Config, *, rank: int, world: int, doing: str) -> VernierError:
    """The error of one line for memory that cannot be had: what to change, cheapest first.

    Args:
        doing: what the rank was at, such as "making step 3" or "setting up the model and the optimizer".
    """
    ways = []
    if micro_batch(config, world) > 1:
        ways.append("batch.micro lower")
    if not config.gradient_checkpointing:
        ways.append("gradient_checkpointing=true")
    if config.zero.stage < 3:
        ways.append(f"zero.stage={min(3, config.zero.stage + 1)}{' or 3' if config.zero.stage < 2 else ''}")
    if config.zero.offload == "none":
        ways.append("zero.offload=cpu")
    ways += ["more ranks", "a shorter sequence_length", "a smaller model"]
    return VernierError(f"rank {rank} ran out of memory {doing}; what helps: {', '.join(ways)}")


def first_line(error: BaseException) -> str:
    """An error's kind, and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
