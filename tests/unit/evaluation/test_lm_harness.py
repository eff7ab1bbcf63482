"""The real lm-eval on local tasks: its numbers against full forwards of ours, one request at a time, and no network."""

import json
import math
import shutil
import socket
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.toy import REPO
from torchtitan_deltaproduct.checkpoint.load import load_model
from torchtitan_deltaproduct.errors import CheckpointError, ConfigError, DataError
from torchtitan_deltaproduct.evaluation import lm_harness

TASKS = "py_choice,py_last,py_complete,py_perplexity"
LOCAL = ["--include_path", "tests/lm_tasks"]


@pytest.fixture(scope="module")
def here():
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: " + lm_harness.INSTALL)
    from lm_eval import tasks

    with pytest.MonkeyPatch.context() as patch:
        # lm-eval reads its 14,000 task files for 8 seconds each time; here only ours.
        patch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
        # Data paths of the tasks are relative.
        patch.chdir(REPO)
        yield patch


@pytest.fixture(scope="module")
def logged(here, toy_run, tmp_path_factory):
    """Samples of each task and the results, of one run that is not allowed to open a connection."""
    folder = tmp_path_factory.mktemp("lm_eval")

    def refuse(self, address, *rest):
        raise AssertionError(f"a connection to {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", lambda *address: refuse(None, address))
        lm_harness.main([str(toy_run), "--tasks", TASKS, *LOCAL, "--log_samples", "--output_path", str(folder)])
    return read(folder)


def read(folder):
    (results,) = folder.rglob("results_*.json")
    samples = {path.name.split("_2")[0].removeprefix("samples_"): path for path in results.parent.glob("samples_*")}
    lines = {task: [json.loads(line) for line in path.open()] for task, path in samples.items()}
    return SimpleNamespace(results=json.loads(results.read_text()), **lines)


@pytest.fixture(scope="module")
def model(toy_run):
    return load_model(toy_run, dtype=torch.float64).model


def log_probability(model, tokenizer, context, continuation, separator=0):
    """By one full forward in float64, and a loop over the tokens of the continuation."""
    spaces = len(context) - len(context.rstrip())
    context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
    whole, before = tokenizer.encode(context + continuation), tokenizer.encode(context)
    start = len(before)
    if len(whole) <= start:
        # They are one token together; each has its own.
        whole = before + tokenizer.encode(continuation)
    if not before:
        whole, start = [separator, *whole], 1
    p = model(torch.tensor([whole]))[0].softmax(1)
    steps = range(start, len(whole))
    greedy = all(p[i - 1].argmax().item() == whole[i] for i in steps)
    return sum(math.log(p[i - 1, whole[i]].item()) for i in steps), greedy


def arguments_of(sample):
    """lm-eval logs {"gen_args_0": {"arg_0": ..., "arg_1": ...}, ...}."""
    return [tuple(part.values()) for part in sample["arguments"].values()]


@pytest.mark.parametrize("task", ["py_choice", "py_last"])
def test_log_likelihoods_are_those_of_our_forward(logged, model, vocabulary, task):
    samples, seen = getattr(logged, task), 0
    for sample in samples:
        for (context, continuation), ((logprob, greedy),) in zip(arguments_of(sample), sample["resps"], strict=True):
            expected, ours = log_probability(model, vocabulary, context, continuation)
            assert float(logprob) == pytest.approx(expected, abs=1e-3) and (str(greedy) == "True") is ours
            seen += 1
    assert seen == {"py_choice": 35, "py_last": 8}[task]
    if task == "py_choice":
        best = [max(range(len(s["resps"])), key=lambda i, s=s: float(s["resps"][i][0][0])) for s in samples]
        right = sum(choice == int(sample["target"]) for choice, sample in zip(best, samples, strict=True))
        assert logged.results["results"][task]["acc,none"] == right / len(samples)
    else:
        mean = sum(log_probability(model, vocabulary, *arguments_of(s)[0])[0] for s in samples) / len(samples)
        assert logged.results["results"][task]["perplexity,none"] == pytest.approx(math.exp(-mean), rel=1e-3)


