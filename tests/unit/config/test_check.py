"""Ranges and contradictions, each with its message, and what the machine decides."""

import dataclasses

import pytest

from torchtitan_deltaproduct.config import Environment, load_config
from torchtitan_deltaproduct.config.check import RULES
from torchtitan_deltaproduct.config.schema import schema, supported_keys
from torchtitan_deltaproduct.errors import ConfigError

DATA = '[data]\npaths = ["a"]\n'


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        ("training.steps", ["300"], ["0", "-1"]),
        ("training.seq_len", ["1"], ["0"]),
        ("training.max_norm", ["0.1"], ["0", "-1"]),
        ("training.global_batch_size", ["-1", "8"], ["0", "-2"]),
        ("optimizer.lr", ["1e-9"], ["0", "-1e-3"]),
        ("optimizer.beta2", ["0", "0.999"], ["1", "-0.1"]),
        ("lr_scheduler.min_lr_factor", ["0", "1"], ["-0.1", "1.1"]),
        ("model.head_dim", ["1", "256"], ["0", "257"]),
        ("model.num_householder", ["1", "8"], ["0", "9"]),
        ("model.conv_size", ["2"], ["1"]),
        ("checkpoint.keep_latest_k", ["0", "2"], ["1", "-1"]),
        ("checkpoint.exclude_from_loading", [""], ["model"]),
        ("activation_checkpoint.selective_ac_option", ["op", "products", "3"], ["0", "ops", "-2", "²"]),
        ("compile.components", ["model", "loss"], ["optimizer"]),
        ("validation.steps", ["-1", "1"], ["0", "-2"]),
        ("data.weights", ["0.1"], ["0", "-1"]),
        ("debug.seed", ["0"], ["-1"]),
    ],
)
def test_ranges(problems, option, good, bad):
    for value in good:
        assert problems(DATA, f"--{option}={value}") == ""
    for value in bad:
        message = problems(DATA, f"--{option}={value}")
        assert message.startswith(f"command line: --{option} ") and schema()[option].record.allowed.text in message


def test_every_default_is_in_range():
    for key, option in schema().items():
        allowed = option.record.allowed
        assert allowed is None or option.default is None or allowed.allows(option.default), key


def test_every_number_has_a_range():
    """A number for which all values are right is rare: say so here."""
    options = [schema()[key] for key in supported_keys()]
    numbers = {o.key: o for o in options if {o.hint, *getattr(o.hint, "__args__", ())} & {int, float}}
    assert len(numbers) > 50 and [key for key, option in numbers.items() if option.record.allowed is None] == []


def test_rules_name_existing_keys():
    assert {key for keys, _ in RULES for key in keys.split()} <= set(schema())


class Read:
    """A config, or a table of one, that notes which options are read of it."""

    def __init__(self, value, seen, prefix=""):
        self._value, self._seen, self._prefix = value, seen, prefix

    def __getattr__(self, name):
        key, of_class = self._prefix + name, getattr(type(self._value), name, None)
        if key in schema():
            self._seen.add(key)
        elif isinstance(of_class, property):
            return of_class.fget(self)
        elif callable(of_class):
            return of_class.__get__(self)
        value = getattr(self._value, name)
        return value if self._prefix else Read(value, self._seen, f"{name}.")


@pytest.mark.parametrize(
    "file", ["state_tracking/S5_n4", "fineweb/deltaproduct_392M_n3_4k", "state_tracking/parity_n1_01"]
)
def test_rules_name_the_options_with_a_range_that_they_read(file):
    """A rule is not asked where one of its options is out of range; of others it meets any number."""
    harmless = {"lr_scheduler.min_lr_factor", "model.num_householder", "model.conv_size"}
    config = load_config([f"train_configs/{file}.toml"], Environment())
    for keys, judge in RULES:
        seen = set()
        for world_size in (None, 8):
            judge(Read(config, seen), Environment(world_size))
        assert {key for key in seen if schema()[key].record.allowed} <= {*keys.split(), *harmless}


