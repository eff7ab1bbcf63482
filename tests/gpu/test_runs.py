"""Training, resuming and the evals on a CUDA device: python -m pytest -m gpu tests/gpu/test_runs.py

A run that was killed goes on to the same bits: the kernels are deterministic and chosen without timing them.
"""

import math

import numpy as np
import pytest
import torch

from tests import toy as toys
from torchtitan_deltaproduct.checkpoint.load import load_model
from torchtitan_deltaproduct.events import last_stop, read_events

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Documents packed, the operator on our kernels.
MODEL = ("--model.hidden_size", "128", "--model.head_dim", "64", "--data.reset_state_at_documents",
         "--checkpoint.keep_latest_k", "0")  # fmt: skip


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "run"
    toys.launch(toy, folder, *MODEL, "--compile.enable")
    return folder


def test_it_runs_on_our_kernels_and_learns(run):
    log = toys.log_of(run)
    assert "runs on backend triton" in log and "device: cuda" in log and "a micro-batch: one CUDA graph" in log
    losses = [r["loss"] for r in toys.records(run) if "loss" in r]
    assert losses[-1] < losses[0] - 0.2 and last_stop(read_events(run))["reason"] == "finished"


@pytest.mark.parametrize(("mode", "graph"), [
    ("disabled", "never"), ("async", "never"), ("async_with_pinned_mem", "never"), ("async_with_pinned_mem", "always"),
])  # fmt: skip
def test_killed_and_restarted(toy, run, tmp_path, mode, graph, monkeypatch):
    """As on another node, where nothing is compiled yet."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    killed, options = tmp_path / "run", (*MODEL, "--compile.enable", "--checkpoint.async_mode", mode,
                                          "--compile.cuda_graph", graph)  # fmt: skip
    process = toys.launch(toy, killed, *options, wait=False)
    toys.wait_for(killed, "step 5/8", 300)
    toys.kill(process)
    assert not (killed / "checkpoint/step-8").exists()
    toys.launch(toy, killed, *options)
    resumed = [line for line in toys.log_of(killed).splitlines() if "resumed step" in line]
    differing = {}
    for step in (2, 4, 6, 8):
        ours, theirs = toys.weights(killed, step), toys.weights(run, step)
        names = [name for name, value in theirs.items() if isinstance(value, torch.Tensor)]
        differing[step] = [name for name in names if not torch.equal(ours[name], theirs[name])]
    assert resumed and not any(differing.values()), (resumed, differing)
    assert toys.learned(killed) == toys.learned(run)
    # Where Inductor keeps which of several variants of a kernel was fastest.
    assert [*tmp_path.rglob("*.py")] and not [*tmp_path.rglob("*.best_config")]


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_graph_has_the_bits_of_kernels_launched_one_by_one(toy, tmp_path, precision):
    """Accumulated, with documents, a gate, a tied head and validation between; Muon's update of what it left."""
    options = (*MODEL, "--compile.enable", "--training.mixed_precision_param", precision, "--model.use_forget_gate",
               "--model.tie_word_embeddings", "--optimizer.name", "Muon")  # fmt: skip
    runs = {choice: tmp_path / choice for choice in ("always", "never")}
    for choice, folder in runs.items():
        toys.launch(toy, folder, *options, "--compile.cuda_graph", choice)
    assert toys.learned(runs["always"]) == toys.learned(runs["never"])
    toys.assert_same_weights(toys.weights(runs["always"], 8), toys.weights(runs["never"], 8))


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_words_of_a_group_are_learned_to_the_same_bits(tmp_path, precision):
    """Of few symbols: their embedding's gradient is a sum over thousands of tokens."""
    options = ("--training.steps", "150", "--lr_scheduler.total_steps", "4900", "--metrics.log_freq", "1",
               "--training.mixed_precision_param", precision, "--validation.no-enable",
               "--checkpoint.no-enable")  # fmt: skip
    runs = {f"{graph}{i}": graph for graph in ("never", "always") for i in range(2)}
    for name, graph in runs.items():
        config = toys.REPO / "train_configs/state_tracking/S5_n4.toml"
        toys.launch(config, tmp_path / name, *options, "--compile.cuda_graph", graph)
    first, *others = (toys.learned(tmp_path / name) for name in runs)
    assert all(other == first for other in others)