def test_rolling_perplexity_is_that_of_whole_documents(logged, model, vocabulary):
    total = size = words = 0
    for sample in logged.py_perplexity:
        text = sample["doc"]["text"]
        expected, _ = log_probability(model, vocabulary, "", text)
        assert float(sample["resps"][0][0]) == pytest.approx(expected, rel=1e-5)
        total, size, words = total + expected, size + len(text.encode()), words + len(text.split())
    assert max(len(vocabulary.encode(sample["doc"]["text"])) for sample in logged.py_perplexity) > 4 * 64
    found = logged.results["results"]["py_perplexity"]
    assert found["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-5)


def test_greedy_generation_is_the_argmax_of_full_forwards(logged, model, vocabulary):
    for sample in logged.py_complete:
        ((context, _),) = arguments_of(sample)
        ids = vocabulary.encode(context)
        said = []
        while len(said) < 24 and 0 not in said:
            said.append(model(torch.tensor([ids + said]))[0, -1].argmax().item())
        text = vocabulary.tokenizer.decode([token for token in said if token])
        for stop in ("\n", ")"):
            text = text.split(stop)[0]
        assert sample["resps"][0][0] == text
    assert len({sample["resps"][0][0] for sample in logged.py_complete}) > 1


def test_what_the_results_say_of_the_model(logged, toy_run):
    said = logged.results["config"]
    assert (said["model"], said["model_num_parameters"], said["model_step"]) == ("deltaproduct", 36544, 8)
    assert (said["model_dtype"], said["train_length"], said["batch_size"]) == ("torch.float32", 64, "auto")
    assert said["model_args"] == {"pretrained": str(toy_run)} and said["device"] == "cpu"


def responses(samples):
    """The log-probabilities of all requests: [[value, greedy]] each, rolling ones [value]."""
    values = [resp[0] for sample in samples for resp in sample["resps"]]
    return [float(value[0] if isinstance(value, list | tuple) else value) for value in values]


def test_batches_and_segments_change_nothing(here, logged, toy_run):
    """Rows of 3 in segments of 5 tokens, by lm-eval's Python interface."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    lm = harness(toy_run, segment=5, dtype="float64", batch_size="3")
    manager = TaskManager(include_path="tests/lm_tasks", include_defaults=False)
    names = ["py_choice", "py_perplexity", "py_last"]
    samples = simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, limit=6)["samples"]
    for name in names:
        theirs = getattr(logged, name)[:6]
        assert responses(samples[name]) == pytest.approx(responses(theirs), rel=1e-5, abs=1e-3)
        assert len(samples[name]) == len(theirs) > 4


class Captured(Exception):
    pass


def namespace_of(words, monkeypatch):
    """What lm-eval is handed."""
    from lm_eval._cli import HarnessCLI

    def execute(self, namespace):
        raise Captured(namespace)

    monkeypatch.setattr(HarnessCLI, "execute", execute)
    before = list(sys.argv)
    with pytest.raises(Captured) as caught:
        lm_harness.main(list(map(str, words)))
    assert sys.argv == before
    return caught.value.args[0]


def test_what_lm_eval_is_told(here, toy_run, tmp_path, monkeypatch):
    step = toy_run / "checkpoint/step-4"
    found = namespace_of([step, "--tasks", "a,b", "c", "--limit", "3"], monkeypatch)
    assert (found.command, found.model, found.model_args) == ("run", "deltaproduct", {"pretrained": str(step)})
    assert (found.tasks, found.limit, found.batch_size) == (["a", "b", "c"], 3, "auto")
    assert (found.device, found.output_path) == ("cuda" if torch.cuda.is_available() else "cpu",
                                                 str(toy_run / "eval/lm_harness"))  # fmt: skip
    model = f"pretrained={toy_run},step=4,add_bos_token=True"
    found = namespace_of(["run", "-a", model, "-t", "a", "-b", "8", "-o", "here", "--device", "cpu"], monkeypatch)
    assert found.model_args == {"pretrained": str(toy_run), "step": 4, "add_bos_token": True}
    assert (found.batch_size, found.output_path, found.device) == ("8", "here", "cpu")
    # lm-eval's own file of settings, and another model of its own.
    (tmp_path / "own.yaml").write_text("model_args: {dtype: float64, step: 4}\nbatch_size: 5\ntasks: [a]\n")
    found = namespace_of([toy_run, "--config", tmp_path / "own.yaml", "--num_fewshot", "2"], monkeypatch)
    assert found.model_args == {"dtype": "float64", "step": 4, "pretrained": str(toy_run)} and found.batch_size == 5
    found = namespace_of(["--model", "hf", "--model_args", "pretrained=gpt2", "--tasks", "a"], monkeypatch)
    assert (found.model, found.model_args, found.device) == ("hf", {"pretrained": "gpt2"}, None)
    assert namespace_of(["ls", "tasks"], monkeypatch).command == "ls"


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, place, ("task", place, 1)) for place, args in enumerate(arguments)]


def harness(toy_run, **arguments):
    from torchtitan_deltaproduct.evaluation.lm_harness.model import DeltaProductHarness

    return DeltaProductHarness(str(toy_run), **arguments)


def test_generation_arguments(here, toy_run, caplog):
    lm = harness(toy_run, batch_size=2)
    prompts = ["import ", "def f", "class A:", "", "x = "]

    def say(**gen):
        return lm.generate_until(instances("generate_until", *((text, {"max_gen_toks": 12} | gen) for text in prompts)))

    greedy = say()
    assert greedy == say(do_sample=False, temperature=0.7) == say(temperature=0.0, until=[])
    # Some request with other arguments among them; each gets its own.
    most = zip(prompts, (12, 1, 12, 2, 12), strict=True)
    short = lm.generate_until(instances("generate_until", *((text, {"max_gen_toks": count}) for text, count in most)))
    assert short[0::2] == greedy[0::2]
    assert all(a.startswith(b) and a != b for a, b in zip(greedy[1::2], short[1::2], strict=True))
    torch.manual_seed(1234)
    sampled = say(do_sample=True)
    assert sampled == say(temperature=1.0) != greedy
    torch.manual_seed(5)
    assert say(do_sample=True) != sampled
    assert say(do_sample=True, top_k=1) == greedy == say(do_sample=True, top_p=1e-9)
    with caplog.at_level("WARNING", logger="lm_eval"):
        lm_harness.logging.getLogger("lm_eval").propagate = True
        assert say(num_beams=4) == greedy
    assert "not supported are left out: {'num_beams': 4" in caplog.text
    assert say(temperature=None, top_p=None, do_sample=None) == greedy
    cut = greedy[0][3:5]
    assert say(until=[cut, "never said"])[0] == greedy[0].split(cut)[0]


def test_separator_before_contexts(here, toy_run, model, vocabulary):
    pairs = instances("loglikelihood", ("def f", "(x)"), ("", "(x)"), (" ", "x"), ("x", ""))
    plain, marked = (harness(toy_run, add_bos_token=flag).loglikelihood(pairs) for flag in (False, True))
    ids = [0, *vocabulary.encode("def f(x)")]
    p = model(torch.tensor([ids]))[0].log_softmax(1)
    start = len(vocabulary.encode("def f")) + 1
    expected = sum(p[i - 1, ids[i]].item() for i in range(start, len(ids)))
    assert marked[0][0] == pytest.approx(expected, abs=1e-4) != plain[0][0]
    # Neighbours of other lengths in a batch change the last bits.
    for (a, greedy), (b, as_greedy) in zip(marked[1:2] + marked[3:], plain[1:2] + plain[3:], strict=True):
        assert a == pytest.approx(b, abs=1e-5) and greedy == as_greedy
    assert plain[3] == (0.0, True)
    assert plain[2][0] == pytest.approx(log_probability(model, vocabulary, " ", "x")[0], abs=1e-4)


def test_a_continuation_that_merges_into_the_context_has_a_probability(here, toy_run, model, vocabulary):
    """Tokenised together the two are one token, and nothing would be left to score."""
    before, after = next(
        (text[:-1], text[-1]) for text in ("def", "return", "self", "import", "class")
        if len(vocabulary.encode(text)) == len(vocabulary.encode(text[:-1]))
    )  # fmt: skip
    pairs = instances("loglikelihood", (before, after), (before, ""), (before, " nothing like it"))
    ((logprob, greedy), empty, _) = harness(toy_run).loglikelihood(pairs)
    ids = [*vocabulary.encode(before), *vocabulary.encode(after)]
    p = model(torch.tensor([ids]))[0].log_softmax(1)
    assert logprob == pytest.approx(p[-2, ids[-1]].item(), abs=1e-4) and logprob < -0.1
    assert greedy is (p[-2].argmax().item() == ids[-1]) and empty == (0.0, True)


def test_a_continuation_that_merges_in_part_is_scored_whole(here, toy_run, vocabulary):
    """A cut behind the context's tokens would leave out what the first token of the two together took."""
    words = ("def", "return", "self", "import", "class", "for", "None", "await", "async", "raise")
    texts = [(word[:cut], word[cut:] + " x") for word in words for cut in range(1, len(word))]
    encode, pair = vocabulary.encode, harness(toy_run)._pair
    merged = [both for both in texts if encode("".join(both))[: len(encode(both[0]))] != encode(both[0])]
    assert len(merged) > 5
    for before, after in texts:
        context, scored = pair(before, after)
        assert context == encode(before) and vocabulary.tokenizer.decode(scored) == after
        assert ((before, after) in merged) or context + scored == encode(before + after)
    # Blanks at the end of a context belong to what follows, as in lm-eval.
    assert pair("x = ", "self") == (encode("x ="), encode(" self"))


def test_text_without_tokens_is_refused(here, toy_run, monkeypatch):
    lm = harness(toy_run)
    monkeypatch.setattr(type(lm.vocabulary), "encode", lambda self, text: [] if text.isspace() or not text else [5])
    both = lm.loglikelihood, lm.loglikelihood_rolling
    for ask, request in ((both[0], ("", " ")), (both[0], ("x", "\n")), (both[1], (" ",))):
        with pytest.raises(DataError, match="has no tokens in .*, so it has no probability"):
            ask(instances(ask.__name__, request))
    assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("",))) == [0.0]


