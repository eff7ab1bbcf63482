"""The benchmarks of training, of scale, of failures and of context parallelism run and print what they are to."""

import json
import math
import random
import subprocess
import sys

import pytest

from benchmarks import failures, scale
from benchmarks.training import Variant, kind_of, main, run, table_of
from tests.processes import completed
from tests.toy import REPO


@pytest.fixture
def forked_rows(monkeypatch):
    """The rows' processes start with everything imported."""

    def run(command, **_):
        code, printed = completed(command[1:])
        return subprocess.CompletedProcess(command, code, printed, printed)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_toy_on_the_cpu(ranks, forked_rows, capsys):
    main(["--device", "cpu", "--householders", "2", "--gates", "gated", "--steps", "2", "--ranks", str(ranks)])
    first, *table = capsys.readouterr().out.splitlines()
    row = json.loads(first)
    assert row["ranks"] == ranks
    assert row["model"] == "ours" and row["num_householder"] == 2 and row["gated"] and row["batch"] == 2
    assert row["tokens_per_second"] > 0 and row["first_step_seconds"] > 0 and row["peak_gib"] is None
    assert math.isclose(row["loss"], math.log(320), rel_tol=0.05)
    assert all(row["kernels"][kind] > 0 for kind in ("matmul", "operator", "optimizer", "elementwise"))
    assert table[0].startswith("CPU, batch 2 x 64") and any("toy" in line and "ours" in line for line in table)


def test_no_time_is_left(capsys):
    main(["--device", "cpu", "--householders", "1", "3", "--gates", "plain", "--minutes", "0"])
    said = capsys.readouterr().out
    assert said.count("not run: the time was over") == 4 and "toy n_h = 3 plain ours: not run" in said


def test_a_row_that_fails_says_why(forked_rows):
    row = run(Variant("ours", "9M", 1, False, "cpu", 2, 64, 1, 1), seconds=300)
    assert "deltaproduct_9M_n1_4k.toml" in row["failed"]


def test_ratios_are_to_the_row_of_fla_of_the_same_shape(capsys):
    from rich.console import Console

    rest = {"mfu": 0.5, "first_step_seconds": 1.0, "kernels": {"matmul": 10.0}, "device": "H200"}
    rows = [
        (Variant(model, "392M", n, False, "cuda", 8, 4096, 1, 1), {"tokens_per_second": speed, "peak_gib": gib} | rest)
        for model, n, speed, gib in (("ours", 1, 3e5, 30.0), ("fla", 1, 2e5, 40.0), ("ours", 2, 1e5, 20.0))
    ]
    Console(width=180).print(table_of(rows))
    ours, fla, alone = (line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()[4:7])
    assert ours[5:10] == ["300,000", "1.50x", "50.0%", "30.0", "0.75x"] and fla[6] == "1.00x" and alone[6] == "-"


@pytest.mark.parametrize(
    ("kernel", "kind"),
    {
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "matmul",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matmul",
        "triton_poi_fused__to_copy_mul_silu_3": "elementwise",
        "triton_red_fused__to_copy_amax_copy_exp_gather_sub_sum_0": "loss",
        "triton_red_fused__to_copy_gather_prepare_softmax_online_1": "loss",
        "layer_norm_fwd_kernel": "elementwise",
        "swiglu_bwd_kernel": "elementwise",
        "causal_conv1d_fwd_kernel": "conv",
        "l2norm_fwd_kernel": "operator",
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": "operator",
        "cross_entropy_bwd_kernel": "loss",
        "void at::native::chunk_cat_cuda_kernel<float>": "copy",
        "Memcpy DtoD (Device -> Device)": "copy",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
        "some_unknown_thing": "other",
    }.items(),
)
def test_kinds_of_kernels(kernel, kind):
    assert kind_of(kernel) == kind