CONTRADICTIONS = [
    ("[model]\nhead_dim = 100\nexpand_v = 1.003\n", "head_dim * expand_v must be a whole number"),
    (
        '[model]\nop_backend = "fla"\n[training]\nmixed_precision_param = "float32"\n',
        "fla computes in bfloat16",
    ),
    ("[lr_scheduler]\nwarmup_steps = 20_000\n", "the warm-up does not fit in the schedule of 10000 steps"),
    ("[lr_scheduler]\nwarmup_steps = 6000\ndecay_ratio = 0.5\n", "a decay of 5000 steps do not fit"),
    ('[lr_scheduler]\nschedule = "wsd"\ndecay_steps = 5\ndecay_ratio = 0.5\n', "two lengths of the decay; give one"),
    ("[checkpoint]\nkeep_best = 1\n", "the best is by validation loss: set validation.enable"),
    (
        '[checkpoint]\nkeep_best = 1\n[validation]\nenable = true\npaths = ["a"]\nfreq = 300\n',
        "few saved steps would be validated: one of interval = 500 and freq = 300 must divide the other",
    ),
    ("[lr_scheduler]\ntotal_steps = 5000\n", "would leave its schedule after step 5000"),
    ("[training]\nglobal_batch_size = 12\n", "must be a multiple of local_batch_size = 8"),
    ('[activation_checkpoint]\nmode = "memory_budget"\n', "needs [compile] enable = true"),
    ("[compile]\nenable = true\ncomponents = []\n", "nothing to compile"),
    (
        '[compile]\ncuda_graph = "always"\n[activation_checkpoint]\nmode = "full"\n',
        'no CUDA graph can be made: activation_checkpoint.mode is "full"; use "auto", which makes one where it can',
    ),
    ('[compile]\nenable = true\nbackend = "inductr"\n', "torch has no such backend; nearest: 'inductor'"),
    ("[model]\nhidden_size = 2_000_000_000\nvocab_size = 2_000_000_000\n", "parameters, of 1e+13 at most"),
    ('[validation]\nenable = true\npaths = ["a", "a"]\n', '"a" is listed twice; its windows would count twice'),
    ("[parallelism]\ncontext_parallel_degree = 0\n[training]\nglobal_batch_size = 8\n", "must be at least 1"),
    ('[job]\ndescription = "a\\u0000b"\n', "must not hold a NUL character"),
    ("[comm]\ntrain_timeout_seconds = 9223372036854775807\n", "must be at most 2,147,483,647"),
    ("[comm]\ntrace_buf_size = 2000000\n", "must be at most 1,000,000"),
    ("[validation]\nenable = true\n", "nothing to validate on"),
    ("[debug]\ndeterministic_warn_only = true\n", "does nothing without deterministic = true"),
    ('[checkpoint]\nexport_dtype = "bfloat16"\n', "does nothing without last_save_model_only = true"),
    ("[checkpoint]\nenable = false\nload_step = 10\n", "does nothing without enable = true"),
    ("[profiling]\nenable_profiling = true\nprofile_freq = 2\n", "shorter than one cycle of 4 steps"),
]


@pytest.mark.parametrize(("text", "reason"), CONTRADICTIONS)
def test_contradictions(problems, text, reason):
    message = problems(DATA + text)
    assert reason in message and "\n" not in message
    assert message.startswith("x.toml:")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "x.toml: [data] paths = []: no data to train on"),
        (
            '[data]\nkind = "streaming"\n',
            'x.toml:2: [data] kind = "streaming": streaming needs [data] dataset',
        ),
        ('[data]\nkind = "streaming"\ndataset = "d"\npaths = ["a"]\n', "which streaming does not read"),
        ('[data]\npaths = ["a"]\ndataset = "d"\n', 'only read with kind = "streaming"'),
        ('[data]\npaths = ["a", "b"]\nweights = [1]\n', "1 weights for 2 paths"),
        ('[data]\npaths = ["a", "a"]\n', '"a" is listed twice'),
    ],
)
def test_data(problems, text, reason):
    assert reason in problems(text)


def test_a_contradiction_tells_where_the_other_value_is(problems):
    text = DATA + "[training]\nsteps = 100\n[lr_scheduler]\nwarmup_steps = 500\n"
    assert problems(text) == (
        "x.toml:6: [lr_scheduler] warmup_steps = 500: the warm-up does not fit in the schedule of 100 steps; "
        "shorten warmup_steps, or set [lr_scheduler] total_steps to follow the curve of a longer run "
        "(with [training] steps = 100, x.toml:4)"
    )