def test_the_cache_belongs_to_weights_and_settings(here, toy_run, tmp_path):
    """Two models, then another step, then another setting, with one --use_cache: each has its own answers."""
    options = ["--tasks", "py_choice", *LOCAL, "--limit", "3", "--use_cache", str(tmp_path / "cache")]

    def scores(name, *words):
        lm_harness.main([*words, *options, "--log_samples", "--output_path", str(tmp_path / name)])
        return [sample["resps"] for sample in read(tmp_path / name).py_choice]

    newest, copy = str(toy_run), shutil.copytree(toy_run, tmp_path / "copy")
    first = scores("first", newest)
    assert len(list(tmp_path.glob("cache*.db"))) == 1
    step4 = scores("step4", newest, "--model_args", "step=4")
    marked = scores("marked", newest, "--model_args", "add_bos_token=True")
    assert len({json.dumps(found) for found in (first, step4, marked)}) == 3
    assert len(list(tmp_path.glob("cache*.db"))) == 3
    # The same weights elsewhere need not be asked again.
    assert scores("again", str(copy)) == first and len(list(tmp_path.glob("cache*.db"))) == 3


def test_the_cache_knows_the_separator(tmp_path):
    """It is in the tokenizer's settings: the same weights and words with another are another model."""
    for name, content in (("config.json", "{}"), ("model.safetensors", "w"), ("tokenizer.json", "t")):
        (tmp_path / name).write_text(content)
    keys = set()
    for eos in ("<a>", "<b>"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        for more in ({}, {"tokenizer": tmp_path}):
            keys.add(lm_harness.cache_key({"pretrained": tmp_path, **more}, "cpu"))
    assert len(keys) == 2
    (tmp_path / "model.safetensors").write_text("other weights")
    assert lm_harness.cache_key({"pretrained": tmp_path}, "cpu") not in keys


def test_partial_results_are_kept(here, toy_run, tmp_path):
    """`--use_cache`: an interrupted evaluation goes on where it was."""
    from lm_eval.api.model import CachingLM

    pairs = instances("loglikelihood", ("def f", "(x)"), ("", "import"))
    rolling = instances("loglikelihood_rolling", ("x = 1",))
    generated = instances("generate_until", ("import", {"max_gen_toks": 4}))
    lm = harness(toy_run)
    CachingLM(lm, str(tmp_path / "cache.db"))
    found = lm.loglikelihood(pairs), lm.loglikelihood_rolling(rolling), lm.generate_until(generated)
    broken = SimpleNamespace(set_cache_hook=lambda hook: None)
    kept = CachingLM(broken, str(tmp_path / "cache.db"))
    broken.loglikelihood = broken.loglikelihood_rolling = broken.generate_until = None
    again = kept.loglikelihood(pairs), kept.loglikelihood_rolling(rolling), kept.generate_until(generated)
    assert again == found


@pytest.mark.parametrize(("wrong", "said"), [
    ({"steps": 4}, "steps: no such argument; there are pretrained, step"), ({"dtype": "half"}, "dtype=half"),
    ({"batch_size": 0}, "batch_size=0"), ({"batch_size": "many"}, "batch_size=many"), ({"step": 2.5}, "step=2.5"),
    ({"segment": -1}, "segment=-1"), ({"device": "tpu"}, "--device tpu"), ({"device": "cuda:0"}, "no CUDA device"),
])  # fmt: skip
def test_wrong_model_arguments(here, toy_run, wrong, said):
    if wrong.get("device", "").startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match=said):
        harness(toy_run, **wrong)


