"""Is this the run that the checkpoints in its folder belong to?

    comparison = compare_configs(read_snapshot(folder / "config.json"), snapshot(config))      # config.snapshots
    refuse_breaking(comparison, folder, config.provenance)        # ConfigError
    for change in comparison.notable + comparison.harmless:
        logger.info("%s", change)                                 # optimizer.lr: 0.0003 -> 0.0001 (...)

Breaking: the result would be no continuation (another model, other data, another batch). Notable: allowed,
and worth a line in the log. Harmless: changes nothing that is learned.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from ..errors import ConfigError
from .unsupported import refusal
from .values import shorten, show

_OTHER_MODEL, _OTHER_OPTIMIZER = "another model", "another optimizer state"

BREAKING = {
    "model.vocab_size model.hidden_size model.num_hidden_layers model.num_heads model.head_dim "
    "model.expand_v model.num_householder model.allow_neg_eigval model.use_forget_gate model.use_output_gate "
    "model.use_short_conv model.conv_size model.norm_eps model.tie_word_embeddings derived.mlp_size":
        _OTHER_MODEL,
    "data.kind data.paths data.dataset data.dataset_config data.split data.text_field data.eos extra.data_identity "
    "data.group data.language data.min_length data.max_length":
        "other data",
    "data.weights data.seed data.shuffle data.shuffle_buffer": "the samples would come in another order",
    "data.curriculum_start data.curriculum_steps": "words would have other lengths",
    "data.reset_state_at_documents": "another treatment of documents",
    "training.seq_len": "other windows",
    "derived.global_batch_size": "another number of samples a step",
    "optimizer.name": _OTHER_OPTIMIZER,
}  # fmt: skip
NOTABLE = {
    "model.init_scheme model.initializer_range debug.seed": "no effect: the weights are drawn already",
    "model.op_backend": "results agree to rounding",
    "model.hf_assets_path": "prepared data records its own tokenizer",
    "optimizer.lr optimizer.beta1 optimizer.beta2 optimizer.eps optimizer.weight_decay lr_scheduler.*":
        "holds from the next step on",
    "optimizer.implementation": "results agree to rounding",
    "training.steps": "the new end; a schedule without total_steps stretches with it",
    "training.local_batch_size training.global_batch_size": "the same global batch in other pieces",
    "training.max_norm training.max_skipped_steps": "holds from the next step on",
    "training.mixed_precision_param training.mixed_precision_reduce": "other rounding",
    "training.enable_cpu_offload": "speed and memory",
    "parallelism.* derived.world_size": "results agree to rounding",
    "activation_checkpoint.*": "speed and memory",
    "compile.*": "results agree to rounding",
    "debug.deterministic debug.deterministic_warn_only": "speed",
    "checkpoint.initial_load_path checkpoint.initial_load_model_only":
        "no effect: the run has checkpoints of its own",
    "checkpoint.exclude_from_loading": "what is excluded starts anew",
    "checkpoint.load_step checkpoint.load_only checkpoint.create_seed_checkpoint":
        "decides what this start does",
    "checkpoint.last_save_model_only checkpoint.export_dtype": "decides what the last checkpoint holds",
    "checkpoint.enable": "decides whether this start saves and resumes",
    "validation.paths validation.seq_len validation.steps validation.local_batch_size validation.samples":
        "held-out losses are not comparable with earlier ones",
    "versions.torch versions.torchtitan versions.flash-linear-attention versions.triton":
        "results may differ in rounding",
}  # fmt: skip
HARMLESS = {
    "job.*": "names and folders",
    "model.flavor": "a label",
    "data.num_workers data.prefetch_factor": "speed",
    "training.gc_freq training.gc_debug": "speed",
    "profiling.* metrics.*": "logging",
    "comm.*": "timeouts and traces",
    "checkpoint.folder checkpoint.interval checkpoint.async_mode checkpoint.keep_latest_k "
    "checkpoint.enable_first_step_checkpoint checkpoint.keep_every": "when and where to save, and what to keep",
    "checkpoint.verify_on_load": "whether checksums are compared",
    "guard.*": "when to stop or to warn",
    "validation.enable validation.freq": "how often to validate",
    "validation.lengths": "which lengths to report",
    "model.hidden_ratio model.intermediate_size": "two ways to give the same MLP width",
    "versions.*": "for the record",
}
_CLASSES = {"breaking": BREAKING, "notable": NOTABLE, "harmless": HARMLESS}


@dataclass(frozen=True)
class Change:
    """One value that differs from the saved run's."""

    key: str
    old: Any
    new: Any
    why: str

    @property
    def name(self) -> str:
        return self.key.removeprefix("derived.").removeprefix("extra.")

    def __str__(self) -> str:
        return f"{self.name}: {shorten(show(self.old))} -> {shorten(show(self.new))} ({self.why})"