def test_a_wrong_value_causes_no_contradictions(problems):
    assert "\n" not in problems(DATA + "[training]\nsteps = 0\n[lr_scheduler]\nwarmup_steps = 500\n")


CONTEXT = "[parallelism]\ncontext_parallel_degree = {}\n"
ON_A_CPU = Environment(world_size=1, cuda=False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[training]\nenable_cpu_offload = true\n", "offloading to the CPU needs CUDA, and there is none"),
        ("[profiling]\nenable_profiling = true\n", "torchtitan's profiler needs CUDA"),
        ("[profiling]\nenable_memory_snapshot = true\n", "a memory snapshot needs CUDA"),
        ('[checkpoint]\nasync_mode = "async_with_pinned_mem"\n', "pinned memory needs CUDA"),
        (
            '[activation_checkpoint]\nmode = "none"\n[compile]\ncuda_graph = "always"\n',
            "no CUDA graph can be made: there is no CUDA",
        ),
        ('[model]\nop_backend = "fla"\n', "fla runs on CUDA only"),
        ('[model]\nop_backend = "triton"\n', "triton runs on CUDA only"),
    ],
)
def test_what_needs_cuda(problems, text, reason):
    assert reason in problems(DATA + text, environment=ON_A_CPU)
    assert problems(DATA + text, environment=dataclasses.replace(ON_A_CPU, cuda=True)) == ""
    assert problems(DATA + text) == ""


@pytest.mark.parametrize(
    ("text", "ranks", "reason"),
    [
        ("[parallelism]\ndata_parallel_shard_degree = 4\n", 8, "= 4, but the job has 8 ranks"),
        ("[parallelism]\ndata_parallel_replicate_degree = 3\n", 8, "cannot be divided into 3 replicas"),
        ("[training]\nglobal_batch_size = 40\n", 2, "local_batch_size x 2 ranks = 16; nearest: 32 or 48"),
        ("[training]\nglobal_batch_size = 8\n", 2, "nearest: 16"),
        (CONTEXT.format(4), 6, "6 ranks cannot be divided into 1 replicas, each of them 4 ranks to a sequence"),
        (CONTEXT.format(2) + "data_parallel_shard_degree = 2\n", 8, "x context = 4, but the job has 8 ranks"),
        (CONTEXT.format(2) + "[training]\nglobal_batch_size = 8\n", 4, "local_batch_size x 2 ranks = 16; nearest: 16"),
        ("[checkpoint]\ncreate_seed_checkpoint = true\n", 2, "is made by one process, not by 2 ranks"),
    ],
)  # fmt: skip
def test_what_depends_on_the_number_of_ranks(problems, text, ranks, reason):
    assert reason in problems(DATA + text, environment=Environment(world_size=ranks))
    assert problems(DATA + text) == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--training.seq_len=2080", "--model.num_householder=2"], "2,080 tokens cannot be cut for 4 ranks: a multiple "
         "of 4 x 32 tokens (whole chunks) is needed; nearest: 2,048 or 2,176"),
        (["--training.seq_len=64"], "nearest: 128"),
        (["--training.seq_len=160", "--model.num_householder=1"], "a multiple of 4 x 64 tokens"),
        (["--training.seq_len=128", "--model.conv_size=40"], "a multiple of 4 x 64 tokens"),
        (["--validation.seq_len=100"], "100 tokens cannot be cut for 4 ranks"),
        (["--model.op_backend=recurrent"], 'op_backend "recurrent" has no context parallelism'),
        (["--parallelism.context_parallel_load_balancer=headtail2"], "a recurrence cuts sequences in order"),
    ],
)  # fmt: skip
def test_sequences_that_cannot_be_cut(problems, options, reason):
    four = CONTEXT.format(4)
    assert problems(DATA + four) == ""
    assert reason in problems(DATA + four, *options)


def test_parts_are_left_out_of_the_whole_state_of_another_run(problems):
    out, whole = "--checkpoint.exclude_from_loading=optimizer,dataloader", "--checkpoint.initial_load_model_only=false"
    assert "own checkpoints are always loaded whole, so leave it out" in problems(DATA, out)
    assert "nothing but weights is loaded" in problems(DATA, out, "--checkpoint.initial_load_path=old")
    assert "set initial_load_path" in problems(DATA, out, whole)
    assert problems(DATA, out, whole, "--checkpoint.initial_load_path=old") == ""


