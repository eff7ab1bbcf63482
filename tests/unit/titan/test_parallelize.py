"""What torch.compile is told, for the code that a shape gets to be a function of that shape; who keeps states."""

import pytest
import torch
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torchtitan.distributed import ParallelDims

from torchtitan_deltaproduct.config import load_config
from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.titan import parallelize


@pytest.fixture
def compiler_settings(monkeypatch):
    """Those that `set_up_compiler` may change are given back."""
    monkeypatch.setattr(parallelize, "shield_compile_workers", lambda: None)
    names = "automatic_dynamic_shapes", "automatic_dynamic_local_pgo", "recompile_limit"
    torch._dynamo.reset()
    with (
        dynamo.patch({name: getattr(dynamo, name) for name in names}),
        inductor.patch({"deterministic": False, "triton.autotune_pointwise": True}),
    ):
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
    parallelize.set_up_compiler()
    assert inductor.deterministic and not inductor.triton.autotune_pointwise
    assert not (inductor.max_autotune or inductor.max_autotune_pointwise or inductor.coordinate_descent_tuning)


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
