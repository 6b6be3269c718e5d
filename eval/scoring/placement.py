"""Where a model's weights go for scoring, by need: whole on every rank, or spread over all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import ConfigError, DataError
from configs.memory.scoring import placement
from eval.distributed.ranks import Ranks
from eval.reference.set import ReferenceSet
from eval.scoring.classify import make_classify_scorer
from eval.scoring.losses import LOGITS_BYTES, Scorer
from eval.scoring.masked import OBJECTIVES, make_scorer
from eval.scoring.model_shapes import model_shapes, on_meta
from eval.scoring.models import ADAPTER_CONFIG, load_for_scoring, read_config

ALONE = (*OBJECTIVES, "classify")  # objectives of one model, whose weights are whole on every rank


@dataclass(frozen=True)
class Scoring:
    """How to score: `objective` None is the reference set's own; `against` asks to stop at a verdict."""

    dtype: str
    objective: str | None = None
    weights: str = "auto"
    threads: int = 1
    order_seed: int | None = None
    against: Path | None = None
    margin_percent: float = 0.0
    trust_remote_code: bool = False
    fresh: bool = False  # takes up nothing that an earlier attempt left


def open_scorer(models: list[Path], reference: ReferenceSet, ranks: Ranks, how: Scoring) -> tuple[Any, Any, bool]:
    """(what scores batches, the model whose settings are recorded, whether its weights are sharded over the ranks).

    Raises:
        DataError: the models cannot be scored so, or fit on no rank.
    """
    scorer: Any
    how = replace(how, objective=how.objective or reference.objective)
    sharded = _is_sharded(models, reference, ranks, how)
    trust = how.trust_remote_code
    if how.objective in ALONE and len(models) > 1:
        raise DataError(f"--ensemble: is not there for the objective {how.objective}")
    if how.objective == "classify":
        scorer = make_classify_scorer(models[0], how.dtype, reference, ranks.device, trust_remote_code=trust)
    elif how.objective in OBJECTIVES:
        scorer = make_scorer(how.objective, models[0], how.dtype, reference, ranks.device, trust_remote_code=trust)
    elif sharded:
        length = reference.sequence_length
        from eval.scoring.fsdp import sharded_scorer  # a second of imports, for those who need it

        scorer = sharded_scorer(models[0], how.dtype, length, ranks, trust_remote_code=trust)
    else:
        first, *others = (
            load_for_scoring(directory, how.dtype, ranks.device, trust_remote_code=trust) for directory in models
        )
        scorer = Scorer(first, reference.sequence_length, others=others)
    return scorer, scorer.model, sharded


def _is_sharded(models: list[Path], reference: ReferenceSet, ranks: Ranks, how: Scoring) -> bool:
    """Whether the model's weights are spread over the ranks: as asked, or where one device does not hold them."""
    adapter = (models[0] / ADAPTER_CONFIG).is_file()
    plain = len(models) == 1 and how.objective not in ALONE and not adapter
    if how.weights != "auto":
        if how.weights == "sharded" and not plain:
            raise DataError(
                "--weights: an ensemble, a masked LM, a classifier or an adapter is scored with replicated weights only"
            )
        return how.weights == "sharded"
    if not plain:
        return False
    said, answer = "", 0
    if ranks.is_rank_zero:
        try:
            answer = int(_chosen(models[0], reference, ranks, how) == "sharded")
        except ConfigError as error:
            said, answer = str(error), 2
    answer = ranks.broadcast_int(answer)
    if answer == 2:
        raise DataError(f"{said or 'the model does not fit'}; --weights replicated tries it nevertheless")
    return answer == 1


def _chosen(model: Path, reference: ReferenceSet, ranks: Ranks, how: Scoring) -> str:
    """Where the weights go by the memory model; whole where the model cannot be built, which loading then refuses."""
    try:
        trust = how.trust_remote_code
        shapes = model_shapes(on_meta(read_config(model, trust_remote_code=trust), trust_remote_code=trust))
    except (ConfigError, DataError):
        return "replicated"
    return placement(
        shapes,
        how.dtype,
        sequence_length=reference.sequence_length,
        batch=int(np.bincount(reference.batch).max()),
        device_bytes=ranks.free_bytes(),
        ranks=ranks.world,
        logits_bytes=LOGITS_BYTES,
        shared_host=ranks.device.type == "cpu",
    )
