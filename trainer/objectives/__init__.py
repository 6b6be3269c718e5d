"""What is learnt, and by which loss: a file for each kind of training, and one line for it in the table here.

An objective says which kind of model it trains, what that is fed, and how its loss is made of it. Data, loop, engine,
checkpoints and scoring know no more of it than `Objective` says.
"""

from collections.abc import Callable

from configs.schema import Config
from trainer.objectives.causal import Causal, TrainableLM
from trainer.objectives.classify import Classify
from trainer.objectives.masked import Masked
from trainer.objectives.objective import Objective

OBJECTIVES: dict[str, Callable[[Config], Objective]] = {
    "causal": Causal,
    "masked": Masked,
    "instruct": Causal,  # of conversations: data and scoring know which tokens are the assistant's
    "classify": Classify,
}

__all__ = ["OBJECTIVES", "Objective", "TrainableLM", "objective_of"]


def objective_of(config: Config) -> Objective:
    """What a config trains.

    Raises:
        VernierError: its data does not do for that.
    """
    return OBJECTIVES[config.objective.name](config)