def test_the_newest_results_count_whatever_their_folder(tmp_path):
    """lm-eval makes a folder for each model: one that moved has another."""
    for folder, date, loss in (("z__run", "2026-01-01T00-00-00.1", 1.0), ("a__run", "2026-02-01T00-00-00.1", 2.0)):
        (tmp_path / folder).mkdir()
        content = {"results": {"task": {"loss,none": loss}}}
        (tmp_path / folder / f"results_{date}.json").write_text(json.dumps(content))
    assert lm_harness.metrics(tmp_path) == {"task loss": 2.0}


def test_both_conventions(here, toy_run, tmp_path, capsys, monkeypatch):
    """One table of both; each is what `--bos no` and `--bos yes` alone come to; a half-done command is not done."""
    words = [str(toy_run), "--tasks", "py_choice", *LOCAL, "--limit", "8", "--output_path"]
    found = {}
    for bos in ("both", "no", "yes"):
        folder = tmp_path / bos
        monkeypatch.setattr(sys, "argv", ["eval", *words, str(folder), "--bos", bos])
        lm_harness.main()
        found[bos] = lm_harness.metrics(folder)
        assert lm_harness.SWEPT.made_by(folder)["arguments"] == sys.argv[1:]
        if bos == "both":
            printed = capsys.readouterr().out
    assert found["both"] == found["no"] | found["yes"] and set(found["no"]).isdisjoint(found["yes"])
    assert {"py_choice acc", "py_choice acc_norm"} <= set(found["no"]) and "py_choice acc, BOS" in found["yes"]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│ py_choice" in line]
    plain, marked = found["no"]["py_choice acc"], found["yes"]["py_choice acc, BOS"]
    assert ["py_choice acc", f"{plain:.4f}", f"{marked:.4f}"] in rows
    max((tmp_path / "both").rglob("results_*.json"), key=lambda file: file.name).unlink()
    assert lm_harness.SWEPT.made_by(tmp_path / "both") == {} and lm_harness.metrics(tmp_path / "both") == found["no"]


