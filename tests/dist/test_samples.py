"""Samples while training on two ranks that share weights and sequences."""

import pytest

from tests import toy as toys
from tests.dist.test_resume import continue_on
from tests.processes import run_distributed
from tests.unit.titan.test_samples import ASKED, said_by_an_evaluation, samples

SPREAD = ("--training.steps", "4", "--parallelism.context_parallel_degree", "2", "--model.tie_word_embeddings", "false",
          "--model.use_forget_gate", "--compile.enable", "--compile.backend", "eager",
          "--parallelism.fsdp_reshard_after_forward", "always", "--activation_checkpoint.mode", "full")  # fmt: skip


@pytest.mark.slow
def test_two_ranks_with_every_wrapper(toy, tmp_path):
    """Context parallelism over FSDP2, checkpointed and compiled blocks: as an evaluation of the checkpoint says."""
    plain, run = tmp_path / "plain", tmp_path / "run"
    commands = [toys.arguments(toy, folder, (*SPREAD, *asked)) for folder, asked in ((plain, ()), (run, ASKED))]
    run_distributed(continue_on, 2, (commands,))
    assert toys.learned(run) == toys.learned(plain)
    toys.assert_same_weights(toys.weights(run, 4), toys.weights(plain, 4))
    last = [s["text"] for s in samples(run) if s["step"] == 4 and s["mode"] == "greedy"]
    assert last == said_by_an_evaluation(run, 4) and len(samples(run)) == 12
