"""How long an optimizer step would take: arithmetic of floating-point operations and of bytes sent between ranks.

It is a stated model, not a measurement: what the figures leave out is said at `step_time`, and in docs/plan.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.memory.scoring import ModelShapes

GB = 10**9
AGAIN = 4 / 3  # of the FLOPs where activations are computed again: a second forward pass, 2N more than 6N


@dataclass(frozen=True)
class Work:
    """What a step computes."""

    parameters: int  # that a token goes through: of experts only those it is sent to
    layers: int
    attention: int  # width of all query heads together: heads × width of a head
    sequence_length: int

    @staticmethod
    def of(shapes: ModelShapes, sequence_length: int) -> Work:
        """What a token of a model of these sizes computes."""
        return Work(shapes.active, shapes.layers, shapes.query, sequence_length)

    @property
    def flops_a_token(self) -> int:
        """Of the forward and backward pass: 6N + 12·L·H·Q·T.

        Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways" (2022), appendix B: N parameters, L layers, H
        heads of width Q, T tokens in a window. Nothing is counted twice where activations are computed again.
        """
        return 6 * self.parameters + 12 * self.layers * self.attention * self.sequence_length


@dataclass(frozen=True)
class Links:
    """How ranks are joined. Bandwidths are in bytes/s and one way."""

    ranks_a_node: int = 1
    rank_bandwidth: float = 200 * GB  # of one rank to the others of its node
    node_bandwidth: float = 50 * GB  # of a whole node to others
    latency_s: float = 5e-6  # of one hop


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    compute_s: float
    communication_s: float
    overlapped: bool  # communication goes on beside computation

    @property
    def total_s(self) -> float:
        if self.overlapped:
            return max(self.compute_s, self.communication_s)
        return self.compute_s + self.communication_s


def sent_a_step(parameters: int, *, stage: int, accumulation: int, weight_bytes: int) -> int:
    """Bytes that a rank sends for an optimizer step, but for the factor (ranks − 1) ÷ ranks.

    Rajbhandari et al., "ZeRO" (SC 2020), §7: an all-reduce of Ψ gradients is a reduce-scatter and an all-gather, 2Ψ.
    §7.1 and §7.2: stages 1 and 2 reduce-scatter gradients and all-gather weights, 2Ψ. §7.2.2: stage 3 gathers weights
    for the forward and again for the backward pass and reduce-scatters gradients, 3Ψ. With accumulation DeepSpeed does
    at every micro-batch what stage 2 and 3 need there: the reduce-scatter, and at stage 3 all three.
    """
    if stage == 3:
        passes = 3 * accumulation
    elif stage == 2:
        passes = accumulation + 1
    else:
        passes = 2
    return passes * parameters * weight_bytes


def step_time(
    work: Work,
    *,
    parameters: int,
    stage: int,
    ranks: int,
    tokens: int,
    accumulation: int,
    weight_bytes: int,
    bucket: int,
    flops: float,
    links: Links,
    checkpointing: bool = False,
    sending_included: bool = False,
) -> StepTime:
    """The time of an optimizer step over `ranks` ranks.

    Computation: FLOPs a token × tokens ÷ ranks ÷ `flops`; a third more where activations are computed again.
    Communication: rings. Each of the bytes of `sent_a_step` passes (ranks − 1)/ranks times over a rank's own link, and
    where there are several nodes as often over a node's; the slower of the two counts. To it comes the latency of
    (ranks − 1) hops for each collective: a bucket of parameters at a time, at stage 3 a layer at a time. Stages 0 to 2
    send after they have computed (DeepSpeed's default), stage 3 while it computes. The optimizer's update, the data
    and waiting for the slowest rank are left out.

    Args:
        parameters: all of them, which are what is sent.
        tokens: of the global batch.
        bucket: parameters sent at once.
        flops: operations/s that one rank attains.
        sending_included: that figure is of whole steps of just this kind, so nothing is added for sending.
    """
    again = AGAIN if checkpointing else 1.0
    compute_s = again * work.flops_a_token * tokens / ranks / flops
    if ranks == 1 or sending_included:
        return StepTime(compute_s, 0.0, False)
    sent = sent_a_step(parameters, stage=stage, accumulation=accumulation, weight_bytes=weight_bytes)
    slowest = links.rank_bandwidth
    if ranks > links.ranks_a_node:
        slowest = min(slowest, links.node_bandwidth)
    passes = sent // (parameters * weight_bytes)
    at_once = passes * (max(work.layers, -(-parameters // bucket)) if stage == 3 else -(-parameters // bucket))
    latency_s = at_once * (ranks - 1) * links.latency_s
    return StepTime(compute_s, sent * (ranks - 1) / ranks / slowest + latency_s, stage == 3)
