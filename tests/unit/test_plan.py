"""The plan of a run, as rows of text, and its arithmetic."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch

from torchtitan_deltaproduct import plan
from torchtitan_deltaproduct.checkpoint.folders import retention
from torchtitan_deltaproduct.config import Environment, load_config
from torchtitan_deltaproduct.data.shards.manifest import read_manifest
from torchtitan_deltaproduct.devices import DEVICES, peak_flops
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.formats import amount
from torchtitan_deltaproduct.memory import (
    activation_elements,
    checkpoint_bytes,
    on_kernels,
    rank_memory,
    reshard_after_forward,
)
from torchtitan_deltaproduct.models import DeltaProductLM, counts
from torchtitan_deltaproduct.titan import device

PAPER = """\
[model]
hidden_size = 736
num_heads = 6
intermediate_size = 2048
[data]
paths = ["data/fineweb"]
[training]
local_batch_size = 4
global_batch_size = 128
seq_len = 4096
steps = 36_240
[lr_scheduler]
warmup_steps = 512
decay_type = "cosine"
min_lr_factor = 0.1
"""


def test_rows(load):
    config = load(PAPER)
    found = {title.split("  ")[0].split(":")[0]: rows for title, rows in plan.sections(config, 8)}
    parameters = counts.total_parameters(config.model)
    assert found["Model"][-1][1] == f"{parameters:,}"
    compute = {row[0]: row[1:] for row in found["Compute"]}
    assert compute["batch"] == ("128 sequences", "4 local x 4 accumulated x 8 ranks")
    assert compute["tokens per step"][0] == "524,288"
    assert compute["tokens in total"][0] == "19,000,197,120"
    disk = {row[0]: row[1:] for row in found["Checkpoints on disk"]}
    assert disk["one"][0] == amount(12 * parameters, "B")
    assert disk["written"][0] == "73" and disk["kept"][0] == "3"
    assert disk["largest at once"][0] == amount(4 * 12 * parameters, "B")
    rates = {row[0]: row[1] for row in found["Learning rate"]}
    assert rates == {
        "warm-up": "steps 1 to 512", "decay": "steps 513 to 36,240",
        "step 1": "5.86e-07", "step 512": "0.0003", "step 513": "0.0003", "step 18,376": "0.000165",
        "step 36,240": "3e-05",
    }  # fmt: skip
    values = {row[0]: row[1:] for row in found["Values that are not defaults"]}
    assert values["training.steps"] == ("36240", "line 11; default 10000")
    assert "optimizer.lr" not in values


def test_memory_is_sharded(load):
    config = load(PAPER)
    parts = counts.parameters_by_part(config.model)
    one, eight = rank_memory(config, 1, parts), rank_memory(config, 8, parts)
    assert one["weights"] == 4 * sum(parts.values()) and one["optimizer state"] == 2 * one["weights"]
    assert eight["weights"] == -(-sum(parts.values()) // 8) * 4
    assert one["activations"] == eight["activations"]
    assert checkpoint_bytes(config) == one["weights"] + one["optimizer state"]
    replicated = rank_memory(load(PAPER, "--parallelism.data_parallel_replicate_degree=2"), 8, parts)
    assert replicated["weights"] == -(-sum(parts.values()) // 4) * 4


def test_sequences_on_several_ranks(load):
    """Twice the tokens on twice the ranks is the same activations; weights are shared by all of them."""
    parts = counts.parameters_by_part(load(PAPER).model)
    one = rank_memory(load(PAPER), 8, parts)
    cut = load(PAPER, "--parallelism.context_parallel_degree=2", "--training.seq_len=8192")
    two = rank_memory(cut, 16, parts)
    assert two["activations"] == one["activations"] and two["loss"] == one["loss"]
    assert two["weights"] == -(-sum(parts.values()) // 16) * 4
    fixed = load(PAPER, "--parallelism.context_parallel_degree=2", "--parallelism.data_parallel_shard_degree=4")
    assert rank_memory(fixed, 8, parts)["weights"] == -(-sum(parts.values()) // 8) * 4
    rows = {name: value for name, value, _ in plan.context_rows(cut, 16, 80)}
    args = cut.model
    state = 4 * cut.training.local_batch_size * args.num_heads * args.head_dim
    assert rows["map, forward"] == plan.amount(state * (args.head_dim + args.head_v_dim), "B")
    assert rows["gradient, backward"] == plan.amount(state * args.head_v_dim, "B")
    longest = [int(plan.context_rows(cut, 16, memory)[-1][1].replace(",", "")) for memory in (80, 160)]
    assert 1.8 * longest[0] < longest[1] < 2.5 * longest[0] and longest[0] % 2048 == 0
    assert plan.context_rows(cut, 16, 1)[-1][1] == "none"


def test_gradients_are_whole_while_micro_batches_are_added_up(load):
    parts = counts.parameters_by_part(load(PAPER).model)
    total = sum(parts.values())
    assert rank_memory(load(PAPER), 8, parts)["gradients"] == 4 * total, "4 micro-batches of 4 on 8 ranks"
    assert rank_memory(load(PAPER), 32, parts)["gradients"] == 4 * -(-total // 32), "one micro-batch"
    offloaded = load(PAPER, "--training.enable_cpu_offload")
    assert rank_memory(offloaded, 8, parts)["gradients"] == 4 * total
    assert rank_memory(offloaded, 32, parts)["gradients"] == 0


def test_weights_are_gathered_again_where_they_are_large(load):
    small, large = 392_000_000, 8_000_000_000
    assert reshard_after_forward(load(PAPER), 8, small) == (False, "0.78 GB are 0.9% of the memory")
    assert reshard_after_forward(load(PAPER), 8, large) == (True, "16.00 GB are 18.6% of the memory")
    assert reshard_after_forward(load(PAPER), 1, large) == (False, "one rank holds them all")
    assert reshard_after_forward(load(PAPER), 8, large, card=1 << 40)[0] is False
    for policy, answer in (("always", True), ("never", False)):
        config = load(PAPER, f"--parallelism.fsdp_reshard_after_forward={policy}")
        assert all(reshard_after_forward(config, shards, large) == (answer, "as set") for shards in (1, 8))
    parts = {"embedding": 10**8, "mlp": large, "head": 10**8}
    kept = rank_memory(load(PAPER, "--parallelism.fsdp_reshard_after_forward=never"), 8, parts)["gathered weights"]
    again = rank_memory(load(PAPER), 8, parts)["gathered weights"]
    assert kept == 2 * sum(parts.values()) and again == 2 * (2 * 10**8 + 2 * large // 24)


def test_checkpointing_orders_activations(load):
    def elements(*options):
        return activation_elements(load(PAPER, *[f"--activation_checkpoint.{option}" for option in options]))

    full, none = elements("mode=full"), elements("mode=none")
    per_op, every_second = elements("selective_ac_option=op"), elements("selective_ac_option=2")
    assert full < per_op < elements("selective_ac_option=products") < none
    assert full < per_op < none and full < every_second < none
    assert full <= elements("selective_ac_option=1") <= every_second < elements("selective_ac_option=4") <= none
    budget = ["--compile.enable", "--activation_checkpoint.mode=memory_budget"]
    compiled = [activation_elements(load(PAPER, "--compile.enable", f"--activation_checkpoint.mode={mode}"))
                for mode in ("full", "none")]  # fmt: skip
    low = activation_elements(load(PAPER, *budget, "--activation_checkpoint.memory_budget=0"))
    high = activation_elements(load(PAPER, *budget, "--activation_checkpoint.memory_budget=1"))
    assert [low, high] == compiled


def test_the_plan_says_what_other_checkpointing_would_keep(load):
    options = ["--compile.enable", "--training.mixed_precision_param=bfloat16", "--activation_checkpoint.mode="]
    remark = next(
        row[2] for row in rows_of(load(PAPER, *options[:2]), "Memory") if row[2].startswith("by checkpointing")
    )
    for mode, name in (("full", "full"), ("none", "none")):
        config = load(PAPER, *options[:2], options[2] + mode)
        kept = rank_memory(config, 1, counts.parameters_by_part(config.model))["activations"]
        assert f"{name} {amount(kept, 'B')}" in remark
    assert [part.split()[0] for part in remark.removeprefix("by checkpointing: ").split(", ")] == [
        "none", "products", "op", "full"
    ]  # fmt: skip


def test_what_our_kernels_refuse_is_planned_too(load):
    """Heads that are padded, heads that are too large, too many micro-steps."""
    for change in ({"head_dim": 96}, {"head_dim": 256}, {"num_householder": 100}):
        config = load(PAPER, "--compile.enable", "--activation_checkpoint.mode=none")
        config.model = dataclasses.replace(config.model, **change)
        assert activation_elements(config) > 0
        assert on_kernels(config) == (change == {"head_dim": 96})


SEEN = [(1, False, 49.4, 29.1), (2, False, 50.9, 29.3), (3, False, 52.3, 29.7), (3, True, 54.2, 31.7)]


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize(("n", "gated", "all_kept", "products_kept"), SEEN)
def test_compiled_memory_is_what_an_h200_had(n, gated, all_kept, products_kept, lean):
    """Peaks in GiB that `python -m benchmarks.training --sizes 392M` printed, 8 x 4,096 tokens."""
    path, seen = f"train_configs/fineweb/deltaproduct_392M_n{n}_4k.toml", products_kept if lean else all_kept
    options = [f"--model.use_forget_gate={str(gated).lower()}"]
    if lean:
        options += ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=products"]
    config = load_config(["--job.config_file", path, *options])
    memory = rank_memory(config, 1, counts.parameters_by_part(config.model))
    assert sum(memory.values()) / 2**30 == pytest.approx(seen, rel=0.06)


@pytest.mark.parametrize("num_householder", [1, 3])
@pytest.mark.parametrize("use_short_conv", [True, False])
def test_activations_are_what_autograd_saves(load, num_householder, use_short_conv):
    """The formula against a count of the storages saved by the forward pass, in float32, per block."""
    config = load(PAPER, "--activation_checkpoint.mode=none")
    sizes = {"vocab_size": 64, "hidden_size": 128, "num_heads": 2, "head_dim": 64, "intermediate_size": 256}
    variant = {"num_householder": num_householder, "use_short_conv": use_short_conv}

    def both(layers):
        config.model = dataclasses.replace(config.model, num_hidden_layers=layers, **sizes, **variant)
        return saved_elements_per_token(config.model), activation_elements(config)

    (measured_one, formula_one), (measured_two, formula_two) = both(1), both(2)
    assert formula_two - formula_one == pytest.approx(measured_two - measured_one, rel=0.12)


def saved_elements_per_token(args, batch=2, length=256):
    model = DeltaProductLM(args)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randint(0, args.vocab_size, (batch, length)))
    return sum(size for size, _ in kept.values()) / (4 * batch * length)


def rows_of(config, part, world_size=8, **given):
    return next(rows for title, rows in plan.sections(config, world_size, **given) if title.startswith(part))


def test_wsd_in_words(load):
    wsd = PAPER.replace('decay_type = "cosine"', 'schedule = "wsd"\ndecay_steps = 4000\ndecay_type = "sqrt"')
    rows = rows_of(load(wsd), "Learning rate")
    assert rows[:3] == [
        ("warm-up", "steps 1 to 512", "rises to 0.0003, linearly"),
        ("stable", "steps 513 to 32,241", "stays at 0.0003"),
        ("decay", "steps 32,242 to 36,240", "falls to 3e-05, sqrt"),
    ]
    words = "the last checkpoint before the decay"
    way = f"{words} is step 32,000: checkpoint.keep_every keeps such ones"
    assert rows[-1] == ("branch from", "none at the end", way)
    kept = rows_of(load(wsd, "--checkpoint.keep_every=16000"), "Learning rate")[-1]
    assert kept == ("branch from", "step 32,000", f"{words}, kept to the end")
    earlier = rows_of(load(wsd, "--checkpoint.keep_every=10000"), "Learning rate")[-1]
    assert earlier == ("branch from", "step 30,000", way)


def test_muon_is_planned(load):
    """One number of state for each in a hidden matrix and two for the rest; the FLOPs are those of Newton-Schulz."""
    config = load(PAPER, "--optimizer.name=Muon")
    parts, args = counts.parameters_by_part(config.model), config.model
    total, narrow = sum(parts.values()), args.num_hidden_layers * args.hidden_size * args.num_heads * 2
    hidden = parts["mixer projections"] - narrow + parts["mlp"]
    assert rank_memory(config, 8, parts)["optimizer state"] == 4 * -(-(2 * total - hidden) // 8)
    assert checkpoint_bytes(config) == 4 * (3 * total - hidden)
    assert (
        rows_of(config, "Checkpoints")[0][2]
        == "weights and one moment of hidden matrices, two moments of the rest in float32"
    )
    compute = {row[0]: row[1:] for row in rows_of(config, "Compute")}
    # 736 wide, 6 heads of 128, n_h = 2: q, o and two each of k and v; an MLP of 2,048.
    square, tall = 5 * (4 * 736**2 * 768 + 2 * 736**3), 5 * (4 * 736**2 * 2048 + 2 * 736**3)
    flops = 24 * (6 * square + 3 * tall)
    step = counts.training_flops_per_token(args) * 524_288
    assert compute["orthogonalisation"] == (
        amount(flops, "FLOP"), f"{flops / step:.1%} of the FLOPs of a step, each matrix on one of 8 ranks"
    )  # fmt: skip
    assert "orthogonalisation" not in {row[0] for row in rows_of(load(PAPER), "Compute")}


def test_milestones_are_kept_and_counted(load):
    """As retention keeps them: 7 of 5,000 steps, and the 3 newest, one of which is the end."""
    config = load(PAPER, "--checkpoint.keep_every", "5000")
    disk = {row[0]: row[1:] for row in rows_of(config, "Checkpoints")}
    size = 12 * counts.total_parameters(config.model)
    steps = [*range(500, 36_001, 500), 36_240]
    kept = retention(steps, 3, 5000)
    assert len(kept) == 10 and set(kept) == {*range(5000, 35_001, 5000), 35_500, 36_000, 36_240}
    assert disk["kept"] == ("10", f"{amount(10 * size, 'B')}, 7 of them milestones, every 5,000 steps")
    assert disk["largest at once"][0] == amount(11 * size, "B")


def test_the_best_take_room_on_disk(load):
    config = load(
        PAPER, "--checkpoint.keep_best=2", "--validation.enable", "--validation.paths=a", "--validation.freq=500"
    )
    disk = {row[0]: row[1:] for row in rows_of(config, "Checkpoints")}
    size = checkpoint_bytes(config)
    assert disk["kept"] == ("5", f"{amount(5 * size, 'B')}, the best by validation among them")
    assert disk["largest at once"][0] == amount(6 * size, "B")


def test_fits_or_does_not(load):
    memory = {row[0]: row[1:] for row in rows_of(load(PAPER), "Memory")}
    needed = 1.2 * sum(rank_memory(load(PAPER), 8, counts.parameters_by_part(load(PAPER).model)).values())
    assert memory["sum"][1] == f"and 20 % for work space: {amount(needed, 'B')}" and needed < 80e9
    assert memory["fits 80 GB"][0] == f"{needed / (0.99 * 80 * 2**30):.0%}"
    memory = {row[0]: row[1:] for row in rows_of(load(PAPER), "Memory", device_memory=needed / 2**30)}
    assert any(name.startswith("does not fit") for name in memory)
    remarks = [
        next(row[2] for row in rows_of(load(PAPER, *options), "Memory") if row[0] == "activations")
        for options in ((), ("--compile.enable",))
    ]
    assert remarks[0].endswith("; as if eager; torch.compile keeps less")
    assert remarks[1].endswith("; compiled, on our kernels")


def test_the_data_is_opened(toy, load):
    config = load_config(["--job.config_file", str(toy)], Environment(2))
    rows = rows_of(config, "Data", 2)
    manifest = read_manifest(config.data.paths[0])
    windows = manifest.tokens // 64
    assert rows[0][:2] == ("training", config.data.paths[0])
    told = f"{manifest.tokens:,} tokens in {manifest.documents:,} documents; tokenizer of 320, 0 rows"
    assert rows[0][2].startswith(told)
    assert rows[1][1] == f"{4 * 8 / windows:.3g}" and rows[2][:2] == ("validation", config.validation.paths[0])
    assert plan.main([str(toy)]) == 0 and plan.main([str(toy), "--validation.paths", "nowhere"]) == 1
    config.model.vocab_size = 300
    assert rows_of(config, "Data", 2)[0][2] == ("CANNOT BE USED: has token ids up to 319, but model.vocab_size = 300")
    config.data.paths = ["nowhere"]
    assert rows_of(config, "Data", 2)[0] == ("training", "nowhere", "CANNOT BE USED: There is no folder nowhere.")


def test_a_damaged_tokenizer_is_seen(toy, load, tmp_path):
    config = load_config(["--job.config_file", str(toy)], Environment(2))
    copy = shutil.copytree(config.data.paths[0], tmp_path / "copy")
    with open(copy / "tokenizer/tokenizer.json", "a", encoding="utf-8") as file:
        file.write(" ")
    config.data.paths = [str(copy)]
    assert "its tokenizer is not the one" in rows_of(config, "Data", 2)[0][2]


def test_a_streams_tokenizer_is_opened(toy, load):
    folder = toy.parent / "tokenizer"
    stream = '[data]\nkind = "streaming"\ndataset = "x/y"\n[model]\nhf_assets_path = '
    rows = rows_of(load(f'{stream}"{folder}"\nvocab_size = 320\n'), "Data", 1)
    assert rows == [("streamed", "x/y", "split train, not opened here"),
                    ("tokenizer", str(folder), "320 tokens, model.vocab_size = 320")]  # fmt: skip
    assert "CANNOT BE USED: 320 tokens" in rows_of(load(f'{stream}"{folder}"\nvocab_size = 300\n'), "Data", 1)[1][2]
    assert "CANNOT BE USED" in rows_of(load(f'{stream}"nowhere"\n'), "Data", 1)[1][2]


def test_one_table_of_peaks(load):
    """MFU of a run and the time of a plan divide by the same number."""
    assert device.peak_flops is peak_flops
    assert peak_flops("NVIDIA GeForce RTX 4090") == peak_flops("rtx4090") == 165e12
    assert peak_flops("NVIDIA L40") == 0.0 and peak_flops("NVIDIA L40S") == 362e12
    assert plan.DEVICES is DEVICES


def test_command_line(load, capsys):
    load(PAPER)
    command = ["x.toml", "--world-size", "8", "--training.steps", "1000", "--mfu", "0.5", "--device", "H100"]
    plan.main(command)
    text = capsys.readouterr().out
    assert text.startswith("x.toml on 8 ranks\n")
    assert "524,288,000" in text and "command line; default 10000" in text and "tokens/s" in text
    plan.main(["x.toml", "--tokens-per-second", "1000000"])
    assert "x.toml on 1 rank\n" in capsys.readouterr().out
    for arguments, message in [
        (["--world-size", "8"], "the job's TOML file comes first"),
        (
            ["x.toml", "--world-size", "7"],
            "must be a multiple of local_batch_size x 7 ranks = 28; nearest: 112 or 140",
        ),
        (["x.toml", "--world-size", "0"], "--world-size 0: must be positive"),
        (["x.toml", "--mfu", "0.5", "--device", "H1000"], "nearest: H100"),
        (["x.toml", "--mfu", "a lot"], "invalid float value"),
    ]:
        with pytest.raises(ConfigError, match=message):
            plan.main(arguments)


@pytest.mark.parametrize(("argument", "code", "found"), [("x.toml", 1, "Learning rate"), ("y.toml", 2, "no such file")])
def test_as_a_module(load, tmp_path, argument, code, found):
    load(PAPER)
    command = [sys.executable, "-m", "torchtitan_deltaproduct.plan", argument]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert found in done.stdout + done.stderr
