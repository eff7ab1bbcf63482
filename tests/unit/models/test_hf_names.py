"""The name table against flash-linear-attention's own model and config, and the paper's layout."""

import dataclasses
import inspect

import pytest
import torch

from tests.toy import REPO
from torchtitan_deltaproduct.config import Environment, load_config
from torchtitan_deltaproduct.errors import CheckpointError
from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM, counts
from torchtitan_deltaproduct.models.hf_names import OWN_FIELDS, from_hf, from_hf_config, to_hf, to_hf_config

from .conftest import SETTINGS, small_args, small_model

fla = pytest.importorskip("fla.models.gated_deltaproduct")
PUBLISHED = sorted((REPO / "train_configs/fineweb").glob("*.toml"))


@pytest.mark.parametrize("name", SETTINGS)
def test_keys_and_shapes_equal_fla(name):
    args = small_args(**SETTINGS[name], num_householder=3)
    with torch.device("meta"):
        theirs = fla.GatedDeltaProductForCausalLM(fla.GatedDeltaProductConfig(**to_hf_config(args)))
        ours = to_hf(DeltaProductLM(args).state_dict(), args)
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    if args.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert {key: value.shape for key, value in ours.items()} == expected


def test_mlp_width_is_flas():
    for hidden, ratio in ((768, 4), (736, 4), (1468, 4), (1000, 3), (512, 3.5)):
        args = small_args(hidden_size=hidden, hidden_ratio=ratio, intermediate_size=None, num_hidden_layers=1)
        with torch.device("meta"):
            theirs = fla.GatedDeltaProductForCausalLM(fla.GatedDeltaProductConfig(**to_hf_config(args)))
        assert theirs.model.layers[0].mlp.up_proj.out_features == args.mlp_size


def test_round_trip(variant):
    model = small_model(**variant)
    back = from_hf(to_hf(model.state_dict(), model.args), model.args)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(value, back[name]) for name, value in model.state_dict().items())


def test_every_key_is_accounted_for():
    model = small_model(use_forget_gate=True)
    weights = to_hf(model.state_dict(), model.args)
    weights["model.layers.0.attn.extra"] = weights.pop("model.layers.1.attn.A_log")
    with pytest.raises(CheckpointError) as error:
        from_hf(weights, model.args)
    assert "1 missing, 1 left over" in str(error.value)
    assert "missing: model.layers.1.attn.A_log" in str(error.value)
    assert "left over: model.layers.0.attn.extra" in str(error.value)
    with pytest.raises(CheckpointError, match="missing: norm.weight"):
        to_hf({k: v for k, v in model.state_dict().items() if k != "norm.weight"}, model.args)


def test_a_tied_head_may_be_written_out_but_not_differ():
    model = small_model()
    weights = to_hf(model.state_dict(), model.args)
    weights["lm_head.weight"] = weights["model.embeddings.weight"].clone()
    model.load_state_dict(from_hf(weights, model.args))
    weights["lm_head.weight"] += 1
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        from_hf(weights, model.args)


def papers_layout(state_dict, n):
    """fla's state dict as the paper's code has it, a matrix each micro-step; of the query convolutions 0 is used."""
    old = {}
    for name, value in state_dict.items():
        head, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in ("k_proj", "v_proj", "b_proj", "k_conv1d", "v_conv1d"):
            old |= {f"{head}.{kind}s.{j}.weight": part for j, part in enumerate(value.chunk(n))}
        elif kind == "q_conv1d":
            old |= {f"{head}.q_conv1ds.{j}.weight": value if j == 0 else value + j for j in range(n)}
        else:
            old[name] = value
    return old


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_the_papers_layout_in_every_published_size(file):
    config = load_config(["--job.config_file", str(file)], Environment()).model
    args = DeltaProductArgs(
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(DeltaProductArgs)}
    )
    with torch.device("meta"):
        model = DeltaProductLM(args).state_dict()
    old = papers_layout(to_hf(model, args), args.num_householder)
    assert sum(value.numel() for value in old.values()) == counts.paper_parameters(args)
    assert {k: v.shape for k, v in from_hf(old, args).items()} == {k: v.shape for k, v in model.items()}


def test_the_papers_layout():
    model = small_model(num_householder=3)
    old = papers_layout(to_hf(model.state_dict(), model.args), 3)
    back = from_hf(old, model.args)
    assert all(torch.equal(value, back[name]) for name, value in model.state_dict().items())
    del old["model.layers.0.attn.k_projs.1.weight"]
    with pytest.raises(CheckpointError, match=r"micro-steps \[0, 2\]"):
        from_hf(old, model.args)


def test_fla_accepts_the_config_and_every_field_of_it_is_written():
    args = small_args(use_forget_gate=True, expand_v=1.5, num_householder=3)
    written = to_hf_config(args)
    config = fla.GatedDeltaProductConfig(**written)
    for name, value in written.items():
        assert getattr(config, name) == value, name
    parameters = inspect.signature(fla.GatedDeltaProductConfig.__init__).parameters
    assert set(parameters) - {"self", "kwargs"} <= set(written)


def test_config_round_trip():
    args = small_args(use_output_gate=True, hidden_ratio=3.5, tie_word_embeddings=False, norm_eps=1e-5)
    assert from_hf_config(to_hf_config(args)) == args
    assert from_hf_config(fla.GatedDeltaProductConfig(**to_hf_config(args)).to_dict()) == args


def test_what_a_config_leaves_out_is_flas_default():
    ours, theirs = from_hf_config({}), fla.GatedDeltaProductConfig()
    for field in dataclasses.fields(DeltaProductArgs):
        if field.name not in OWN_FIELDS:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_the_papers_gate_name_and_what_is_not_supported():
    assert from_hf_config({"use_gate": False}).use_output_gate is False
    for wrong in ({"attn": {"layers": [1]}}, {"hidden_act": "powlu"}, {"num_v_heads": 12}, {"conv_bias": True}):
        with pytest.raises(CheckpointError, match="not supported"):
            from_hf_config(wrong)
