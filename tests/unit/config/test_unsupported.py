"""No option is parsed and ignored: each one is read by a run in the settings its record names, or refused by name."""

import inspect
import json
import re
import sys
from importlib import import_module

import pytest

from tests import toy as toys
from torchtitan_deltaproduct.config import Environment, load_config
from torchtitan_deltaproduct.config.inherited import HONOURED, REFUSED
from torchtitan_deltaproduct.config.job import JobConfig
from torchtitan_deltaproduct.config.schema import refusal, schema, supported_keys, type_name
from torchtitan_deltaproduct.config.values import show
from torchtitan_deltaproduct.models import DeltaProductArgs
from torchtitan_deltaproduct.optimizers import clip_gradients
from torchtitan_deltaproduct.options import value_of
from torchtitan_deltaproduct.titan import trainer


def test_every_record_of_torchtitans_options_is_used():
    """None is for an option that does not exist, or whose field has a record of its own."""
    used = {id(option.record) for option in schema().values()}
    assert [key for key, record in (HONOURED | REFUSED).items() if id(record) not in used] == []


def another_value(option):
    """A value of the right type that is not the default."""
    kind = type(option.default)
    if kind is bool:
        return not option.default
    if kind in (int, float):
        allowed = option.record.allowed
        values = [option.default + 1, option.default + 2, option.default / 2]
        return next(value for value in values if allowed is None or allowed.allows(value))
    if kind is list:
        return [0.5] if "float" in type_name(option.hint) else [1] if "int" in type_name(option.hint) else ["something"]
    if choices := re.findall(r'"([^"]+)"', type_name(option.hint)):
        return next((choice for choice in choices if choice != option.default), None)
    return {"int": 7, "list of list of str": [["something"]]}.get(type_name(option.hint), "something")


@pytest.mark.parametrize("key", [key for key in schema() if refusal(key)])
def test_setting_a_refused_option_is_an_error_and_its_default_is_not(key, problems):
    option = schema()[key]
    value = another_value(option)
    if value is None:
        pytest.skip("has only one value")
    base = '[data]\npaths = ["a"]\n'
    message = problems(f"{base}[{option.table}]\n{option.name} = {show(value)}\n")
    rule = refusal(key)
    wanted = f"x.toml:4: [{option.table}] {option.name} = {show(value)}: {rule.reason}; {rule.instead}"
    assert message == wanted
    if option.default is not None:
        assert problems(f"{base}[{option.table}]\n{option.name} = {show(option.default)}\n") == ""


SETTINGS = {
    "in bfloat16": "--training.mixed_precision_param=bfloat16 --debug.deterministic --validation.prompts=def",
    "checkpointed": "--optimizer.name=Muon --lr_scheduler.schedule=wsd --activation_checkpoint.mode=selective "
    "--model.intermediate_size=none --checkpoint.last_save_model_only",
    "compiled": "--compile.enable --compile.backend=eager --activation_checkpoint.mode=memory_budget "
    "--activation_checkpoint.memory_budget=1 --model.use_short_conv=false",
    "not saved": "--checkpoint.no-enable --validation.no-enable --activation_checkpoint.selective_ac_option=op",
    "streaming": "--data.kind=streaming --data.paths= --data.dataset={text} --model.hf_assets_path={tokenizer} "
    "--data.shuffle_buffer=2 --data.num_workers=1 --validation.no-enable --validation.paths=",
    "streaming in file order": "--data.kind=streaming --data.paths= --data.dataset={text} "
    "--model.hf_assets_path={tokenizer} --validation.no-enable --validation.paths=",
    "group_word": "--data.kind=group_word --data.paths= --data.group=S3 --data.curriculum_start=8 "
    "--data.curriculum_steps=2 --validation.paths= --validation.steps=-1",
    "formal_language": "--data.kind=formal_language --data.paths= --validation.paths= --validation.steps=-1",
}
"""Small runs that between them are in every setting that the records name."""
PROFILER = "save_traces_folder profile_freq profiler_active profiler_warmup save_memory_snapshot_folder"
ELSEWHERE = {"job.config_file": "torchtitan_deltaproduct.config.load"}
ELSEWHERE |= {f"profiling.{name}": "torchtitan.tools.profiling" for name in PROFILER.split()}
ELSEWHERE["training.mixed_precision_reduce"] = "torchtitan_deltaproduct.titan.parallelize"
"""Who reads the options that such a run does not come to: the profiler needs CUDA, sharding a second rank."""
BYSTANDERS = ("dataclasses", "copy", "torchtitan_deltaproduct.options", "torchtitan_deltaproduct.config.snapshots")
"""Modules that look at every option alike."""


@pytest.fixture(scope="module")
def reads(toy, tmp_path_factory):
    """For each setting, its config and the keys that its run looked at, after the config was loaded and judged.

    Takes 20 s, for eight runs of the real trainer: nothing less shows that an option is read.
    """
    folder, result, seen = tmp_path_factory.mktemp("reads"), {}, set()
    (folder / "text.jsonl").write_text(json.dumps({"text": "def f(): return 1 " * 99}) + "\n")

    def load(argv):
        result[setting] = [load_config(argv, Environment()), seen]
        seen.clear()
        return result[setting][0]

    def noting(table):
        def note(self, name):
            if sys._getframe(1).f_globals["__name__"] not in BYSTANDERS:
                seen.add(f"{table}.{name}")
            return object.__getattribute__(self, name)

        return note

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toys, "load_config", load)
        patch.setattr(trainer, "clip_gradients", lambda *given: clip_gradients(*given) * float("nan"))
        for table, cls in [(key, type(getattr(JobConfig(), key))) for key in JobConfig().to_dict()]:
            patch.setattr(cls, "__getattribute__", noting(table), raising=False)
        for number, (setting, options) in enumerate(SETTINGS.items()):
            options = options.format(text=folder / "text.jsonl", tokenizer=toy.parent / "tokenizer")
            with patch.context() as inner:
                if setting != "compiled":  # torch.compile cannot look into `note`
                    inner.setattr(DeltaProductArgs, "__getattribute__", noting("model"), raising=False)
                toys.train(toy, folder / str(number), "--training.steps=3", *options.split(" "))
            result[setting][1] = set(seen)
    return result


@pytest.mark.parametrize("key", supported_keys())
def test_each_option_is_read_where_its_record_says(key, reads):
    reader = schema()[key].record.reader
    read_in = [setting for setting, (_, keys) in reads.items() if key in keys]
    if key in ELSEWHERE:
        assert not read_in and re.search(rf"\b{schema()[key].name}\b", inspect.getsource(import_module(ELSEWHERE[key])))
        return
    assert read_in, f"{key} is read by nobody"
    if reader:
        held = [setting for setting, (config, _) in reads.items() if reader.holds(config)]
        assert set(read_in) & set(held) and len(held) < len(reads), f"{key} is read in {read_in}, should be in {held}"


@pytest.mark.parametrize("key", [key for key in supported_keys() if schema()[key].record.reader])
def test_an_option_is_refused_where_nobody_reads_it(key, problems, reads):
    option, reader = schema()[key], schema()[key].record.reader
    config = next(config for config, _ in reads.values() if not reader.holds(config))
    options = {by: value_of(config, by) for by in ("data.kind", reader.by)} | {key: another_value(option)}
    message = problems("", *(f"--{name}={show(value).strip(chr(34))}" for name, value in options.items()))
    assert reader.otherwise.format(value_of(config, reader.by)) in message
