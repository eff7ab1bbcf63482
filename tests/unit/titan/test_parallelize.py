"""What torch.compile is told, for the code that a shape gets to be a function of that shape."""

import pytest
import torch
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor

from torchtitan_deltaproduct.titan import parallelize


@pytest.fixture
def compiler_settings(monkeypatch):
    """Those that `set_up_compiler` may change are given back."""
    monkeypatch.setattr(parallelize, "shield_compile_workers", lambda: None)
    names = "automatic_dynamic_shapes", "automatic_dynamic_local_pgo", "recompile_limit"
    torch._dynamo.reset()
    with dynamo.patch({name: getattr(dynamo, name) for name in names}), inductor.patch(deterministic=False):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("lengths_vary", "graphs"), [(False, 4), (True, 2)])
def test_a_length_has_a_graph_of_its_own(compiler_settings, lengths_vary, graphs):
    """Whatever was compiled before it: torch's default is one graph for all lengths after the first."""
    made = []

    def backend(graph, _):
        made.append(graph)
        return graph.forward

    parallelize.set_up_compiler(lengths_vary=lengths_vary)
    function = torch.compile(lambda x: x.sin() + 1, backend=backend)
    for length in (8, 16, 24, 32):
        function(torch.ones(length, 2))
    assert len(made) == graphs and not dynamo.automatic_dynamic_local_pgo
