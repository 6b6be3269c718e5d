"""What TensorBoard's charts are called and what each shows. Training and reference loss share a chart: one tag, two
runs. A band is two runs more, beside the one whose line it is about, so that its edges are no charts of their own.
"""

from __future__ import annotations

LOSS, PERPLEXITY, ACCURACY = "1_loss/nats_per_token", "1_loss/perplexity", "1_loss/token_accuracy"
AUXILIARY = "1_loss/nats_per_token_added"
CHANGE, WIN_RATE, DIFFERENCES = "2_change/percent", "2_change/win_rate", "2_change/percent_of_each_sample"
BASELINE, BASELINE_MEAN = "2_change/vs_baseline_nats", "2_change/vs_baseline_nats_mean"
LOW, HIGH = "-low95", "-high95"  # behind the name of a run's folder: those of its bands

DESCRIPTIONS = {
    LOSS: "Loss in nats per token. train: of each step's batch. eval: on the reference set, the same texts at each "
    "step; its low95 and high95 are ± 1.96 standard errors, clustered by document.",
    PERPLEXITY: "exp of the loss on the reference set.",
    ACCURACY: "Share of the reference set's tokens that the model ranks first.",
    AUXILIARY: "What the model adds to its loss (a router's balance, say), in nats per token.",
    CHANGE: "Paired change of the reference loss from the scored step before, in percent; below 0 is better. low95 and "
    "high95: its 95 % interval, clustered by document.",
    WIN_RATE: "Share of the reference set's samples whose loss is lower than at the scored step before.",
    DIFFERENCES: "Each sample's change of loss per token, in percent of the mean loss at the scored step before.",
    BASELINE: "Training loss minus that of `baseline` on the same batch, in nats per token; below 0 is better.",
    BASELINE_MEAN: "Mean of these differences so far; low95 and high95 hold at all steps together (95 %).",
    "3_speed/tokens_per_s": "Tokens trained on in a second, over all ranks.",
    "3_speed/mfu": "Model FLOPs utilisation: what training needs of the device's peak (PaLM, appendix B).",
    "3_speed/step_s": "Seconds of a step.",
    "4_health/grad_norm": "Norm of the gradient over all ranks, before it is clipped.",
    "4_health/lr": "Learning rate.",
    "4_health/memory_gib": "Most memory that rank 0 has held, GiB: of its GPU, else of the process.",
}
# Of a step's line in metrics.jsonl, what is shown, and as what.
OF_STEP = {
    "loss": LOSS,
    "auxiliary_loss": AUXILIARY,
    "tokens_per_s": "3_speed/tokens_per_s",
    "mfu": "3_speed/mfu",
    "step_s": "3_speed/step_s",
    "grad_norm": "4_health/grad_norm",
    "lr": "4_health/lr",
    "memory_gib": "4_health/memory_gib",
}
