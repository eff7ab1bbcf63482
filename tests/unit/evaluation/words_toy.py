"""Tiny runs on generated words for the tests of eval and of the demonstration."""

from pathlib import Path

import numpy as np

from torchtitan_deltaproduct.evaluation.state_tracking.problems import Counts, Problem
from torchtitan_deltaproduct.evaluation.state_tracking.results import RunResult

TOML = """
[model]
vocab_size = {vocab}
hidden_size = 16
num_hidden_layers = 1
num_heads = 2
head_dim = 8
num_householder = {n}
allow_neg_eigval = {negative}
use_short_conv = false
intermediate_size = 32
[data]
{data}
[training]
local_batch_size = 4
global_batch_size = 4
seq_len = 8
steps = 2
[lr_scheduler]
warmup_steps = 1
[activation_checkpoint]
mode = "none"
[metrics]
enable_tensorboard = false
"""
S3 = 'kind = "group_word"\ngroup = "S3"\nseed = 5'
PARITY = 'kind = "formal_language"\nlanguage = "parity"\nmin_length = 3\nmax_length = 8'


def write_toml(path: Path, data: str = S3, n: int = 2, negative: bool = True, vocab: int = 6) -> Path:
    """Writes a run of two steps on words of 8 tokens."""
    path.write_text(TOML.format(data=data, n=n, negative=str(negative).lower(), vocab=vocab))
    return path


def fake(problem, counts, n=2, negative=True, seed=1, **more):
    settings = {"model.num_householder": n, "model.allow_neg_eigval": negative, **more}
    return RunResult(f"run {seed}", problem, counts, settings, (seed, seed), 10, 10)


def flat(accuracy, problem=None, **fields):
    """A run of the same accuracy at each position of S3."""
    problem = problem or Problem("S3", False, 32, 128, 1 / 6, (), 0)
    correct = np.full(problem.length, round(accuracy * 1000))
    return fake(problem, Counts(1000, np.full(problem.length, 1000), correct, correct), **fields)