@pytest.mark.slow
def test_sequences_cut_among_two_ranks():
    """Row `together` is the tokens of row `apart`, `long` twice as many; the loss is that of random words."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "benchmarks.context_parallel", "--device", "cpu", "--tokens", "512", "--steps", "2", "--eager"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, check=True)
    lines = [line.replace("\u2502", " ").split() for line in done.stdout.splitlines()]
    rows = {line[0]: line for line in lines if line and line[0] in ("apart", "together", "long")}
    assert [rows[name][1:4] for name in ("apart", "together", "long")] == [
        ["256", "128", "op"], ["256", "128", "op"], ["512", "256", "op"]
    ]  # fmt: skip
    assert all(math.isclose(float(row[-2]), math.log(320), rel_tol=0.05) for row in rows.values())
    assert "overhead of context parallelism at 128 tokens a rank" in done.stdout


@pytest.mark.slow
def test_the_operator_as_a_shard():
    code, printed = completed(["-m", "benchmarks.context_parallel", "--operator", "--device", "cpu", "--steps", "1"])
    assert code == 0, printed
    lines = printed.replace("\u2502", " ").splitlines()
    rows = [line.split() for line in lines if "x 64" in line or "x 128" in line]
    assert len(rows) == 8 and all(row[-1].endswith("x") and float(row[-1][:-1]) > 0.5 for row in rows)


def test_scale_measures_a_set_of_its_own(tmp_path):
    folder = scale.make_set(tmp_path / "set", 30)
    numbers = scale.measure(folder, windows=40)
    assert 0 < numbers["start"] < 5 and 0 < numbers["window"] < 0.5 and numbers["memory"] >= 0
    assert 0 < scale.continue_seconds(tmp_path / "again", 3) < 5


def test_scale_measures_a_run_of_its_own(tmp_path):
    records = scale.of_records(tmp_path / "run", 300, runs=6)
    folders = scale.of_folders(tmp_path / "checkpoints", 3, files=4)
    plans = scale.of_plans(4, tensors=50)
    assert [*records, *folders, *plans] == ["start, records", "status", "compare, 6 runs", "start, checkpoints",
                                            "retention", "plan again", "plan at first"]  # fmt: skip
    assert all(0 < seconds < 15 for seconds in (records | folders | plans).values())
    assert plans["plan again"] < plans["plan at first"]
    assert (tmp_path / "run/metrics.repeated.jsonl").read_text().count("\n") == 11


TRAINER = """
import json, pathlib, sys, time
folder, wrong = pathlib.Path(sys.argv[1]), float(sys.argv[2])
loss = wrong if folder.exists() else 0.0
folder.mkdir(exist_ok=True)
saved, metrics, draft = folder / "saved", folder / "metrics.jsonl", folder / "draft"
step = int(saved.read_text()) if saved.exists() else 0
lines = metrics.read_text().splitlines()[:step] if step else []
while step < 60:
    step += 1
    record = {"step": step, "loss": 1 / step + loss, "grad_norm": 1.0, "seconds": 0.01, "time": time.time()}
    lines.append(json.dumps(record))
    draft.write_text("".join(f"{line}\\n" for line in lines))
    draft.replace(metrics)
    if step % 20 == 0:
        draft.write_text(str(step))
        draft.replace(saved)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("wrong", ["0", "1e-9"])
def test_failures_are_counted_and_compared(tmp_path, wrong):
    """A program that trains and saves as a run does; one of them learns another thing when it goes on."""
    run = failures.Run("x.toml", tmp_path / "run", 1, [])
    run.command = [sys.executable, "-c", TRAINER, str(tmp_path / "run"), wrong]
    said = []
    cost = failures.kill_again_and_again(run, 3, 0.1, random.Random(1), lambda *given: said.append(given))
    assert [number for number, _ in said] == [1, 2, 3] == list(range(1, len(cost) + 1))
    for one in cost:
        assert one.from_step % 20 == 0 and 0 <= one.at - one.from_step <= 20
        assert 0 < one.start_up < 20 and one.lost == pytest.approx(0.01 * max(one.at - one.from_step - 1, 0))
    assert run.steps()[-1]["step"] == 60 and bool(run.different) == (wrong != "0")
    rows = failures.table(cost, 0.5).columns[1]._cells
    assert rows[3] == "50.0%" and 99 < float(rows[4].rstrip("%")) <= 100
