"""A rank for test_elastic: takes a checkpoint over at this world size and the stage given, and writes it again.

Arguments: config, checkpoint directory, run directory to write into, zero stage.
"""

from pathlib import Path

from configs.load import load_config, resolve
from configs.run.directory import RunDir
from eval.distributed.ranks import join, leave, local_world_size
from trainer.checkpoint.async_save import HostCopy
from trainer.checkpoint.checkpoint import copy_checkpoint, load_checkpoint, write_checkpoint
from trainer.data.prepare import load_dataset_facts
from trainer.engine.build import make_engine
from trainer.model.build import hf_config, make_model
from trainer.objectives import TrainableLM


def main(arguments: list[str]) -> None:
    given, stage = arguments[0], arguments[3]
    checkpoint, out = Path(arguments[1]), Path(arguments[2])
    config = resolve(load_config(given, [f"zero.stage={stage}"]), nproc=local_world_size())
    ranks = join(1)
    model = TrainableLM(make_model(config, hf_config(config.model, load_dataset_facts(config.data_dir))))
    engine, _ = make_engine(config, model, ranks.world)
    clock, _ = load_checkpoint(engine, checkpoint, 1)
    memory = HostCopy()
    copied = copy_checkpoint(engine, ranks, clock, memory)
    memory.fill()
    write_checkpoint(copied, RunDir(out), ranks)
    leave()
