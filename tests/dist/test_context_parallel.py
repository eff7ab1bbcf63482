"""Sequences cut among ranks: losses and gradients of one rank, by the recurrence; training, kills, other degrees."""

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.dist.test_equivalence import TRACED
from tests.processes import run_distributed
from tests.toy import arguments, assert_close, kill, launch, learned, log_of, records, train, wait_for
from torchtitan_deltaproduct.config import load_config
from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM
from torchtitan_deltaproduct.models.block import Block
from torchtitan_deltaproduct.ops import SAVE_FOR_SELECTIVE_AC, SequenceRanks
from torchtitan_deltaproduct.ops.ranks import GATHER

OP_AC = ("--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op")
RICH = ("--model.use_forget_gate", "--model.use_output_gate", "--model.no-tie_word_embeddings",
        "--data.reset_state_at_documents", "--model.num_householder", "3", "--training.seq_len", "128")  # fmt: skip
PLAIN = ("--checkpoint.no-enable",)
WORDS = """
[model]
vocab_size = 6
hidden_size = 32
num_hidden_layers = 1
num_heads = 2
head_dim = 16
num_householder = 2
[data]
kind = "group_word"
group = "S3"
[training]
local_batch_size = 16
seq_len = 64
steps = 4
[lr_scheduler]
warmup_steps = 1
[validation]
enable = true
lengths = [128]
samples = 32
local_batch_size = 8
freq = 4
"""


def cp(degree: int) -> tuple[str, ...]:
    return "--parallelism.context_parallel_degree", str(degree)


def case(n: int, gated: bool, negative: bool, documents: float | None, heads: int = 3) -> tuple[DeltaProductArgs, dict]:
    """A model and a batch of 2 x 96 tokens; a document begins at each token with probability `documents`."""
    args = DeltaProductArgs(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_heads=heads, head_dim=8,
                            num_householder=n, allow_neg_eigval=negative, use_forget_gate=gated,
                            intermediate_size=48)  # fmt: skip
    torch.manual_seed(n)
    tokens, labels = torch.randint(50, (2, 2, 96)).unbind()
    labels[torch.rand(2, 96) < 0.2] = -100
    batch = {"input": tokens, "labels": labels}
    if documents:
        batch["document_starts"] = torch.rand(2, 96) < documents
    return args, batch


def loss_and_gradients(
    args: DeltaProductArgs, batch: dict, ranks: SequenceRanks | None, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    from torchtitan_deltaproduct.titan.feed import own_part

    model = DeltaProductLM(args)
    model.init_weights()
    model.to(dtype)
    inputs = dict(batch)
    tokens = (batch["labels"] != -100).sum()
    inputs, labels = own_part((inputs, inputs.pop("labels")), ranks)
    if ranks is not None:
        model.spread_over(ranks)
    loss = model(inputs.pop("input"), **inputs, labels=labels) / tokens
    loss.backward()
    found = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}
    if ranks is not None:
        for tensor in found.values():
            dist.all_reduce(tensor)
    return found


def compare(rank: int, cases: list[tuple]) -> None:
    """In float64 every tensor agrees to 1e-10; in float32 the loss, and the gradients as one vector, to 2e-6."""
    size, group = dist.get_world_size(), dist.group.WORLD.group_name
    for number, options in enumerate(cases):
        args, batch = case(*options)
        ranks = SequenceRanks(group, rank, size)
        found = {dtype: loss_and_gradients(args, batch, ranks, dtype) for dtype in (torch.float64, torch.float32)}
        # The recurrence is slow: each rank looks at its share of the cases.
        if number % size == rank:
            args.op_backend = "recurrent"
            for name, x in loss_and_gradients(args, batch, None, torch.float64).items():
                assert (found[torch.float64][name] - x).norm() < 1e-10 * x.norm(), (options, name)
            expected, single = loss_and_gradients(args, batch, None, torch.float32), found[torch.float32]
            assert abs(single.pop("loss") / expected.pop("loss") - 1) < 2e-6, options
            whole = torch.cat([x.flatten() for x in expected.values()])
            error = torch.cat([x.flatten() for x in single.values()]) - whole
            assert error.norm() < 2e-6 * whole.norm(), (options, error.norm() / whole.norm())


@pytest.mark.parametrize("size", [2, 4])
def test_losses_and_gradients(size):
    cases = [(1, True, True, None), (2, False, True, 0.05), (3, True, False, 0.3), (4, False, False, 0.02)]
    run_distributed(compare, size, (cases,))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_losses_and_gradients_of_every_setting(size):
    cases = list(itertools.product((1, 2, 3, 4), (False, True), (False, True), (None, 0.02, 0.1, 0.5), (1, 3)))
    run_distributed(compare, size, (cases,))


