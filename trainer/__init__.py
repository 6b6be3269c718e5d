"""Training: data preparation (`trainer.data`), model and DeepSpeed engine, the loop, checkpoints, snapshots, metrics."""
