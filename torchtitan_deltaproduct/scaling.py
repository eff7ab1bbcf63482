"""How long a step takes on many GPUs, predicted: docs/scaling.md is the model in words, with what it is made of.

    inputs = Inputs.of(config, 1024, peak_flops("H200"))
    predict(inputs, shards=32)               # Prediction(seconds=..., efficiency=..., padding=...)
    advised(inputs, [8, 64, 1024])           # 64

Compute is what one H200 was measured to do. Bandwidths and latency are assumptions, and nothing beyond one host was
measured.
"""

import math
from dataclasses import dataclass

import torch

from .config.job import JobConfig
from .devices import peak_flops
from .memory import activation_width, largest, reshard_after_forward
from .models import DeltaProductLM, counts
from .models.args import DeltaProductArgs

MEASURED = {(1, False): 164_500, (2, False): 165_900, (3, False): 163_100, (3, True): 151_100}
"""(n_h, gated) -> tokens/s of the 392M model on one H200, of README.md (`python -m benchmarks.training --sizes 392M`).
"""
MEASURED_DEVICE = "H200"
HEADS = {1: 12, 2: 8, 3: 6}
"""Of the 392M models."""
GOOD, SLACK = 0.9, 0.002
"""Efficiency that the smallest batch is to reach, and how much of it memory is worth."""


@dataclass(frozen=True)
class Network:
    """Assumptions, none of them measured here: bytes/s and seconds."""

    inside: float = 300e9
    """A GPU to the others of its host."""
    adapter: float = 40e9
    """The network adapter that each GPU has: 400 Gb/s, of which 80 % are reached."""
    host: int = 8
    """GPUs of a host."""
    hop: float = 5e-6
    """Latency of a message to the next rank."""

    def bandwidth(self, ranks: int, stride: int) -> float:
        """What a ring of ranks that lie `stride` apart is passed along at: all adapters of its members in a host."""
        in_a_host = max(1, min(ranks, self.host // stride))
        return self.inside if ranks <= in_a_host else min(self.inside, in_a_host * self.adapter)


@dataclass(frozen=True)
class Inputs:
    """What the prediction is made from."""

    world_size: int
    shapes: tuple[tuple[int, int], ...]
    """Rows, and numbers a row, of each parameter."""
    groups: int
    """Collectives that the weights are gathered in: one a block, and what surrounds the blocks."""
    tokens: int
    """Of a rank, in a micro-batch."""
    micro_batches: int
    seconds_a_token: float
    """Forward and backward, on one device."""
    width: int
    """Bytes of a gathered weight."""
    gathered_twice: bool
    """Whether the backward pass gathers the weights anew."""
    network: Network = Network()

    @classmethod
    def of(cls, config: JobConfig, world_size: int, peak: float) -> "Inputs":
        """The inputs of a job on devices with a peak of so many FLOP/s."""
        with torch.device("meta"):
            parameters = list(DeltaProductLM(config.model).parameters())
        readers, training = config.data_ranks(world_size), config.training
        total = sum(p.numel() for p in parameters)
        return cls(
            world_size=world_size,
            shapes=tuple((p.shape[0], p.numel() // p.shape[0]) for p in parameters),
            groups=config.model.num_hidden_layers + 2,
            tokens=training.local_batch_size * training.seq_len // config.parallelism.context_parallel_degree,
            micro_batches=training.samples_per_step(readers) // (training.local_batch_size * readers),
            seconds_a_token=counts.training_flops_per_token(config.model) / (peak * measured_mfu(config.model)),
            width=activation_width(config),
            gathered_twice=reshard_after_forward(config, world_size, total)[0],
        )


@dataclass(frozen=True)
class Prediction:
    """Of one layout."""

    seconds: float
    """Of an optimizer step."""
    efficiency: float
    """Share of the step that one device would take for its tokens."""
    communication: float
    """Seconds of all collectives of a step with one micro-batch, one after the other."""
    padding: float
    """Numbers that are only there to divide rows evenly, as a share of the parameters."""


def measured_mfu(args: DeltaProductArgs) -> float:
    """The share of the peak that the measured model nearest in n_h and gate reached."""
    n = min(args.num_householder, 3)
    gated = args.use_forget_gate and (n, True) in MEASURED
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "head_dim": 128, "intermediate_size": 2816}
    model = DeltaProductArgs(**sizes, num_heads=HEADS[n], num_householder=n, use_forget_gate=gated)
    return MEASURED[n, gated] * counts.training_flops_per_token(model) / peak_flops(MEASURED_DEVICE)


def predict(inputs: Inputs, shards: int, tokens: int | None = None) -> Prediction:
    """A step with replicas of so many shards each.

    Args:
        inputs: of the job.
        shards: ranks that share one copy of the weights; divides the world size.
        tokens: of a rank in a micro-batch; None: those of the job.
    """
    net, replicas, tokens = inputs.network, inputs.world_size // shards, inputs.tokens if tokens is None else tokens
    padded = sum(-(-rows // shards) * shards * row for rows, row in inputs.shapes)
    total = sum(rows * row for rows, row in inputs.shapes)

    def ring(size: float) -> float:
        """Gathering or reducing so many bytes over the shards, in `groups` collectives."""
        return size * (shards - 1) / shards / net.bandwidth(shards, 1) + inputs.groups * (shards - 1) * net.hop

    gather, reduce, across = ring(inputs.width * padded), ring(4 * padded), 0.0
    if replicas > 1:
        # A ring for the bytes, a tree for the latency.
        across = 2 * 4 * padded / shards * (replicas - 1) / replicas / net.bandwidth(replicas, shards)
        across += inputs.groups * 2 * math.log2(replicas) * net.hop
    forward, backward = tokens * inputs.seconds_a_token / 3, tokens * inputs.seconds_a_token * 2 / 3
    again = gather * inputs.gathered_twice
    # What is under way beside the compute of its phase costs what that does not cover; the first group's weights and
    # the last group's gradients have nothing to hide behind.
    seconds = inputs.micro_batches * max(forward, gather) + (inputs.micro_batches - 1) * max(backward, again)
    seconds += max(backward, again + reduce + across) + (gather + reduce + across) / inputs.groups
    return Prediction(
        seconds=seconds,
        efficiency=inputs.micro_batches * (forward + backward) / seconds,
        communication=gather + again + reduce + across,
        padding=padded / total - 1,
    )


def advised(inputs: Inputs, degrees: list[int]) -> int:
    """The largest of some shard degrees, hence the one with the least memory, that is nearly as fast as the fastest."""
    efficiency = {shards: predict(inputs, shards).efficiency for shards in degrees}
    return max(shards for shards in degrees if efficiency[shards] >= max(efficiency.values()) - SLACK)


def smallest_tokens(inputs: Inputs, shards: int, step: int = 1024) -> int:
    """Tokens a rank, a multiple of `step`, from which on a micro-batch reaches an efficiency of `GOOD`."""
    return step * (1 + largest(lambda steps: predict(inputs, shards, steps * step).efficiency < GOOD))
