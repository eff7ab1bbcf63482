"""From a TOML and a command line to a config, and the exact words of what is wrong with them."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan_deltaproduct.config import Environment, load_config
from torchtitan_deltaproduct.config.schema import schema, supported_keys
from torchtitan_deltaproduct.errors import ConfigError

GOOD = """\
[job]
dump_folder = "out"  # here
[data]
paths = ["data/a"]
[training]
steps = 1_000
max_norm = 1
[training.dataloader]
[optimizer]
lr = 1
"""


def test_values_and_where_they_come_from(load):
    config = load(GOOD, "--training.steps", "2000", "--metrics.log-freq=5")
    assert (config.job.dump_folder, config.training.steps, config.metrics.log_freq) == ("out", 2000, 5)
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)
    wanted = {
        "job.dump_folder": "x.toml:2",
        "data.paths": "x.toml:4",
        "training.steps": "command line",
        "metrics.log_freq": "command line",
        "optimizer.lr": "x.toml:10",
        "optimizer.weight_decay": "default (ours)",
        "optimizer.eps": "default (torchtitan)",
    }
    assert {key: config.provenance[key] for key in wanted} == wanted
    assert "provenance" not in config.to_dict()


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (["--compile.enable"], "compile.enable", True),
        (["--compile.enable", "--training.steps", "300"], "compile.enable", True),
        (["--checkpoint.no-enable"], "checkpoint.enable", False),
        (["--checkpoint.no_enable"], "checkpoint.enable", False),
        (["--checkpoint.enable", "false"], "checkpoint.enable", False),
        (["--checkpoint.enable=False"], "checkpoint.enable", False),
        (["--checkpoint.load-step", "-1"], "checkpoint.load_step", -1),
        (["--compile.components", "model"], "compile.components", ["model"]),
        (["--compile.components=model, loss"], "compile.components", ["model", "loss"]),
        (["--compile.components", '["loss"]'], "compile.components", ["loss"]),
        (["--data.paths", "a,b", "--data.weights", "1,2.5"], "data.weights", [1.0, 2.5]),
        (["--validation.paths", ""], "validation.paths", []),
        (["--lr_scheduler.decay_ratio", "0.5"], "lr_scheduler.decay_ratio", 0.5),
        (["--lr_scheduler.total_steps", "none"], "lr_scheduler.total_steps", None),
        (["--optimizer.lr", "1e-3"], "optimizer.lr", 1e-3),
        (["--job.description", "a = b --c"], "job.description", "a = b --c"),
        (["--job.description=--x"], "job.description", "--x"),
        (["--training.steps", "300", "--training.steps", "400"], "training.steps", 400),
    ],
)
def test_command_line_forms(load, options, key, value):
    table, name = key.split(".")
    assert getattr(getattr(load(GOOD, *options), table), name) == value


WRONG = """\
seq_len = 3
[training]
step = 10
batch_size = 3
seq_len = 1e3
steps = 10.5
lr = 3
gc_debug = "yes"
max_norm = nan
[trainning]
steps = 10
[data]
paths = [
  "a",
  3,
]
[parallelism]
fsdp_reshard_after_forward = "alway"
tensor_parallel_degree = 2
[model]
use_gate = true
num_heads = 0
vocab_size = "32_000"
intermediate_size = "None"
[model.attention]
x = 1
[optimizer.lr]
value = 1
"""

WANTED = """18 problems in the configuration:
  x.toml:1: seq_len = 3: stands in no table; nearest: 'seq_len' in [training] or 'seq_len' in \
