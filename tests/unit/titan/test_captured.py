"""A micro-batch as a CUDA graph, with a stand-in for the graph that calls the function again; where there is none.

On a GPU: tests/gpu/test_runs.py.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from torchtitan_deltaproduct.config import Environment, load_config
from torchtitan_deltaproduct.titan import captured
from torchtitan_deltaproduct.titan.captured import CapturedStep, obstacle


@pytest.fixture
def stand_in(monkeypatch):
    """Takes the place of torch.cuda's graphs; `stand_in.step` is the step that is captured."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    there = SimpleNamespace(step=None)

    class Graph:
        def replay(self):
            there.step._loss.copy_(there.step._function(**there.step._given))

    @contextlib.contextmanager
    def graph(recorded, capture_error_mode):
        assert capture_error_mode == "thread_local"
        yield
        # What is captured has not been done yet.
        there.step.zero_grad()

    names = {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": Graph, "graph": graph,
             "stream": lambda stream: contextlib.nullcontext()}  # fmt: skip
    for name, value in names.items():
        monkeypatch.setattr(captured.torch.cuda, name, value)
    return there


def test_steps_are_those_of_the_function(stand_in):
    torch.manual_seed(0)
    model, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    reference.load_state_dict(model.state_dict())

    def function_of(module):
        def function(inputs, scale):
            loss = (module(inputs["x"]) * inputs["y"]).square().sum() * scale
            loss.backward()
            return loss.detach()

        return function

    step, plain = CapturedStep(function_of(model), model.parameters()), function_of(reference)
    stand_in.step = step
    places = set()
    for i in range(3):
        step.zero_grad()
        reference.zero_grad()
        for _ in range(2):
            given = {"inputs": {"x": torch.randn(4, 3), "y": torch.randn(4, 2)}, "scale": torch.tensor(0.5 + i)}
            assert torch.equal(step(**given), plain(**given))
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        places.add(tuple(weight.grad.data_ptr() for weight in model.parameters()))
        # As who skips a step does.
        model.zero_grad()
    assert len(places) == 1


CONFIG = "train_configs/state_tracking/S5_n4.toml"


@pytest.mark.parametrize(
    ("options", "device", "ranks", "reason"),
    [
        ([], "cuda", 1, None),
        (["--compile.cuda_graph=never"], "cuda", 1, "as set"),
        ([], "cpu", 1, "there is no CUDA"),
        ([], "cuda", 2, "there are 2 ranks"),
        (["--activation_checkpoint.mode=full"], "cuda", 1,
         'activation_checkpoint.mode is "full"'),
        (["--model.op_backend=fla"], "cuda", 1, "fla chooses kernels while it runs"),
        (["--compile.no-enable"], "cuda", 1, "nothing is compiled"),
        (["--compile.cuda_graph=always", "--compile.no-enable"], "cuda", 1, None),
        (["--training.local_batch_size=65536", "--training.global_batch_size=65536"],
         "cuda", 1, "activations take 178% of the memory, more than 5%"),
    ],
)  # fmt: skip
def test_what_stands_in_the_way(options, device, ranks, reason):
    config = load_config(["--job.config_file", CONFIG, *options], Environment())
    assert obstacle(config, torch.device(device), ranks, card=80 << 30) == reason
