"""What Hugging Face and its scripts call a setting, and what it is here; for the answer to a key that is unknown."""

from __future__ import annotations

_ALWAYS_LOGGED = "every step is logged, to metrics.jsonl and TensorBoard"
_NOT_YET = "nothing like it yet"
_SAVED = "checkpoint.every (to go on from) and snapshot.every (to score and use)"
_EVALUATED = "snapshot.every, since each snapshot is scored; eval.placement says by whom (none: by nobody)"
_BATCH = "batch.global, of all ranks together; batch.micro is the most that a rank takes at once"
_EPOCHS = "epochs, in place of steps"
_HUB = f"{_NOT_YET}; a snapshot is a Hugging Face directory: push it with `hf upload`"
_DATA = "windows are read from memory-mapped shards, no workers are needed; leave it out"
_BEST = "`vernier compare RUN` names the best step, and snapshot.keep never drops it"

# By name: the key here with what to mind, or why there is none.
HUGGING_FACE = {
    "adafactor": "optimizer.name (adamw or adam)",
    "adam_beta1": "optimizer.betas, both in a list: [0.9, 0.95]",
    "adam_beta2": "optimizer.betas, both in a list: [0.9, 0.95]",
    "adam_epsilon": "optimizer.eps",
    "auto_find_batch_size": "guards.on_out_of_memory, adapt by default",
    "batch_size": _BATCH,
    "bf16": "precision: bf16",
    "bf16_full_eval": "eval.dtype: bf16",
    "block_size": "sequence_length",
    "data_seed": "seed",
    "dataloader_drop_last": _DATA,
    "dataloader_num_workers": _DATA,
    "dataloader_pin_memory": _DATA,
    "dataloader_prefetch_factor": _DATA,
    "dataset_name": "data.source: files, folders or a saved data set",
    "dataset_text_field": "data.text_field",
    "ddp_backend": "the launcher's: nccl on GPUs, gloo on CPU",
    "ddp_timeout": "guards.hang_s, and eval.timeout_s of the evaluator",
    "do_eval": _EVALUATED,
    "do_train": "the command `vernier train`",
    "early_stopping_patience": "stop_when.patience, or better stop_when.gain_below",
    "eval_accumulation_steps": "reference.batch; scoring holds no logits",
    "eval_dataset": "eval.reference, a reference set that `vernier prepare` made",
    "eval_on_start": "snapshot.at: [0]",
    "eval_steps": _EVALUATED,
    "eval_strategy": _EVALUATED,
    "evaluation_strategy": _EVALUATED,
    "fp16": "precision: fp16",
    "fp16_full_eval": "eval.dtype: bf16 (fp16 is not scored in)",
    "fsdp": "zero.stage: 3 shards weights, as FSDP does",
    "fsdp_config": "zero.stage: 3 shards weights, as FSDP does",
    "full_determinism": "deterministic",
    "gradient_accumulation_steps": "batch.accumulation, in place of batch.global",
    "greater_is_better": _BEST,
    "group_by_length": "data.packing: documents, which leaves little to pad",
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_token": _HUB,
    "label_smoothing_factor": _NOT_YET,
    "learning_rate": "optimizer.lr",
    "load_best_model_at_end": _BEST,
    "local_rank": "the launcher's to tell; leave it out",
    "logging_dir": f"run.dir: TensorBoard's files lie in its tensorboard/; {_ALWAYS_LOGGED}",
    "logging_first_step": _ALWAYS_LOGGED,
    "logging_steps": _ALWAYS_LOGGED,
    "logging_strategy": _ALWAYS_LOGGED,
    "lr_scheduler_kwargs": "schedule.min_ratio, schedule.power and their neighbours",
    "lr_scheduler_type": "schedule.name: cosine, linear, constant, wsd, inverse_sqrt, polynomial, …",
    "max_grad_norm": "clip_grad_norm",
    "max_length": "sequence_length",
    "max_seq_length": "sequence_length",
    "max_steps": "steps",
    "metric_for_best_model": _BEST,
    "model_name_or_path": "model.path (a directory), or model.type with random weights",
    "neftune_noise_alpha": _NOT_YET,
    "no_cuda": "the environment: CUDA_VISIBLE_DEVICES= trains on the CPU",
    "num_epochs": _EPOCHS,
    "num_train_epochs": _EPOCHS,
    "optim": "optimizer.name: adamw or adam",
    "output_dir": "run.dir",
    "overwrite_output_dir": "the option --fresh of `vernier train`; the old run is moved, not deleted",
    "per_device_eval_batch_size": "reference.batch, a part of the reference set; eval.nproc ranks score",
    "per_device_train_batch_size": f"batch.micro; the whole batch is {_BATCH.partition(';')[0]}",
    "push_to_hub": _HUB,
    "report_to": f"callbacks, for loggers of your own; {_ALWAYS_LOGGED}",
    "resume_from_checkpoint": "the same command once more goes on from the last checkpoint",
    "run_name": "name",
    "save_only_model": _SAVED,
    "save_steps": _SAVED,
    "save_strategy": _SAVED,
    "save_total_limit": "checkpoint.keep and snapshot.keep",
    "text_column_name": "data.text_field",
    "tf32": _NOT_YET,
    "tokenizer_name": "data.tokenizer (a directory)",
    "torch_compile": _NOT_YET,
    "torch_dtype": "precision",
    "train_file": "data.source",
    "use_cpu": "the environment: CUDA_VISIBLE_DEVICES= trains on the CPU",
    "validation_file": "eval.reference, a reference set that `vernier prepare` made",
    "warmup_ratio": "schedule.warmup_ratio",
    "warmup_steps": "schedule.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
}


def answer(key: str) -> str | None:
    """What a setting of that name (its last part, `-` or `_` in it) is here; None where the name is nobody's."""
    name = key.rpartition(".")[2].lstrip("-").replace("-", "_").lower()
    return HUGGING_FACE.get(name)
