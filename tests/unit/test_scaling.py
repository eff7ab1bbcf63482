"""The prediction for many GPUs: its arithmetic by hand, and the tables of docs/scaling.md."""

import dataclasses
import math
import re

import pytest

from tests.toy import REPO
from torchtitan_deltaproduct import devices, plan
from torchtitan_deltaproduct.config import Environment, load_config
from torchtitan_deltaproduct.devices import memory_gb, peak_flops
from torchtitan_deltaproduct.memory import largest_local_batch, rank_memory
from torchtitan_deltaproduct.models import counts
from torchtitan_deltaproduct.scaling import (
    MEASURED,
    Inputs,
    Network,
    advised,
    measured_mfu,
    predict,
    smallest_tokens,
)

TOML = "train_configs/fineweb/deltaproduct_392M_n2_4k.toml"
PAGE = (REPO / "docs/scaling.md").read_text(encoding="utf-8")


def inputs_of(world, *options):
    """Eight sequences of 4,096 tokens a rank, one micro-batch."""
    batch = f"--training.global_batch_size={8 * world}"
    return Inputs.of(load_config([str(REPO / TOML), batch, *options], Environment()), world, peak_flops("H200"))


def test_one_rank_is_what_was_measured():
    step = predict(inputs_of(1), 1)
    assert step.seconds == pytest.approx(32_768 / MEASURED[2, False], rel=1e-9)
    assert (step.efficiency, step.communication, step.padding) == (pytest.approx(1), 0, 0)


def test_a_step_by_hand():
    """Two parameters on 16 ranks of hosts of 4: shards of 8, on two hosts, two replicas."""
    network = Network(inside=100.0, adapter=10.0, host=4, hop=0.5)
    inputs = Inputs(16, ((9, 5), (8, 1)), 3, tokens=100, micro_batches=2, seconds_a_token=3.0, width=2,
                    gathered_twice=True, network=network)  # fmt: skip
    padded = 16 * 5 + 8
    # A ring over two hosts has the four adapters of each; a replica's eight ranks fill both, which leaves it one.
    gather = 2 * padded * 7 / 8 / 40 + 3 * 7 * 0.5
    reduce = 4 * padded * 7 / 8 / 40 + 3 * 7 * 0.5
    across = 2 * 4 * padded / 8 / 2 / 10 + 3 * 2 * 1 * 0.5
    seconds = 2 * max(100.0, gather) + max(200.0, gather) + max(200.0, gather + reduce + across)
    seconds += (gather + reduce + across) / 3
    step = predict(inputs, 8)
    assert step.seconds == pytest.approx(seconds) and step.efficiency == pytest.approx(600 / seconds)
    assert step.communication == pytest.approx(2 * gather + reduce + across) and step.padding == pytest.approx(
        88 / 53 - 1
    )
    slow = dataclasses.replace(inputs, seconds_a_token=1e-9)
    assert predict(slow, 8).seconds == pytest.approx(2 * gather + gather + gather + reduce + across
                                                     + (gather + reduce + across) / 3)  # fmt: skip


def test_bandwidths_of_a_ring():
    net = Network(inside=300.0, adapter=40.0, host=8)
    assert [net.bandwidth(ranks, 1) for ranks in (2, 8, 16)] == [300, 300, 300]
    assert [net.bandwidth(16, stride) for stride in (2, 4, 8, 64)] == [160, 80, 40, 40]
    assert net.bandwidth(4, 2) == 300


def test_padding_and_advice():
    """Rows of 392M are divided badly by 1,024: 9.7 %."""
    inputs = inputs_of(1024)
    assert round(100 * predict(inputs, 1024).padding, 1) == 9.7 and predict(inputs, 8).padding == 0
    degrees = [2**k for k in range(11)]
    best = advised(inputs, degrees)
    assert 32 <= best <= 64
    assert predict(inputs, best).efficiency >= max(predict(inputs, d).efficiency for d in degrees) - 0.002
    least = smallest_tokens(inputs, best)
    assert predict(inputs, best, least).efficiency >= 0.9 > predict(inputs, best, least - 1024).efficiency
    assert smallest_tokens(inputs, 1024) > 10 * least


