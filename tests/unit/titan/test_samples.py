"""Samples while training are what an evaluation says; they disturb nothing, and a restart repeats them."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import toy as toys
from torchtitan_deltaproduct.checkpoint.load import load_model
from torchtitan_deltaproduct.evaluation.generate.decoding import Settings, continue_prompts
from torchtitan_deltaproduct.evaluation.generate.vocabulary import open_vocabulary
from torchtitan_deltaproduct.history import read_jsonl
from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM
from torchtitan_deltaproduct.titan.samples import continuations

PROMPTS = ["def ", "", "import os\nclass "]
ASKED = ("--validation.prompts", json.dumps(PROMPTS), "--validation.sample_tokens", "20")


def samples(run):
    return [{key: value for key, value in r.items() if key != "time"} for r in read_jsonl(run / "samples.jsonl")]


def said_by_an_evaluation(run, step):
    loaded = load_model(run, step)
    vocabulary = open_vocabulary(loaded)
    ids = [vocabulary.encode(prompt) for prompt in PROMPTS]
    return [text.text for text in continue_prompts(loaded.model, vocabulary, ids, Settings(tokens=20))]


def test_samples_of_a_run(toy, tmp_path, capsys):
    """Without them it trains the same to the bit; broken off and resumed, it says the same."""
    plain, run, broken = tmp_path / "plain", tmp_path / "run", tmp_path / "broken"
    toys.train(toy, plain)
    toys.train(toy, run, *ASKED)
    assert toys.learned(run) == toys.learned(plain)
    toys.assert_same_weights(toys.weights(run, 8), toys.weights(plain, 8))
    found = samples(run)
    modes = [(step, prompt, mode) for step in (0, 4, 8) for prompt in PROMPTS for mode in ("greedy", "sampled")]
    assert [(s["step"], s["prompt"], s["mode"]) for s in found] == modes
    assert [s["text"] for s in found if s["step"] == 8 and s["mode"] == "greedy"] == said_by_an_evaluation(run, 8)
    assert len({s["text"] for s in found if s["mode"] == "sampled"}) == 9
    assert "sample at step 8, greedy: 'def ' -> " in capsys.readouterr().out
    text = EventAccumulator(str(run / "tb"), size_guidance={"tensors": 0}).Reload()
    event = text.Tensors("samples/0_greedy/text_summary")[-1]
    first = ("def " + found[12]["text"]).splitlines()[0]
    assert event.step == 8 and event.tensor_proto.string_val[0].decode().splitlines()[0] == "    " + first
    toys.train(toy, broken, *ASKED, "--training.steps", "6")
    # As if killed with more written than saved, and in the middle of the validation of step 4.
    for folder in (broken / "checkpoint").glob("step-6"):
        folder.rename(tmp_path / "gone")
    lines = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join(x for x in lines if json.loads(x)["step"] < 5 and
                                                  (json.loads(x)["step"] < 4 or "lr" in x)))  # fmt: skip
    toys.train(toy, broken, *ASKED)
    assert samples(broken) == found
    assert {r["step"] for r in read_jsonl(broken / "samples.repeated.jsonl") if "step" in r} == {4, 6}


@pytest.mark.parametrize("options", ["--data.kind=group_word --data.group=S3", "--data.kind=formal_language"])
def test_data_without_a_tokenizer(problems, options):
    message = problems("", *options.split(), "--validation.enable", "--validation.prompts=a")
    assert 'validation.prompts ["a"]: only read with kind = "prepared" or "streaming"' in message, message


def test_prompts_without_validation(problems):
    message = problems('[data]\npaths = ["a"]\n[validation]\nprompts = ["x"]\n')
    assert "samples are drawn at each validation, and there is none" in message


def test_separators_and_bad_numbers_end_a_text():
    model = DeltaProductLM(
        DeltaProductArgs(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_heads=1, head_dim=16)
    )
    model.init_weights()
    greedy, sampled = continuations(model, [[1, 2, 3]], 9, separator=-1, count=12, seed=1)
    assert len(greedy) == len(sampled) == 12 and greedy != sampled
    assert continuations(model, [[1, 2, 3]], 9, separator=-1, count=12, seed=1)[1] == sampled
    assert continuations(model, [[1, 2, 3]], 9, separator=-1, count=12, seed=2)[1] != sampled
    # One after the other they say what they say together.
    both = continuations(model, [[1, 2, 3], [4]], 9, separator=-1, count=12, seed=1)
    assert both[0] == greedy and both[2] == continuations(model, [[4]], 9, separator=-1, count=12, seed=1)[0]
    end = sampled[5]
    cut = continuations(model, [[1, 2, 3]], 9, separator=end, count=12, seed=1)[1]
    assert cut == sampled[: sampled.index(end)]
    assert max(max(ids) for ids in continuations(model, [[1]], 4, separator=-1, count=12, seed=1)) < 4
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    assert continuations(model, [[1, 2, 3]], 9, separator=0, count=12, seed=1) == [[], []]