class Gathers(TorchDispatchMode):
    """Counts all-gathers that are carried out."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is GATHER
        return func(*args, **(kwargs or {}))


def count_gathers(rank: int) -> None:
    """A block sends its halo and its map forward, and two gradients back; per-op checkpointing repeats none of it."""

    def policy(_context, op, *_args, **_options):
        return CheckpointPolicy.MUST_SAVE if op in SAVE_FOR_SELECTIVE_AC else CheckpointPolicy.PREFER_RECOMPUTE

    block = Block(DeltaProductArgs(hidden_size=24, num_heads=3, head_dim=8))
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.1)
    block.mixer.ranks = SequenceRanks(dist.group.WORLD.group_name, rank, 2)
    x = torch.randn(1, 32, 24, requires_grad=True)
    selective = partial(checkpoint, block, use_reentrant=False,
                        context_fn=partial(create_selective_checkpoint_contexts, policy))  # fmt: skip
    for run, expected in ((block, 4), (selective, 4), (partial(checkpoint, block, use_reentrant=False), 6)):
        with Gathers() as counter:
            run(x).sum().backward()
        assert counter.count == expected


def test_selective_checkpointing_saves_what_was_sent():
    run_distributed(count_gathers, 2)


def train_all(rank: int, commands: list[list[str]]) -> None:
    from torchtitan_deltaproduct.titan.run import run

    for argv in commands:
        run(load_config(argv))


@pytest.fixture(scope="module")
def reference(toy, tmp_path_factory):
    """One rank: the plain toy, and one with documents, gates and n_h = 3, by the recurrence."""
    folder = tmp_path_factory.mktemp("reference")
    train(toy, folder / "plain", *PLAIN)
    train(toy, folder / "rich", *PLAIN, *RICH, "--model.op_backend", "recurrent")
    return folder


def test_training_on_two_ranks(toy, reference, tmp_path):
    """Tokens, losses and validation of one rank: plain, and with all else that a run has."""
    options = {"plain": PLAIN, "rich": (*PLAIN, *RICH, *OP_AC, *TRACED)}
    run_distributed(
        train_all, 2, ([arguments(toy, tmp_path / name, (*more, *cp(2))) for name, more in options.items()],)
    )
    for name in options:
        assert_close(tmp_path / name, reference / name)


@pytest.mark.slow
def test_training_on_four_ranks(toy, reference, tmp_path):
    """Two sequences of two ranks each under FSDP2, all weights over four; compiled, checkpointed."""
    run = arguments(toy, tmp_path / "rich", (*PLAIN, *RICH, *OP_AC, "--compile.enable", *cp(2)))
    run_distributed(train_all, 4, ([run],))
    assert_close(tmp_path / "rich", reference / "rich")


@pytest.mark.slow
def test_training_in_every_layout(toy, reference, tmp_path):
    layouts = {
        "four-to-a-sequence": cp(4),
        "hsdp": (*cp(2), "--parallelism.data_parallel_replicate_degree", "2"),
        "hsdp-full-ac": (*cp(2), "--parallelism.data_parallel_replicate_degree", "2",
                         "--activation_checkpoint.mode", "full"),
        "reshard": (*cp(2), "--parallelism.fsdp_reshard_after_forward", "always"),
        "accumulated": (*cp(2), "--training.local_batch_size", "1"),
        "layer-ac-compiled": (*cp(4), "--activation_checkpoint.mode", "selective",
                              "--activation_checkpoint.selective_ac_option", "2", "--compile.enable"),
    }  # fmt: skip
    commands = [arguments(toy, tmp_path / name, (*PLAIN, *RICH, *more)) for name, more in layouts.items()]
    run_distributed(train_all, 4, (commands,))
    for name in layouts:
        assert_close(tmp_path / name, reference / "rich")


def test_killed_and_resumed_with_other_degrees(toy, tmp_path):
    """Killed on two ranks to a sequence, then on one rank, and finished on two again: the unbroken run of one."""
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    train(toy, unbroken)
    for degree, moment in ((2, "step 3/8"), (1, "step 6/8")):
        process = launch(toy, killed, *cp(degree), ranks=degree, wait=False)
        wait_for(killed, moment)
        kill(process)
    launch(toy, killed, *cp(2), ranks=2)
    assert "2 -> 1 ranks" in log_of(killed) and "1 -> 2 ranks" in log_of(killed)
    assert_close(killed, unbroken)


@pytest.mark.slow
def test_killed_and_restarted_is_bitwise_the_same(toy, tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    launch(toy, unbroken, *cp(2), *OP_AC, ranks=2)
    process = launch(toy, killed, *cp(2), *OP_AC, ranks=2, wait=False)
    wait_for(killed, "step 5/8")
    kill(process)
    launch(toy, killed, *cp(2), *OP_AC, ranks=2)
    assert learned(killed) == learned(unbroken)


def test_words_are_judged_whole(tmp_path):
    """Accuracies of rows that lie on two ranks, and losses, at the length of training and at another."""
    toml = tmp_path / "words.toml"
    toml.write_text(WORDS)
    one, two = tmp_path / "one", tmp_path / "two"
    train(toml, one, *PLAIN)
    run_distributed(train_all, 2, ([arguments(toml, two, (*PLAIN, *cp(2)))],))
    ours, theirs = ([r for r in records(run) if "validation_loss" in r] for run in (two, one))
    assert len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        for name, value in b.items():
            if name.startswith("validation_") and name != "validation_seconds":
                assert a[name] == pytest.approx(value, rel=2e-5), name
