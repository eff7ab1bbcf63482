"""The command: what it prints, from which prompts, while it comes; and what is said when it cannot."""

import io
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.toy import REPO
from tests.unit.models.conftest import small_model
from torchtitan_deltaproduct.checkpoint.hf import write_hf
from torchtitan_deltaproduct.checkpoint.load import load_model
from torchtitan_deltaproduct.errors import CheckpointError, ConfigError, DataError
from torchtitan_deltaproduct.evaluation import generate
from torchtitan_deltaproduct.evaluation.generate.decoding import Settings, continue_prompts
from torchtitan_deltaproduct.evaluation.generate.sampling import Sampling


@pytest.fixture(scope="module")
def speak(toy_run, vocabulary):
    """What the toy says after a text, by the library."""
    model = load_model(toy_run).model

    def continued(text, tokens=20, seed=0, stops=(), sampling=None, **settings):
        prompt = vocabulary.encode(text) if isinstance(text, str) else text
        settings = Settings(tokens, stops, sampling or Sampling(), **settings)
        return continue_prompts(model, vocabulary, [prompt], settings, [seed])[0]

    return continued


@pytest.fixture
def command(toy_run, capsys):
    def run(*arguments, models=(toy_run,)):
        assert generate.main([*map(str, models), "--tokens", "20", *arguments]) == 0
        return capsys.readouterr()

    return run


def test_one_prompt(command, speak, vocabulary, tmp_path, monkeypatch):
    shown = command("--prompt", "import ")
    assert shown.out == speak("import ").text + "\n"
    assert "step 8, tokenizer" in shown.err and "20 added in" in shown.err and "ended by --tokens" in shown.err
    assert command("--prompt", "import ", "--echo").out == "import " + speak("import ").text + "\n"
    assert command("--prompt", "import ", "--segment", "1").out == shown.out
    # Without a prompt, a new document.
    assert command().out == speak([vocabulary.separator]).text + "\n"
    new = [vocabulary.separator, *vocabulary.encode("import ")]
    assert command("--prompt", "import ", "--new-document").out == speak(new).text + "\n"
    (tmp_path / "prompt.txt").write_text("naïve 日本\n")
    assert command("--file", str(tmp_path / "prompt.txt")).out == speak("naïve 日本\n").text + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("x = 語".encode())))
    assert command("--file", "-").out == speak("x = 語").text + "\n"