@dataclass
class Comparison:
    """What differs, by consequence."""

    breaking: list[Change] = field(default_factory=list)
    notable: list[Change] = field(default_factory=list)
    harmless: list[Change] = field(default_factory=list)


@cache
def classify(key: str) -> tuple[str, str] | None:
    """("breaking" | "notable" | "harmless", why) for a key of a snapshot; None if nobody classified it."""
    if refusal(key):
        return "breaking", "an option that is not supported"
    for kind, table in _CLASSES.items():
        for patterns, why in table.items():
            if any(fnmatchcase(key, pattern) for pattern in patterns.split()):
                return kind, why
    return None


def compare_configs(saved: Mapping[str, Any], current: Mapping[str, Any], consumed: bool = True) -> Comparison:
    """Compares two snapshots (see `snapshot`).

    Args:
        saved: of the checkpoint.
        current: of this launch.
        consumed: whether training goes on in the checkpoint's data; False where it begins anew, from the weights of a
            seed checkpoint say: then only another model breaks.

    An option that one of the two does not know (another version of this package wrote it) is notable: it
    cannot have had an effect there. With equal `extra["data_identity"]`, other folders hold the same data.
    """
    old, new = _flatten(saved), _flatten(current)
    identity = old.get("extra.data_identity")
    same_data = identity is not None and identity == new.get("extra.data_identity")
    comparison = Comparison()
    for key in [*new, *(key for key in old if key not in new)]:
        if key in old and key in new and old[key] == new[key]:
            continue
        kind, why = classify(key) or ("breaking", "an option whose effect nobody classified")
        if key not in old or key not in new:
            # The first run under a version with a new option must not be refused for it.
            kind = "harmless" if kind == "harmless" else "notable"
            why = "only one of the two versions has it"
        elif key == "data.paths" and same_data:
            kind, why = "notable", "the same data in another place"
        elif key == "model.hf_assets_path" and new.get("data.kind") == "streaming":
            kind, why = "breaking", "the tokenizer decides the tokens"
        if kind == "breaking" and not consumed and why not in (_OTHER_MODEL, _OTHER_OPTIMIZER):
            kind, why = "notable", "no sample was trained on yet"
        getattr(comparison, kind).append(Change(key, old.get(key), new.get(key), why))
    return comparison


def refuse_breaking(
    comparison: Comparison, checkpoint: str | os.PathLike, provenance: Mapping[str, str] | None = None
) -> None:
    """Raises ConfigError if the config cannot continue the run that saved `checkpoint`."""
    if not comparison.breaking:
        return
    lines = []
    for change in comparison.breaking:
        origin = (provenance or {}).get(change.key)
        told = f" ({origin})" if origin else ""
        old, new = shorten(show(change.old)), shorten(show(change.new))
        lines.append(f"  {change.name} was {old}, is {new}{told}: {change.why}")
    if any(change.why == _OTHER_MODEL for change in comparison.breaking):
        way = "put the old values back to continue it, or train the other model in another job.dump_folder"
    else:
        way = (
            "put the old values back to continue it, or start a new run from its weights with\n"
            f"  --job.dump_folder NEW_FOLDER --checkpoint.initial_load_path {checkpoint}"
        )
    raise ConfigError(f"{checkpoint} belongs to another run:\n" + "\n".join(lines) + f"\n{way}")


def _flatten(content: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys: those of the config without a prefix, the other parts under their name."""
    flat: dict[str, Any] = {}

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        for name, value in tree.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{name}.")
            else:
                flat[f"{prefix}{name}"] = value

    walk(content.get("config", {}), "")
    walk(content.get("derived", {}), "derived.")
    walk(content.get("versions", {}), "versions.")
    identity = content.get("extra", {}).get("data_identity")
    if identity is not None:
        flat["extra.data_identity"] = identity
    return flat