def test_initial_load_path(problems, tmp_path):
    here = Environment(files=True)
    options = ["--checkpoint.initial_load_path", "old/step-3"]
    assert "no such folder" in problems(DATA, *options, environment=here)
    assert problems(DATA, *options) == ""
    (tmp_path / "old" / "step-3").mkdir(parents=True)
    assert problems(DATA, *options, environment=here) == ""


@pytest.mark.parametrize(("options", "told"), [
    (["--data.shuffle=false", "--data.kind=streaming", "--data.dataset=x"], 'only read with kind = "prepared"'),
    (["--data.shuffle_buffer=9"], 'only read with kind = "streaming"'),
    (["--data.split=validation"], 'only read with kind = "streaming"'),
    (["--data.text_field=body"], 'only read with kind = "streaming"'),
    (["--data.dataset_config=x"], 'only read with kind = "streaming"'),
    (["--data.seed=3", "--data.kind=streaming", "--data.dataset=x"], "only read with a shuffle_buffer"),
    (["--data.prefetch_factor=3"], "only read with num_workers of at least 1"),
    (["--model.hf_assets_path=x", "--data.kind=group_word", "--data.group=S3"], "only read with kind = "),
    (["--model.conv_size=3", "--model.use_short_conv=false"], "only read with use_short_conv = true"),
    (["--model.hidden_ratio=3", "--model.intermediate_size=64"], "only read with no intermediate_size"),
    (["--metrics.save_for_all_ranks"], "rank 0 keeps the records of all; delete the line"),
])  # fmt: skip
def test_what_nothing_would_read_is_refused(problems, options, told):
    assert told in problems(DATA if "kind" not in str(options) else "[data]\n", *options)


@pytest.mark.parametrize("options", [
    ["--data.shuffle=false"], ["--data.prefetch_factor=3", "--data.num_workers=1"], ["--model.hf_assets_path=x"],
    ["--model.conv_size=3"], ["--model.hidden_ratio=3"],
])  # fmt: skip
def test_what_is_read_is_not(problems, options):
    assert problems(DATA, *options) == ""


FORMAL = "--data.kind=formal_language --training.seq_len=40 "
GROUP = "--data.kind=group_word --data.group=S3 --training.seq_len=40 "


@pytest.mark.parametrize(("good", "bad", "reason"), [
    ("--data.paths=a --guard.hang_seconds=1799", "--data.paths=a --guard.hang_seconds=1800",
     "collectives give up after 1800 s"),
    ("--data.paths=a --guard.hang_seconds=0", "--data.paths=a --guard.hang_seconds=1801", "must be below that"),
    ("--data.paths=a --checkpoint.keep_every=1000", "--data.paths=a --checkpoint.keep_every=250",
     "must be a multiple of interval = 500"),
    (FORMAL + "--data.max_length=40", FORMAL + "--data.max_length=41",
     "rows of max_length = 41 tokens do not fit in training.seq_len = 40"),
    (FORMAL + "--data.min_length=40", FORMAL + "--data.min_length=41", "max_length = 40 is below min_length = 41"),
    (FORMAL + "--validation.lengths=40", FORMAL + "--validation.lengths=39",
     "length L has rows of max_length = 40 to L tokens: 39 is too short"),
    (GROUP + "--validation.lengths=9", GROUP + "--validation.lengths=9,9", "a length is listed twice"),
    (GROUP + "--data.curriculum_start=40 --data.curriculum_steps=1", GROUP + "--data.curriculum_start=41 "
     "--data.curriculum_steps=1", "starts above training.seq_len = 40, the length it leads to"),
    (GROUP, GROUP + "--data.curriculum_start=9", "needs both curriculum_start (tokens) and curriculum_steps"),
    (GROUP, "--data.kind=group_word", 'group_word needs [data] group, such as "S3"'),
    (GROUP, GROUP + "--validation.paths=a", "generated data is validated on generated samples"),
])  # fmt: skip
def test_where_a_contradiction_begins(problems, good, bad, reason):
    assert problems("", *good.split()) == ""
    assert reason in problems("", *bad.split())


def test_a_number_of_ranks_that_is_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Environment.detect().world_size == 8
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 'abc': expected the number of ranks"):
        Environment.detect()
