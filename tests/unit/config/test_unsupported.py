"""No option is parsed and ignored: every key is honoured or refused, never both, never neither."""

import inspect
import re
from importlib import import_module

import pytest
from torchtitan.config import job_config as titan

from tests.toy import REPO
from torchtitan_deltaproduct.config.fields import schema, type_name
from torchtitan_deltaproduct.config.unsupported import HONOURED, RULES, refusal, supported_keys
from torchtitan_deltaproduct.config.values import show

DECLARED_BY_TORCHTITAN = [
    key
    for key, option in schema().items()
    if any(
        base.__module__ == titan.__name__ and option.name in base.__dict__.get("__annotations__", {})
        for base in option.table_class.__mro__
    )
]


@pytest.mark.parametrize("key", DECLARED_BY_TORCHTITAN)
def test_each_option_of_torchtitan_is_honoured_or_refused(key):
    matched = [rule for rule in RULES if refusal(key) is rule]
    assert (key in HONOURED) != bool(matched), f"{key}: put it in HONOURED or write a rule, not both"


def test_nothing_honoured_that_does_not_exist():
    assert set(schema()) >= HONOURED


def test_every_rule_refuses_something():
    assert {rule.pattern for rule in RULES} == {refusal(key).pattern for key in schema() if refusal(key)}


def test_our_own_options_are_supported():
    ours = set(schema()) - set(DECLARED_BY_TORCHTITAN)
    assert (
        {"data.paths", "training.max_skipped_steps", "model.num_householder"} <= ours <= set(supported_keys())
    )


def another_value(option):
    """A value of the right type that is not the default."""
    kind = type(option.default)
    if kind is bool:
        return not option.default
    if kind in (int, float):
        return option.default + 1
    if kind is list:
        return ["something"]
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


# Where torchtitan's own code acts on an option; all others are read in this package.
READ_BY_TORCHTITAN = {
    "torchtitan.config.job_config": "job.print_config job.save_config_file",
    "torchtitan.tools.profiling": "profiling.enable_profiling profiling.save_traces_folder profiling.profile_freq "
    "profiling.profiler_active profiling.profiler_warmup profiling.enable_memory_snapshot "
    "profiling.save_memory_snapshot_folder",
    "torchtitan.components.metrics": "metrics.log_freq",
    "torchtitan.components.checkpoint": "checkpoint.enable_first_step_checkpoint",
    "torchtitan.train": "training.gc_freq training.gc_debug",
    "torchtitan.distributed.activation_checkpoint": "activation_checkpoint.early_stop "
    "activation_checkpoint.visualize_memory_budget_pareto activation_checkpoint.preserve_rng_state "
    "activation_checkpoint.determinism_check",
    "torchtitan.distributed.utils": "comm.init_timeout_seconds comm.save_traces_folder comm.save_traces_file_prefix "
    "debug.deterministic debug.deterministic_warn_only",
}
JUDGES = {"job.py", "ranges.py", "compare.py", "unsupported.py", "names.py", "check.py"}


def test_each_option_has_a_reader():
    """Outside of the files that only judge a config."""
    package = REPO / "torchtitan_deltaproduct"
    files = [path for path in package.rglob("*.py") if not (path.parent.name == "config" and path.name in JUDGES)]
    ours = "\n".join(path.read_text(encoding="utf-8") for path in files)
    stock = {key: module for module, keys in READ_BY_TORCHTITAN.items() for key in keys.split()}
    for key in supported_keys():
        source = inspect.getsource(import_module(stock[key])) if key in stock else ours
        assert re.search(rf"\.{schema()[key].name}\b", source), f"{key} is read by nobody"
    assert stock.keys() <= set(supported_keys())