@pytest.mark.parametrize("world", [8, 64, 256, 1024])
def test_the_table_of_the_page(world):
    inputs = inputs_of(world)
    degrees = [s for s in range(1, world + 1) if world % s == 0]
    best, whole = advised(inputs, degrees), predict(inputs, world)
    step = predict(inputs, best)
    speed = f"{32_768 * world / step.seconds:,.0f}"
    row = (
        f"| {world:,} | {whole.efficiency:.1%}, {whole.padding:.1%} | {best} x {world // best} | "
        f"{step.efficiency:.1%}, {step.padding:.1%} | {speed} | {smallest_tokens(inputs, best):,} | "
        f"{smallest_tokens(inputs, world):,} |"
    )
    assert row in PAGE, row


def test_the_inputs_of_the_page():
    """Measured speeds are those of README.md, and the page names each number of the program."""
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert all(f"{speed:,}" in readme and f"{speed:,}" in PAGE for speed in MEASURED.values())
    net = Network()
    for text in (
        f"{net.inside / 1e9:g} GB/s",
        f"{net.adapter / 1e9:g} GB/s",
        f"{net.host} GPUs",
        f"{net.hop * 1e6:g} µs",
    ):
        assert text in PAGE, text
    args = load_config([str(REPO / TOML)], Environment()).model
    assert f"{measured_mfu(args):.1%}" in PAGE
    gated = dataclasses.replace(args, use_forget_gate=True)
    assert measured_mfu(gated) == measured_mfu(args), "only n_h = 3 was measured with a gate"
    assert measured_mfu(dataclasses.replace(gated, num_householder=4)) < 0.4


def test_devices():
    assert memory_gb("NVIDIA H100 80GB HBM3") == 80 and memory_gb("h200") == 141 and memory_gb("a laptop") == 0
    assert devices.known_name("NVIDIA H100 NVL") == "H100 NVL" and devices.known_name("L40") == ""


def test_largest_local_batch():
    config = load_config([str(REPO / TOML), "--training.global_batch_size=-1"], Environment())
    parts = counts.parameters_by_part(config.model)

    def needed(sequences):
        config.training.local_batch_size = sequences
        return sum(rank_memory(config, 8, parts).values())

    room = 70e9
    largest = largest_local_batch(config, 8, parts, room)
    assert needed(largest) <= room < needed(largest + 1) and largest > 4
    assert largest_local_batch(config, 8, parts, 1e9) == 0
    # 48 sequences on 8 ranks: six a rank, in equal parts.
    config.training.global_batch_size = 48
    assert [largest_local_batch(config, 8, parts, needed(b) + 1) for b in (1, 2, 3)] == [1, 2, 3]
    assert largest_local_batch(config, 8, parts, needed(5)) == 3
    assert largest_local_batch(config, 8, parts, 1e15) == 6


@pytest.mark.parametrize(("options", "sequences", "remark"), [
    ([], "8 sequences", "training.local_batch_size; it is 4; must divide 8, a rank's share of the global batch"),
    (["--training.global_batch_size", "-1"], "5,150 sequences", "training.local_batch_size; it is 4"),
    (["--device-memory", "0.09"], "1 sequence", "training.local_batch_size; it is 4; must divide 8"),
    (["--device-memory", "0.01"], "none", "one sequence needs 89.9 MB, the most of it optimizer state (23 MB)"),
    (["--device-memory", "0.2", "--training.seq_len", "4096"], "none", "the most of it activations (218 MB)"),
])  # fmt: skip
def test_the_largest_batch_that_fits_is_what_it_says(options, sequences, remark):
    parsed, overrides = plan._parse([str(REPO / "train_configs/quickstart.toml"), *options])
    config = load_config(["--job.config_file", parsed.toml, *overrides], Environment(1))
    row = plan.memory_rows(config, 1, parsed.device_memory or 80.0)[-1]
    assert row[:2] == ("largest that fits", sequences) and remark in row[2]


def test_plan_says_it(capsys):
    plan.main([str(REPO / TOML), "--world-size", "1024", "--training.global_batch_size", "8192", "--device", "H200"])
    lines = {m[1]: line for line in capsys.readouterr().out.splitlines() if (m := re.match(r"  (\w+( \w+)*) ", line))}
    assert "Speed on H200" not in lines and "141 GB" in lines["fits 141 GB"]
    assert lines["largest that fits"].split("fits")[1].split()[:2] == ["8", "sequences"]
    assert "1024 shards x 1" in lines["as configured"] and "padding 9.7%" in lines["as configured"]
    assert math.isclose(float(lines["speed"].split("MFU ")[1].split("%")[0]) / 100, 0.41, abs_tol=0.2)
    assert "replicate" in lines["advised"] or "data_parallel_shard_degree" in lines["advised"]
