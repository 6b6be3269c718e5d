"""Run by torchrun in test_elastic: takes a checkpoint over at this world size and the stage given, and writes it again.

Arguments: config, checkpoint directory, run directory to write into, zero stage.
"""

import sys
from pathlib import Path

from configs.load import load_config, resolve
from configs.rundir import RunDir
from eval.ranks import join, leave, local_world_size
from trainer.checkpoints import copy_checkpoint, load_checkpoint, write_checkpoint
from trainer.data.prepare import load_dataset_facts
from trainer.engine import make_engine
from trainer.model import TrainableLM, hf_config, make_model
from trainer.saving import HostCopy

given, checkpoint, out, stage = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
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