def test_a_mark_before_a_prompt_is_no_text(command, speak, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes("\ufeffdef f".encode())
    assert command("--file", str(tmp_path / "prompt.txt"), "--echo").out == "def f" + speak("def f").text + "\n"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command("--file", "~/prompt.txt").out == speak("def f").text + "\n"


def test_prompts_that_are_not_utf8(command):
    with pytest.raises(ConfigError, match="caf.* is not UTF-8 text"):
        command("--prompt", os.fsdecode(b"caf\xe9"))


def test_sampling_options(command, speak):
    options = ["--prompt", "def", "--temperature", "0.9", "--top-k", "50", "--top-p", "0.95", "--seed", "3"]
    expected = speak("def", seed=3, sampling=Sampling(0.9, 50, 0.95))
    assert command(*options).out == command(*options).out == expected.text + "\n"
    stop = expected.text[5:7]
    assert stop.strip() and command(*options, "--stop", stop).out == expected.text.split(stop)[0] + "\n"
    samples = command(*options, "--samples", "2", "--batch", "1").out
    fourth = speak("def", seed=4, sampling=Sampling(0.9, 50, 0.95))
    assert samples == f"--- 1 of 2: 'def', seed 3\n{expected.text}\n--- 2 of 2: 'def', seed 4\n{fourth.text}\n"


def test_ends_of_documents(command, speak, toy_run, vocabulary):
    """At temperature 30 the 320 tokens are nearly equally probable: the separator comes among the first 200."""
    options = ["--prompt", "def", "--tokens", "200", "--temperature", "30", "--seed", "6"]
    ended, gone_on = command(*options), command(*options, "--ignore-eos")
    assert "the end of the document" in ended.err and "200 added" in gone_on.err
    separator = vocabulary.tokenizer.inner.id_to_token(vocabulary.separator)
    assert gone_on.out.startswith(ended.out[:-1] + separator) and separator not in ended.out


def test_several_prompts_and_models(command, speak, toy_run, capsys):
    step = toy_run / "checkpoint/step-4"
    shown = command("--prompt", "import ", "class A" + " " * 80, "--batch", "1", models=[step, toy_run])
    first, second = (f"=== {toy_run} step {n}\n" for n in (4, 8))
    assert shown.out.startswith(first) and second in shown.out
    assert shown.out.endswith(
        f"--- 1 of 2: 'import '\n{speak('import ').text}\n"
        f"--- 2 of 2: {repr('class A' + ' ' * 80)[:57]}...\n{speak('class A' + ' ' * 80).text}\n"
    )
    assert shown.err.count("tokens read") == 4


def test_the_text_comes_while_it_is_made(toy_run):
    """The first characters are there long before 100,000 tokens could be; then the reader has had enough."""
    command = [sys.executable, "-m", "eval.generate", str(toy_run), "--file", "-", "--tokens", "100000", "--ignore-eos"]
    process = subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(b"import ")
    process.stdin.close()
    assert len(process.stdout.read(20)) == 20 and process.poll() is None
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert b"Traceback" not in process.stderr.read()


def test_interrupted(toy_run, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "continue_prompts", interrupt)
    assert generate.main([str(toy_run)]) == 130 and "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(("wrong", "said"), [
    (["--tokens", "0"], "--tokens 0"),
    (["--temperature", "-1"], "temperature -1"),
    (["--top-p", "0", "--temperature", "1"], "top-p 0"),
    (["--top-k", "-2", "--temperature", "1"], "top-k -2"),
    (["--top-k", "5"], "no effect at temperature 0"),
    (["--top-p", "0.5"], "no effect at temperature 0"),
    (["--samples", "3"], "no effect at temperature 0"),
    (["--stop", ""], "not empty"),
    (["--seed", "-1"], "--seed -1"),
    (["--seed", str(2**63)], r"--seed 9223372036854775808: must be below 2\^63"),
    (["--seed", str(2**63 - 2), "--samples", "3", "--temperature", "1"], "and the seeds of --samples too"),
])  # fmt: skip
def test_wrong_options(wrong, said):
    with pytest.raises(ConfigError, match=said):
        generate.main(["nowhere", *wrong])


def test_what_is_not_there(toy_run, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        generate.main([str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="'def f' is no model(.|\n)*--prompt"):
        generate.main([str(toy_run), "def f"])
    with pytest.raises(DataError, match="cannot be read: No such file"):
        generate.main([str(toy_run), "--file", str(tmp_path / "none")])
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="latin is not UTF-8 text: .* at byte 3"):
        generate.main([str(toy_run), "--file", str(tmp_path / "latin")])


def test_tokenizers(toy_run, tmp_path, command, speak):
    model = small_model(torch.float32)
    (tmp_path / "hf").mkdir()
    write_hf(tmp_path / "hf", model.state_dict(), model.args, training={})
    with pytest.raises(ConfigError, match="has no tokenizer(.|\n)*--tokenizer FOLDER"):
        generate.main([str(tmp_path / "hf")])
    with pytest.raises(ConfigError, match="is not the model's: it has 320 tokens, .* has 50"):
        generate.main([str(tmp_path / "hf"), "--tokenizer", str(toy_run / "tokenizer")])
    with pytest.raises(DataError, match="no tokenizer.json"):
        generate.main([str(toy_run), "--tokenizer", str(tmp_path)])
    shutil.copytree(toy_run / "tokenizer", tmp_path / "elsewhere")
    assert command("--prompt", "x", "--tokenizer", str(tmp_path / "elsewhere")).out == speak("x").text + "\n"
