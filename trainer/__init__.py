"""Training: data preparation (`trainer.data`), model, DeepSpeed engine, the loop, checkpoints, snapshots, metrics."""