@pytest.mark.parametrize(("words", "said"), [
    (["RUN", "--bos", "maybe"], "^--bos maybe: expected no, yes, both$"),
    (["RUN", "--bos"], "^--bos : expected"),
    (["ls", "tasks", "--bos=yes"], "--bos: not read by ls"),
    (["--model", "hf", "--bos", "yes", "--model_args", "pretrained=x", "--tasks", "a"], "not read with --model hf"),
    (["RUN", "--bos", "no", "--model_args", "add_bos_token=True", "--tasks", "a"], "add_bos_token say the same"),
])  # fmt: skip
def test_wrong_conventions(here, toy_run, words, said):
    with pytest.raises(ConfigError, match=said):
        lm_harness.main([str(toy_run) if word == "RUN" else word for word in words])


def test_wrong_commands(here, toy_run, tmp_path):
    with pytest.raises(CheckpointError, match="complete steps there: 4, 6, 8"):
        lm_harness.main([str(toy_run), "--model_args", "step=5", "--tasks", "py_choice", *LOCAL])
    with pytest.raises(CheckpointError, match="does not exist(.|\n)*models come first"):
        lm_harness.main([str(tmp_path / "none"), "--tasks", "py_choice", *LOCAL])
    with pytest.raises(ConfigError, match="Tasks not found: py_choise(.|\n)*ls tasks"):
        lm_harness.main([str(toy_run), "--tasks", "py_choise", *LOCAL])
    with pytest.raises(ConfigError, match="no task is named: give --tasks(.|\n)*ls tasks"):
        lm_harness.main([str(toy_run)])
    with pytest.raises(ConfigError, match="no model is named"):
        lm_harness.main(["--tasks", "py_choice", *LOCAL])
    with pytest.raises(ConfigError, match="two models are named"):
        lm_harness.main([str(toy_run), "--model_args", "pretrained=x", "--tasks", "py_choice", *LOCAL])
    with pytest.raises(ConfigError, match="--model hf too"):
        lm_harness.main([str(toy_run), "--model", "hf", "--tasks", "py_choice", *LOCAL])
    with pytest.raises(ConfigError, match="no chat template"):
        lm_harness.main([str(toy_run), "--tasks", "py_complete", *LOCAL, "--apply_chat_template"])