def test_runs_that_compile_at_the_same_time_agree(toy, tmp_path, monkeypatch):
    """Each with empty caches and on a GPU that others keep busy, where a choice by timing is a matter of luck."""
    runs = [tmp_path / str(i) for i in range(6)]
    processes = []
    for folder in runs:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{folder}-inductor")
        monkeypatch.setenv("TRITON_CACHE_DIR", f"{folder}-triton")
        processes.append(toys.launch(toy, folder, *MODEL, "--compile.enable", wait=False))
    assert [process.wait(timeout=300) for process in processes] == [0] * len(runs)
    for folder in runs[1:]:
        assert toys.learned(folder) == toys.learned(runs[0])
        toys.assert_same_weights(toys.weights(folder, 8), toys.weights(runs[0], 8))


def test_pinned_saves_hold_the_same_bits(toy, tmp_path):
    """Of every step, while training goes on."""
    steps = ("--training.steps", "24", "--lr_scheduler.total_steps", "24", "--checkpoint.interval", "1")
    runs = {mode: tmp_path / mode for mode in ("disabled", "async_with_pinned_mem")}
    for mode, folder in runs.items():
        toys.launch(toy, folder, *MODEL, "--compile.enable", *steps, "--checkpoint.async_mode", mode)
    plain, pinned = runs.values()
    assert toys.learned(plain) == toys.learned(pinned)
    for step in range(1, 25):
        toys.assert_same_weights(toys.weights(pinned, step), toys.weights(plain, step))


def test_evals_agree_with_the_cpu(toy, run, tmp_path):
    from torchtitan_deltaproduct.evaluation import effective_rank, length_extrapolation
    from torchtitan_deltaproduct.evaluation.files import read_results

    for device, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        common = [str(run), "--data", str(toy.parent / "data/train"), "--device", device, "--dtype", dtype]
        common += ["--length", "512", "--sequences", "4", "--documents", "packed", "--out", str(tmp_path / device)]
        length_extrapolation.main(common)
        effective_rank.main(common)
    for name, key in (("length_extrapolation", "loss"),):
        gpu, cpu = (read_results(tmp_path / device / f"{name}.json")[0]["buckets"] for device in ("cuda", "cpu"))
        assert all(math.isclose(a[key], b[key], rel_tol=1e-2) for a, b in zip(gpu, cpu, strict=True))
    gpu, cpu = (np.load(tmp_path / device / "effective_rank.npz")["rank"] for device in ("cuda", "cpu"))
    assert np.abs(gpu - cpu).max() < 0.05 * cpu.max()


def test_ranks_of_the_same_states():
    from torchtitan_deltaproduct.evaluation.effective_rank.singular_values import effective_rank as rank

    states = torch.randn(64, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rank(states.cuda()).cpu(), rank(states), rtol=1e-6, atol=1e-6)


def test_greedy_text_is_the_argmax_of_full_forwards(run):
    from torchtitan_deltaproduct.evaluation.generate.decoding import Settings, continue_prompts
    from torchtitan_deltaproduct.evaluation.generate.sampling import Sampling
    from torchtitan_deltaproduct.evaluation.generate.vocabulary import open_vocabulary

    loaded = load_model(run, device="cuda", dtype=torch.float32)
    vocabulary = open_vocabulary(loaded)
    prompt = vocabulary.encode("def main(")
    (found,) = continue_prompts(loaded.model, vocabulary, [prompt], Settings(16, (), Sampling(), False, 8), [0])
    ids = list(prompt)
    for token in found.tokens:
        assert loaded.model(torch.tensor([ids], device="cuda"))[0, -1].argmax().item() == token
        ids.append(token)
