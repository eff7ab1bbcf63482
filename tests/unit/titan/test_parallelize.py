"""What torch.compile is told, for the code that a shape gets to be a function of that shape; who keeps states."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torchtitan.distributed import ParallelDims

from torchtitan_deltaproduct.config import load_config
from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.titan import parallelize

LENGTHS = "automatic_dynamic_shapes", "automatic_dynamic_local_pgo", "recompile_limit"
CHOICES = {"deterministic": False, "triton.autotune_pointwise": True}


@pytest.fixture
def compiler_settings(monkeypatch):
    """Those that `set_up_compiler` may change are given back."""
    monkeypatch.setattr(parallelize, "start_compile_workers", lambda: None)
    torch._dynamo.reset()
    for config, names in (dynamo, LENGTHS), (inductor, CHOICES):
        for name in names:
            monkeypatch.setattr(config._config[name], "env_value_force", config._config[name].env_value_force)
    with dynamo.patch({name: getattr(dynamo, name) for name in LENGTHS}), inductor.patch(CHOICES):
        yield
    torch._dynamo.reset()


def test_a_length_has_a_graph_of_its_own(compiler_settings):
    """Whatever was compiled before it: torch's default is one graph for all lengths after the first."""
    made = []

    def backend(graph, _):
        made.append(graph)
        return graph.forward

    parallelize.set_up_compiler()
    function = torch.compile(lambda x: x.sin() + 1, backend=backend)
    for length in (8, 16, 24, 32):
        function(torch.ones(length, 2))
    assert len(made) == 4 and not dynamo.automatic_dynamic_local_pgo


def test_no_kernel_is_chosen_by_timing(compiler_settings):
    """Not the second function either, nor in autograd's thread: torch takes back what is only assigned."""

    def chosen_by_timing() -> list[str]:
        names = "max_autotune", "max_autotune_pointwise", "coordinate_descent_tuning", "triton.autotune_pointwise"
        return [name for name in names if inductor._get_dict()[name]] + ["reductions"] * (not inductor.deterministic)

    parallelize.set_up_compiler()
    x = torch.ones(8, requires_grad=True)
    torch.compile(lambda x: x.sin().sum())(x).backward()
    assert chosen_by_timing() == []
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(chosen_by_timing).result() == []
        assert thread.submit(lambda: dynamo.recompile_limit).result() >= 64


@pytest.mark.parametrize(
    ("mode", "option", "kept"),
    [("none", "2", True), ("full", "2", True), ("selective", "2", True), ("selective", "op", False),
     ("selective", "products", False)],
)  # fmt: skip
def test_states_are_kept_unless_operations_are_selected(mode, option, kept):
    options = ["--model.hidden_size=32", "--model.num_heads=2", "--model.head_dim=16", "--model.num_hidden_layers=2"]
    options += [f"--activation_checkpoint.mode={mode}", f"--activation_checkpoint.selective_ac_option={option}"]
    options += ["--compile.no-enable", "--training.mixed_precision_param=float32"]
    config = load_config(["--job.config_file", "train_configs/fineweb/deltaproduct_392M_n2_4k.toml", *options])
    with torch.device("meta"):
        model = DeltaProductLM(config.model)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    blocks = [*parallelize.parallelize(model, dims, config).layers.values()]
    assert [block.mixer.keep_states for block in blocks] == [kept] * 2
    assert isinstance(blocks[1], CheckpointWrapper) == (mode != "none")