def test_help_is_ours_and_theirs_is_one_word_away(here, capsys):
    lm_harness.main(["--help"])
    ours = capsys.readouterr().out
    assert "go to RUN/eval/lm_harness" in ours and ours.endswith("options: python -m eval.lm_harness run --help\n")
    with pytest.raises(SystemExit) as ended:
        lm_harness.main(["run", "--help"])
    assert ended.value.code == 0 and "--num_fewshot" in capsys.readouterr().out


def test_without_lm_eval(monkeypatch):
    """The reason and the cure; that it is not imported before, test_house tells."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError) as refused:
        lm_harness.main(["RUN"])
    first, cure = str(refused.value).splitlines()
    assert first.startswith("the package lm-eval is not installed") and cure == lm_harness.INSTALL


@pytest.mark.slow
def test_two_ranks_share_the_documents(here, logged, toy_run, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
               "eval.lm_harness", str(toy_run), "--tasks", TASKS, *LOCAL, "--log_samples", "--output_path",
               str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    both = read(tmp_path)
    for task in TASKS.split(","):
        ours, theirs = both.results["results"][task], logged.results["results"][task]
        numbers = [key for key in theirs if key.endswith(",none") and "stderr" not in key]
        assert numbers and [ours[key] for key in numbers] == pytest.approx([theirs[key] for key in numbers], rel=1e-5)
        assert len(getattr(both, task)) == len(getattr(logged, task))
