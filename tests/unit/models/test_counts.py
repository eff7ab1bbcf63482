"""The closed formulas against numel and torch's FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torchtitan_deltaproduct import ops
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.models import DeltaProductLM, counts, loss

from .conftest import small_args, small_model


def test_parameters_by_part_equal_numel(variant):
    args = small_args(**variant)
    with torch.device("meta"):
        model = DeltaProductLM(args)
    counts.check_formulas(model, args)
    assert counts.total_parameters(args) == sum(p.numel() for p in model.parameters())


def test_a_parameter_that_the_formulas_leave_out_is_named():
    model = small_model(torch.float32)
    next(iter(model.layers.children())).mixer.extra = torch.nn.Linear(3, 2)
    with pytest.raises(ConfigError, match=r"layers.0.mixer.extra.weight \[2, 3\] is in none of them"):
        counts.check_formulas(model, model.args)


def test_a_part_of_another_size_is_named():
    model = small_model(torch.float32, tie_word_embeddings=False)
    model.norm.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match="norms: .* in the model, .* by the formula"):
        counts.check_formulas(model, model.args)


def test_flops_equal_the_flop_counter(variant):
    model = small_model(torch.float32, **variant)
    args, length = model.args, 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, length, dtype=torch.int64))
    by_op = counter.get_flop_counts()["Global"]
    matrices = sum(flops for op, flops in by_op.items() if str(op) in ("aten.mm", "aten.addmm", "aten.bmm"))
    operator = ops.flops_per_token(args.num_householder, args.num_heads, args.head_dim, args.head_v_dim)
    per_token = counts.forward_flops_per_token(args) - args.num_hidden_layers * operator
    assert matrices == 2 * length * per_token
    assert counter.get_total_flops() == 2 * length * counts.forward_flops_per_token(args)


@pytest.mark.parametrize("tied", [True, False])
def test_training_flops_equal_the_flop_counter(tied, monkeypatch):
    """Forward, loss by chunks and backward; the head counts whether tied or not."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 7)
    model = small_model(torch.float32, use_short_conv=False, tie_word_embeddings=tied)
    tokens = torch.zeros(2, 24, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).backward()
    assert counter.get_total_flops() == 2 * 24 * counts.training_flops_per_token(model.args)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_training_is_three_forward_passes_and_grows_with_n(n):
    args, more = small_args(num_householder=n), small_args(num_householder=n + 1)
    assert counts.training_flops_per_token(args) == 3 * counts.forward_flops_per_token(args)
    grown = counts.forward_flops_per_token(more) - counts.forward_flops_per_token(args)
    matrices = 2 * args.hidden_size * args.num_heads * (args.head_dim + args.head_v_dim + 1)
    operator = [ops.flops_per_token(m, args.num_heads, args.head_dim, args.head_v_dim) for m in (n, n + 1)]
    assert grown == args.num_hidden_layers * (matrices + operator[1] - operator[0])