[validation] (Sequence length)
  x.toml:3: [training] step = 10: no such key; nearest: 'steps' (How many train steps to run)
  x.toml:4: [training] batch_size = 3: no such key; nearest: 'local_batch_size' (Local batch size (i.e., \
per-device batch size))
  x.toml:5: [training] seq_len = 1000.0: expected a whole number; write 1000 (Sequence length)
  x.toml:6: [training] steps = 10.5: expected a whole number (How many train steps to run)
  x.toml:7: [training] lr = 3: no such key; nearest: 'lr' in [optimizer] (Peak learning rate; \
`[lr_scheduler]` multiplies it by a factor in [0, 1])
  x.toml:8: [training] gc_debug = "yes": expected true or false; write true (Collect garbage at \
every step, to find cycles that hold CUDA tensors)
  x.toml:9: [training] max_norm = nan: expected a finite number (Max norm for gradient clipping)
  x.toml:10: [trainning]: no such table; nearest: [training]
  x.toml:15: [data] paths = ["a", 3]: element 2, 3: expected a string; write "3" (Prepared folders to \
train on; several make a mixture)
  x.toml:18: [parallelism] fsdp_reshard_after_forward = "alway": expected one of "default", "always", \
"never"; nearest: "always" (Whether a block's weights are gathered again for its backward pass)
  x.toml:19: [parallelism] tensor_parallel_degree = 2: tensor parallelism is not supported yet; use \
parallelism.data_parallel_shard_degree (FSDP2)
  x.toml:21: [model] use_gate = true: no such key; nearest: 'use_output_gate' (Gate the normalised \
output by silu(g_proj x))
  x.toml:22: [model] num_heads = 0: must be at least 1 (Heads of the mixer; `num_heads * head_dim` need \
not equal `hidden_size`)
  x.toml:23: [model] vocab_size = "32_000": expected a whole number; write 32000 without quotes (Rows of \
the embedding and of the output head; at least the tokenizer's vocabulary)
  x.toml:24: [model] intermediate_size = "None": TOML has no None; to leave it unset, delete the line \
(MLP width, given outright; overrides `hidden_ratio`)
  x.toml:25: [model.attention]: no such table; [model] holds no tables
  x.toml:27: [optimizer.lr]: an option, not a table (Peak learning rate; `[lr_scheduler]` multiplies it \
by a factor in [0, 1])"""


def test_all_problems_at_once(problems):
    assert problems(WRONG).splitlines() == WANTED.splitlines()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--training.step", "10"],
            "command line: --training.step 10: no such option; nearest: --training.steps (How many train steps to run)",
        ),
        (
            ["--optimizer.learning-rate=1e-3"],
            "command line: --optimizer.learning-rate 1e-3: no such option; nearest: --optimizer.lr "
            "(Peak learning rate; `[lr_scheduler]` multiplies it by a factor in [0, 1])",
        ),
        (
            ["--training.steps", "1e3"],
            "command line: --training.steps 1e3: expected a whole number; write 1000 (How many train steps to run)",
        ),
        (
            ["--training.bananas", "10"],
            "command line: --training.bananas 10: no such option; --help training lists those of [training]",
        ),
        (["--training.steps"], "command line: --training.steps: needs a value (How many train steps to run)"),
        (["steps"], "command line: steps: not an option; overrides are --section.key value"),
        (
            ["--compile.enable", "yes"],
            "command line: --compile.enable yes: expected true or false; write true (Whether to apply torch.compile)",
        ),
        (
            ["--training", "10"],
            "command line: --training 10: a table; set one of its options, --training.dataset ...",
        ),
        (
            ["--lr_scheduler.total_steps", "50"],
            "command line: --lr_scheduler.total_steps 50: the learning rate would leave its schedule after "
            "step 50; must cover the run (with [training] steps = 10000, default)",
        ),
    ],
)
def test_command_line_problems(problems, options, message):
    text = '[data]\npaths = ["a"]\n[lr_scheduler]\nwarmup_steps = 10\n'
    assert problems(text, *options) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[training]\nsteps = True\n",
            "x.toml:2: not valid TOML: invalid value in `steps = True`; write true",
        ),
        (
            "[job]\n\ndump_folder = ./out # x\n",
            'x.toml:3: not valid TOML: invalid value in `dump_folder = ./out # x`; a string needs quotes: "./out"',
        ),
        (
            "[job]\ndescription = None",
            "x.toml:2: not valid TOML: invalid value in `description = None`; TOML has no None: "
            "to leave an option unset, delete the line",
        ),
        (
            "[job]\n[data]\n[job]\n",
            "x.toml:3: not valid TOML: cannot declare ('job',) twice in `[job]`",
        ),
    ],
)
def test_syntax_errors_name_the_line(problems, text, message):
    assert problems(text) == message


def test_syntax_error_and_bad_option_come_together(problems):
    assert problems("a b", "--nonsense").splitlines()[0] == "2 problems in the configuration:"


def test_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_configs" / "deep").mkdir(parents=True)
    (tmp_path / "train_configs" / "deep" / "quickstart.toml").touch()
    with pytest.raises(ConfigError) as error:
        load_config(["--job.config_file", "quick_start.toml"])
    assert str(error.value) == (
        "command line: --job.config_file quick_start.toml: no such file; nearest: train_configs/deep/quickstart.toml"
    )
    with pytest.raises(ConfigError, match="FILE is missing; there are: train_configs/deep/quickstart.toml"):
        load_config([])
    with pytest.raises(ConfigError, match="a folder, not a TOML file"):
        load_config(["--job.config_file", "train_configs"])
    # Of many, a few are named.
    for n in range(30):
        (tmp_path / f"train_configs/{n:02d}.toml").touch()
    with pytest.raises(ConfigError, match="there are: train_configs/00.toml, .*03.toml, and 27 more"):
        load_config(["--job.config_file", "/elsewhere/of_mine.toml"])


def test_not_utf8_and_byte_order_mark(tmp_path, load):
    assert load("\ufeff[data]\npaths = ['a']\n").data.paths == ["a"]
    (tmp_path / "y.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(["--job.config_file", "y.toml"])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_text_gets_past_with_another_error(tmp_path_factory, data):
    """Damaged files end in a ConfigError or load: nothing else escapes."""
    text = data.draw(st.sampled_from([GOOD, WRONG]))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 9)))
        junk = data.draw(st.text(st.sampled_from("[]{}=.,#'\"\n\\ a1_-é"), max_size=4))
        text = text[:start] + junk + text[stop:]
    file = tmp_path_factory.getbasetemp() / "fuzz.toml"
    file.write_text(text, encoding="utf-8")
    try:
        load_config(["--job.config_file", str(file)], Environment())
    except ConfigError as error:
        assert "fuzz.toml" in str(error)


def test_exit_code_two_without_traceback_from_one_rank(tmp_path):
    (tmp_path / "x.toml").write_text("[training]\nstep = 1\n[data]\npaths = ['a']\n")
    program = (
        "import sys\n"
        "from torchtitan_deltaproduct.config import load_config\n"
        "from torchtitan_deltaproduct.errors import exit_on_user_error\n"
        "exit_on_user_error(lambda: load_config(sys.argv[1:]) and None)\n"
    )
    command = [sys.executable, "-c", program, "--job.config_file", "x.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: x.toml:2: [training] step = 1: no such key; nearest: 'steps' (How many train steps to run)\n"
    )


MINIMAL = '[data]\npaths = ["a"]\n'
WARMUP = MINIMAL + "[training]\nsteps = 1000\n[lr_scheduler]\nwarmup_steps = 100\n"


def test_a_toml_in_front(load, tmp_path):
    load()
    config = load_config(["x.toml", "--training.steps", "7"], Environment())
    assert config.job.config_file == "x.toml" and config.training.steps == 7
    with pytest.raises(ConfigError, match="nowhere.toml: no such file"):
        load_config(["nowhere.toml"], Environment())


@pytest.mark.parametrize(("options", "warmup"), [
    ([], 100), (["--training.steps=500"], 100), (["--training.steps=100"], 100), (["--training.steps=20"], 2),
    (["--training.steps=1"], 1), (["--training.steps=20", "--lr_scheduler.total_steps=1000"], 100),
    (["--training.steps=20", "--lr_scheduler.warmup_steps=5"], 5),
    (["--training.steps=110", "--lr_scheduler.decay_ratio=0.5"], 11),
])  # fmt: skip
def test_a_try_out_shortens_the_warm_up(load, options, warmup):
    config = load(WARMUP, *options)
    assert config.lr_scheduler.warmup_steps == warmup
    if warmup in (100, 5):
        assert config.warmup_in_file is None
        assert "shortened" not in config.provenance["lr_scheduler.warmup_steps"]
    else:
        note = f"shortened from 100 to {warmup}, as training.steps from 1000 to {config.training.steps}"
        assert config.provenance["lr_scheduler.warmup_steps"] == note and config.warmup_in_file == 100


def test_a_file_that_contradicts_itself_is_still_refused(problems):
    assert "the warm-up does not fit" in problems(WARMUP.replace("1000", "20"))
    assert "the warm-up does not fit" in problems(WARMUP, "--training.steps=20", "--lr_scheduler.warmup_steps=30")


def test_home_is_expanded_in_every_path(load, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "old").mkdir()
    text = """
[job]
dump_folder = "~/run"
[model]
hf_assets_path = "~/tokenizer"
[data]
paths = ["~/a", "b~"]
[validation]
enable = true
paths = ["~/v"]
[checkpoint]
initial_load_path = "~/old"
"""
    load(text)
    config = load_config(["--job.config_file=~/x.toml"], Environment(files=True))
    assert config.job.dump_folder == f"{tmp_path}/run" and config.model.hf_assets_path == f"{tmp_path}/tokenizer"
    assert config.data.paths == [f"{tmp_path}/a", "b~"] and config.validation.paths == [f"{tmp_path}/v"]
    assert config.checkpoint.initial_load_path == f"{tmp_path}/old"
    stream = '[model]\nhf_assets_path = "t"\n[data]\nkind = "streaming"\ndataset = "~/text"\n'
    assert load(stream).data.dataset == f"{tmp_path}/text"


def test_every_path_of_the_schema_is_known():
    """An option that names a path is expanded, or lies below the run folder."""
    below = {"checkpoint.folder", "profiling.save_traces_folder", "profiling.save_memory_snapshot_folder",
             "comm.save_traces_folder", "metrics.save_tb_folder"}  # fmt: skip
    named = {key for key in supported_keys() if key.rpartition(".")[2].endswith(("path", "paths", "folder"))}
    assert {key for key in named - below if not schema()[key].record.is_path} == set()


def test_what_this_machine_does_not_allow(problems, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    here = Environment(files=True)
    assert f"{tmp_path}/file is no folder" in problems(MINIMAL, "--job.dump_folder=file/run", environment=here)
    assert problems(MINIMAL, "--job.dump_folder=a/b/run", environment=here) == ""
    monkeypatch.setattr("torchtitan_deltaproduct.config.check.find_spec", lambda name: None)
    assert "wandb is not installed: pip install wandb" in problems(MINIMAL, "--metrics.enable_wandb", environment=here)
    assert problems(MINIMAL, "--metrics.enable_wandb") == ""


@pytest.mark.parametrize(("written", "prompts"), [
    ("def ", ["def "]), ("a, b", ["a, b"]), ("", [""]), ('["def ", "x,y"]', ["def ", "x,y"]), ("[]", []),
])  # fmt: skip
def test_prompts_are_taken_as_they_are(load, written, prompts):
    options = ("--validation.enable", "--validation.paths", "held out, too", "--validation.prompts", written)
    table = load('[data]\npaths = ["a"]\n', *options).validation
    assert table.prompts == prompts and table.paths == ["held out", "too"]
