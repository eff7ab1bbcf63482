"""The same global batches give the same training, however they are cut: ranks, layouts, compile, checkpointing."""

import math

import pytest

from tests.processes import run_distributed
from tests.toy import arguments, assert_close, learned, records, train
from torchtitan_deltaproduct.config import load_config

# Compiled but for Inductor's code, with which gcc takes long: "compile" and "fsdp-compile-op-ac" have it.
TRACED = ["--compile.enable", "--compile.backend", "aot_eager"]
TWO_RANKS = {
    "fsdp": [],
    "ddp": ["--parallelism.data_parallel_replicate_degree", "2"],
    "fsdp-reshard": ["--parallelism.fsdp_reshard_after_forward", "always"],
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
    "compile-products-ac": [*TRACED, "--activation_checkpoint.mode", "selective",
                            "--activation_checkpoint.selective_ac_option", "products"],
    "full-ac": ["--activation_checkpoint.mode", "full"],
    "memory-budget": [*TRACED, "--activation_checkpoint.mode", "memory_budget"],
    "workers": ["--data.num_workers", "2"],
}  # fmt: skip
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
    rich = {"rich": [], "rich-reshard": TWO_RANKS["fsdp-reshard"], "rich-compile": TRACED}
    for name, options in rich.items():
        commands.append(arguments(toy, tmp_path / name, ("--checkpoint.no-enable", *RICH, *options)))
    run_distributed(train_all, 2, (commands,))
    for run in plain.values():
        assert_close(run, reference / "plain")
    for name in rich:
        assert_close(tmp_path / name, reference / "rich")


def test_bfloat16(toy, reference, tmp_path):
    """Tied and untied heads in mixed precision, on one rank and on two: 8 bits are 0.4 %, which grows in training."""
    half = ("--checkpoint.no-enable", "--training.mixed_precision_param", "bfloat16")
    runs = {"plain": half, "rich": (*half, *RICH)}
    for name, options in runs.items():
        train(toy, tmp_path / "one" / name, *options)
    run_distributed(train_all, 2, ([arguments(toy, tmp_path / "two" / name, runs[name]) for name in runs],))
    for name in runs:
        exact, one, two = (learned(folder / name) for folder in (reference, tmp_path / "one", tmp_path / "two"))
        losses = [key for key in exact if key[1] in ("loss", "validation_loss")]
        assert len(losses) == 11 and one.keys() == two.keys() == exact.keys()
        for key in losses:
            assert math.isclose(one[key], two[key], rel_tol=2e-3), (name, key)
            assert math.isclose(one[key], exact[key], rel_tol=4e-3 if key[0] <= 4 else 2e-2), (name, key)


def reductions(rank: int, argv: list[str]) -> None:
    """Trains with a count of the reduce-scatters of each backward pass: one a group, with the last one of a step."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

    from torchtitan_deltaproduct.titan import trainer
    from torchtitan_deltaproduct.titan.run import run

    reduce, step, counts = fsdp.foreach_reduce, trainer.Trainer.forward_backward_step, []

    def counted(*args, **kwargs):
        counts[-1] += 1
        return reduce(*args, **kwargs)

    def new_count(self, **given):
        counts.append(0)
        return step(self, **given)

    fsdp.foreach_reduce, trainer.Trainer.forward_backward_step = counted, new_count
    run(load_config(argv))
    # Of 8 steps with 2 micro-batches each; the groups are two blocks and the root.
    assert counts == [0, 3] * 8, counts


def test_gradients_are_reduced_with_the_last_micro_batch(toy, reference, tmp_path):
    options = ("--checkpoint.no-enable", *TWO_RANKS["fsdp-micro-1"])
    run_distributed(reductions, 2, (arguments(toy, tmp_path / "run", options),))
    assert_close(tmp_path / "run", reference / "plain")


def test_four_ranks_hsdp(toy, reference, tmp_path):
    degrees = ("--parallelism.data_parallel_replicate_degree", "2", "--parallelism.data_parallel_shard_degree", "2")
    options = ("--checkpoint.no-enable", "--training.local_batch_size", "1", *degrees)
    run_distributed(train_all, 4, ([arguments(toy, tmp_path / "hsdp", options)],))
    assert_close(tmp_path / "hsdp", reference / "plain")
