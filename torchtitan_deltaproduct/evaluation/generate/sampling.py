"""Choosing the next token from logits: greedy, or by temperature, top-k and top-p.

    streams = random_streams(seeds=[1, 2])
    ids = choose(logits, Sampling(temperature=0.8, top_p=0.95), streams)                    # [2, vocab] -> [2]

The filters come in the usual order: temperature, then the k most probable, then the smallest set of these that has
the mass p. A token is the inverse of the cumulative distribution at one uniform number, and each sequence draws its
numbers from a stream of its own: what it says does not depend on who else is in the batch, and a probability that
rounding moves by 1e-7 changes the token once in 1e7 times.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchtitan_deltaproduct.errors import CheckpointError, ConfigError

ROUNDING = 1e-12
"""A set whose mass misses p by this much has it."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; ConfigError if a value is out of range.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: only the k most probable tokens (and those tied with the k-th); 0: all.
        top_p: only the smallest set of the most probable tokens whose mass is at least this; 1: all. The token
            that crosses it is in the set.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature}: must be 0 (the most probable token) or positive")
        if self.top_k < 0:
            raise ConfigError(f"top-k {self.top_k}: must be 0 (all tokens) or a number of tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p {self.top_p}: must be above 0 and at most 1 (all tokens)")


def random_streams(seeds: list[int]) -> list[torch.Generator]:
    """A stream of random numbers for each seed; on the CPU, so that a seed means the same on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def choose(logits: Tensor, sampling: Sampling, streams: list[torch.Generator]) -> list[int]:
    """The next token for each row of logits [B, vocab], with a stream each; CheckpointError if they are not finite."""
    if not logits.isfinite().all():
        raise CheckpointError("the model's logits are not finite: its weights are damaged or its training diverged")
    if sampling.temperature == 0:
        return logits.argmax(1).tolist()
    uniform = torch.cat([torch.rand(1, generator=stream, dtype=torch.float64) for stream in streams])
    return invert(distribution(logits, sampling), uniform.to(logits.device)).tolist()


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """[B, vocab] logits -> [B, vocab] float64 probabilities, 0 for what the filters leave out; temperature above 0."""
    # Less the largest, which changes no probability: a temperature of 1e-310 makes no infinities then.
    logits = logits.double()
    scaled = (logits - logits.max(dim=1, keepdim=True).values) / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[1]:
        least = scaled.topk(sampling.top_k, dim=1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    p = scaled.softmax(1)
    if sampling.top_p == 1:
        return p
    descending, order = p.sort(dim=1, descending=True, stable=True)
    before = descending.cumsum(1) - descending
    outside = before >= sampling.top_p - ROUNDING
    outside[:, 0] = False
    p = p.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), 0)
    return p / p.sum(1, keepdim=True)


def invert(p: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative distribution p [B, vocab] exceeds a number [B] in [0, 1): [B] int64."""
    cumulative = p.cumsum(1)
    total = cumulative[:, -1:]
    # The product may round up to the total, beyond the last token.
    at = torch.minimum(uniform.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, at, right=True).squeeze(1)
