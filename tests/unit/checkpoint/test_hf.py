"""Export and import: fla's own class gives our logits, a round trip changes no bit, and damage is named."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import toy as toys
from tests.unit.models.conftest import SETTINGS, small_model
from torchtitan_deltaproduct.checkpoint import from_hf, to_hf
from torchtitan_deltaproduct.checkpoint.hf import INDEX, write_hf
from torchtitan_deltaproduct.checkpoint.load import load_model
from torchtitan_deltaproduct.errors import CheckpointError, ConfigError
from torchtitan_deltaproduct.models.hf_names import to_hf as under_fla_names


@pytest.fixture(scope="module")
def fla_on_cpu():
    """Loaded when it is needed: every worker would import it to collect the tests."""
    return pytest.importorskip("tests.unit.checkpoint.fla_on_cpu")


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """A trained run with steps 4, 6, 8."""
    folder = tmp_path_factory.mktemp("hf") / "run"
    toys.train(toy, folder)
    return folder


@pytest.fixture(scope="module")
def exported(run):
    to_hf.main([str(run), str(run.parent / "exported"), "--max-shard-size", "50KB"])
    return run.parent / "exported"


def write(folder, model, args=None):
    folder.mkdir()
    write_hf(folder, model.state_dict(), args or model.args, training={})
    return folder


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_fla_gives_our_logits(name, n, tmp_path, monkeypatch, fla_on_cpu):
    from transformers import AutoModelForCausalLM

    model = small_model(torch.float32, **SETTINGS[name], num_householder=n)
    folder = write(tmp_path / "hf", model)
    fla_on_cpu.replace_kernels(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(50, (2, 21), generator=torch.Generator().manual_seed(1))
    expected = model(tokens).detach()
    torch.testing.assert_close(fla_on_cpu.logits(theirs, tokens), expected, atol=2e-4, rtol=2e-4)
    assert torch.equal(load_model(folder).model(tokens), expected)


def test_export(run, exported, capsys):
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "training.json", "README.md"} <= names
    assert len(list(exported.glob("model-*.safetensors"))) > 1 and not list(run.parent.glob(".*"))
    ours, theirs = load_model(run), load_model(exported)
    toys.assert_same_weights(ours.model.state_dict(), theirs.model.state_dict())
    assert (theirs.step, theirs.train_length, theirs.tokenizer) == (8, 64, exported)
    assert theirs.config == ours.config and ours.tokenizer == run / "tokenizer"
    config = json.loads((exported / "config.json").read_text())
    assert config["bos_token_id"] == config["eos_token_id"] == 0 and config["dtype"] == "float32"
    assert config["max_position_embeddings"] == 64


def test_the_tokenizer_opens_with_transformers(exported):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = "def main() -> None:"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text and tokenizer.eos_token_id == 0


def test_model_card(run, exported):
    card = (exported / "README.md").read_text()
    final = next(r for r in toys.records(run) if r["step"] == 8 and "validation_loss" in r)
    for said in ("| parameters | 36,544 |", "| step | 8 of 8 |", "| tokens | 2,048 (4 sequences of 64 a step) |",
                 f"| loss | {final['validation_loss']:.4g} |", "short convolution of 4",
                 "/data/validation |", "| sequences of | 64 tokens, nats a token |"):  # fmt: skip
        assert said in card
    assert "license" not in card


def test_a_licence_and_the_way_to_the_hub(run, tmp_path, capsys):
    to_hf.main([str(run), str(tmp_path / "my model"), "--license", "apache-2.0"])
    assert (tmp_path / "my model/README.md").read_text().splitlines()[4] == "license: apache-2.0"
    assert capsys.readouterr().out.endswith(f"to publish it: hf upload USER/'my model' '{tmp_path}/my model'\n")
    with pytest.raises(ConfigError, match="--license MIT licence: expected an identifier such as"):
        to_hf.main([str(run), str(tmp_path / "other"), "--license", "MIT licence"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_export(run, tmp_path, dtype):
    verified = to_hf.export(run, tmp_path / "out", step=4, dtype=dtype)
    assert 0 < verified.logit_difference < 0.05 and "same parameters" in verified.fla
    kept = load_file(tmp_path / "out/model.safetensors")
    assert all(tensor.dtype == getattr(torch, dtype) for tensor in kept.values())
    assert load_model(tmp_path / "out").step == 4


def test_decay_stays_float32(tmp_path):
    model = small_model(torch.float32, use_forget_gate=True)
    state = {name: to_hf._cast(name, tensor, torch.bfloat16) for name, tensor in model.state_dict().items()}
    (tmp_path / "hf").mkdir()
    write_hf(tmp_path / "hf", state, model.args, training={})
    kept = load_file(tmp_path / "hf/model.safetensors")
    assert kept["model.layers.0.attn.A_log"].dtype == torch.float32
    assert kept["model.layers.0.attn.q_proj.weight"].dtype == torch.bfloat16


def test_a_difference_is_found_and_nothing_is_kept(run, tmp_path, monkeypatch):
    def wrong(folder, state, args, **options):
        state = {name: tensor + (1e-3 if name == "norm.weight" else 0) for name, tensor in state.items()}
        write_hf(folder, state, args, **options)

    monkeypatch.setattr(to_hf, "write_hf", wrong)
    with pytest.raises(CheckpointError, match=r"another norm\.weight"):
        to_hf.export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way(run, exported, tmp_path):
    with pytest.raises(CheckpointError, match="--overwrite"):
        to_hf.export(run, exported)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="no exported model"):
        to_hf.export(run, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine/thesis.tex").exists()
    to_hf.export(run, tmp_path / "out", step=4)
    to_hf.export(run, tmp_path / "out", step=6, overwrite=True)
    assert load_model(tmp_path / "out").step == 6 and {p.name for p in tmp_path.iterdir()} == {"mine", "out"}
    for make in (lambda out: to_hf.export(run, out), lambda out: from_hf.import_hf(exported, out)):
        with pytest.raises(CheckpointError, match="thesis.tex/out cannot be made: a file is in the way"):
            make(tmp_path / "mine/thesis.tex/out")
    with pytest.raises(ConfigError, match="--max-shard-size 5 gigabytes"):
        to_hf.main([str(run), str(tmp_path / "x"), "--max-shard-size", "5 gigabytes"])
    with pytest.raises(ConfigError, match="--max-shard-size 0GB: expected a size"):
        to_hf.main([str(run), str(tmp_path / "x"), "--max-shard-size", "0GB"])


def test_import_and_train_from_it(run, exported, toy, tmp_path, capsys):
    from_hf.main([str(exported), str(tmp_path / "imported")])
    said = capsys.readouterr().out
    assert "36,544 parameters, with its tokenizer" in said and "num_householder = 2" in said
    imported = load_model(tmp_path / "imported")
    assert imported.step == 0 and imported.tokenizer == tmp_path / "imported/tokenizer"
    toys.assert_same_weights(imported.model.state_dict(), load_model(run).model.state_dict())
    start = ("--checkpoint.initial_load_path", str(tmp_path / "imported"), "--training.steps", "1")
    toys.train(toy, tmp_path / "new", *start)
    before = [r["validation_loss"] for r in toys.records(tmp_path / "new") if r["step"] == 0]
    last = [r["validation_loss"] for r in toys.records(run) if r["step"] == 8 and "validation_loss" in r]
    assert before == last
    with pytest.raises(CheckpointError, match="import it first"):
        toys.train(toy, tmp_path / "other", "--checkpoint.initial_load_path", str(exported))


def test_import_of_a_run_that_kept_its_checkpoints_elsewhere(toy, tmp_path):
    toys.train(toy, tmp_path / "run", "--checkpoint.folder", "ckpt", "--training.steps", "2")
    to_hf.main([str(tmp_path / "run"), str(tmp_path / "hf")])
    from_hf.main([str(tmp_path / "hf"), str(tmp_path / "imported")])
    assert load_model(tmp_path / "imported").step == 0


def test_import_of_the_papers_layout(tmp_path):
    """One projection a micro-step, and `use_gate` for the output gate."""
    model = small_model(torch.float32, num_householder=2, use_output_gate=True)
    folder = write(tmp_path / "paper", model)
    old = {}
    for name, value in under_fla_names(model.state_dict(), model.args).items():
        head, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in ("k_proj", "v_proj", "b_proj", "k_conv1d", "v_conv1d"):
            old |= {f"{head}.{kind}s.{j}.weight": part.contiguous() for j, part in enumerate(value.chunk(2))}
        elif kind == "q_conv1d":
            old |= {f"{head}.q_conv1ds.{j}.weight": value + j for j in range(2)}
        else:
            old[name] = value
    save_file(old, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["use_gate"] = config.pop("use_output_gate")
    (folder / "config.json").write_text(json.dumps(config))
    from_hf.import_hf(folder, tmp_path / "imported")
    tokens = torch.arange(20).view(1, 20)
    assert torch.equal(load_model(tmp_path / "imported").model(tokens), model(tokens))
    assert torch.equal(load_model(folder).model(tokens), model(tokens))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_key(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.attn.stray"] = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors")


def change_norm(folder, change):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = change(weights["model.norm.weight"])
    save_file(weights, folder / "model.safetensors")


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(("damage", "said"), [
    (cut, "cut short or damaged"),
    (drop_key, r"missing: model\.norm\.weight\nleft over: model\.layers\.0\.attn\.stray"),
    (lambda folder: change_norm(folder, torch.Tensor.int), r"norm\.weight is torch\.int32; expected floating-point"),
    (lambda folder: change_norm(folder, lambda x: x / 0), r"norm\.weight holds values that are not finite"),
    (only_pickle, r"only pytorch_model\.bin, a pickle, which is not read"),
    (lambda folder: edit(folder, model_type="llama"), "type 'llama'; expected 'gated_deltaproduct'"),
    (lambda folder: edit(folder, num_householder=3), r"k_proj\.weight is \[48, 24\], expected \[72, 24\]"),
    (lambda folder: edit(folder, hidden_act="relu"), "hidden_act = 'relu' is not supported"),
    (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    (lambda folder: edit(folder, num_heads="three"), r"config\.json: num_heads = 'three' cannot be; expected a whole"),
    (lambda folder: edit(folder, use_forget_gate=1), "use_forget_gate = 1 cannot be; expected true or false"),
    (lambda folder: edit(folder, expand_v=-1), "expand_v = -1 cannot be; expected a number above 0"),
    (lambda folder: (folder / "training.json").write_text('{"config": 3}'), "config is not the tables of a run"),
    (lambda folder: (folder / INDEX).write_text('{"weight_map": ["a"]}'), "does not name a file for each tensor"),
    (lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": 5}}'), "does not name a file for each"),
])  # fmt: skip
def test_what_cannot_be_read(damage, said, tmp_path):
    folder = write(tmp_path / "hf", small_model(torch.float32))
    damage(folder)
    for use in (load_model, lambda path: from_hf.import_hf(path, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=said):
            use(folder)
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1


def test_wrong_tokenizer(tmp_path, run):
    from tokenizers import Tokenizer, models

    wide = Tokenizer(models.WordLevel({f"w{i}": i for i in range(400)}))
    wide.add_special_tokens(["</s>"])
    (tmp_path / "tokenizer").mkdir()
    wide.save(str(tmp_path / "tokenizer/tokenizer.json"))
    with pytest.raises(CheckpointError, match="separator has id 400, and the model has 320"):
        to_hf.export(run, tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="There is no tokenizer.json in nowhere"):
        to_hf.export(run, tmp_path / "out", tokenizer="nowhere")


def test_steps_of_an_export(exported):
    with pytest.raises(CheckpointError, match="has no steps"):
        load_model(exported, step=4)
