"""The same global batches give the same training, however they are cut: ranks, layouts, compile, checkpointing."""

import math

import pytest

from tests.dist.helper import run_distributed
from tests.toy import arguments, assert_close, records, train
from torchtitan_deltaproduct.config import load_config

TWO_RANKS = {
    "fsdp": [],
    "ddp": ["--parallelism.data_parallel_replicate_degree", "2"],
    "fsdp-no-reshard": ["--parallelism.fsdp_reshard_after_forward", "never"],
    "fsdp-compile-op-ac": ["--compile.enable", "--activation_checkpoint.mode", "selective",
                           "--activation_checkpoint.selective_ac_option", "op"],
    "fsdp-micro-1": ["--training.local_batch_size", "1"],
    "ddp-full-ac": ["--parallelism.data_parallel_replicate_degree", "2", "--activation_checkpoint.mode", "full"],
}  # fmt: skip
ONE_RANK = {
    "micro-4": ["--training.local_batch_size", "4"],
    "compile": ["--compile.enable"],
    "layer-ac": ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "2"],
    "op-ac": ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op"],
    "full-ac": ["--activation_checkpoint.mode", "full"],
    "workers": ["--data.num_workers", "2"],
}
# Gates, untied head, documents: what the plain toy does not have.
RICH = ["--model.use_forget_gate", "--model.use_output_gate", "--model.no-tie_word_embeddings",
        "--data.reset_state_at_documents", "--model.num_householder", "3"]  # fmt: skip


def train_all(rank: int, commands: list[list[str]]) -> None:
    from torchtitan_deltaproduct.titan.run import run

    for argv in commands:
        run(load_config(argv))


@pytest.fixture(scope="module")
def reference(toy, tmp_path_factory):
    """Plain and rich runs on one rank."""
    folder = tmp_path_factory.mktemp("reference")
    train(toy, folder / "plain", "--checkpoint.no-enable")
    train(toy, folder / "rich", "--checkpoint.no-enable", *RICH)
    return folder


def test_the_reference_learns(reference):
    losses = [r["loss"] for r in records(reference / "plain") if "loss" in r]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.1
    assert losses[0] == pytest.approx(math.log(320), rel=0.02)


@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank(toy, reference, tmp_path, name):
    train(toy, tmp_path / name, "--checkpoint.no-enable", *ONE_RANK[name])
    assert_close(tmp_path / name, reference / "plain")


def test_two_ranks(toy, reference, tmp_path):
    plain = {name: tmp_path / name for name in TWO_RANKS}
    commands = [arguments(toy, run, ("--checkpoint.no-enable", *TWO_RANKS[name])) for name, run in plain.items()]
    commands.append(arguments(toy, tmp_path / "rich", ("--checkpoint.no-enable", *RICH)))
    run_distributed(train_all, 2, (commands,))
    for run in plain.values():
        assert_close(run, reference / "plain")
    assert_close(tmp_path / "rich", reference / "rich")


def test_four_ranks_hsdp(toy, reference, tmp_path):
    options = ("--checkpoint.no-enable", "--training.local_batch_size", "1",
               "--parallelism.data_parallel_replicate_degree", "2", "--parallelism.data_parallel_shard_degree", "2")  # fmt: skip
    run_distributed(train_all, 4, ([arguments(toy, tmp_path / "hsdp", options)],))
    assert_close(tmp_path / "hsdp", reference / "plain")
