"""The tables of a training TOML: torchtitan 0.2.2's job config, and ours.

`JobConfig` is what the loader (`config.load`) fills and what the trainer reads. A field that torchtitan defines keeps
torchtitan's name and meaning; where its default is a trap for this model (see docs of the field) ours differs. Every
field carries its record (`options.Option`): range, meaning of a change on resume, reader, other names; and its own doc
string with unit and range, which error messages quote. The records of what torchtitan alone defines are in
`config.inherited`.
"""

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from ..models.args import DeltaProductArgs
from ..optimizers import OPTIMIZERS
from ..options import (
    BELOW_ONE,
    COUNT,
    COUNT_OR_ZERO,
    NO_BLANKS,
    NOT_EMPTY,
    POSITIVE,
    SEED,
    Range,
    Reader,
    at_least_or,
    breaking,
    harmless,
    notable,
    option,
    read_with,
)  # fmt: skip
from .stand_ins import stand_ins

with stand_ins():
    from torchtitan.config import job_config as titan

PREPARED = read_with("data.kind", "prepared")
STREAMING = read_with("data.kind", "streaming")
TEXT = read_with("data.kind", "prepared", "streaming")
GROUP_WORD = read_with("data.kind", "group_word")
LANGUAGE = read_with("data.kind", "formal_language")
GENERATED = read_with("data.kind", "group_word", "formal_language")

OTHER_DATA = breaking("other data")
OTHER_ORDER = breaking("the samples would come in another order")
OTHER_LENGTHS = breaking("words would have other lengths")
NEXT_STEP = notable("holds from the next step on")
OTHER_ROUNDING = notable("results agree to rounding")
NOT_COMPARABLE = notable("held-out losses are not comparable with earlier ones")
SPEED = harmless("speed")
LOGGING = harmless("logging")
SAVING = harmless("when and where to save, and what to keep")
STOPPING = harmless("when to stop or to warn")


@dataclass
class Model(DeltaProductArgs, titan.Model):
    name: str = "deltaproduct"
    """Always `deltaproduct`."""
    flavor: str = option("", harmless("a label"))
    """A free label, shown in the log and by `plan`, for example `213M-n2`."""
    hf_assets_path: str = option(
        "", notable("prepared data records its own tokenizer"),
        reader=TEXT, is_path=True, aliases="tokenizer tokenizer_name",
    )  # fmt: skip
    """Folder with tokenizer.json. prepared: empty, or that of the data's manifest; for token files of other programs
    the one that made them. streaming: what makes the tokens."""


@dataclass
class Data:
    kind: Literal["prepared", "streaming", "group_word", "formal_language"] = option("prepared", OTHER_DATA)
    """`prepared`: memory-mapped token shards (`python -m torchtitan_deltaproduct.data.prepare`).
    `streaming`: a Hugging Face dataset, tokenised on the fly.
    `group_word`: random words over a group, generated; the label at each position is the prefix product.
    `formal_language`: parity or arithmetic modulo 5, generated, with one answer at the end of each row."""
    paths: list[str] = option(
        [], OTHER_DATA, NO_BLANKS, is_path=True, aliases="path data_path data_dir train_data train_path paths_train",
        reader=read_with("data.kind", "prepared", otherwise="paths name prepared folders, which {} does not read"),
    )  # fmt: skip
    """Prepared folders to train on; several make a mixture. Megatron corpora (`.bin` with `.idx`) and `.npy` files of
    token ids, or folders of them, are read as they are, with the tokenizer of `model.hf_assets_path`."""
    weights: list[float] = option(
        [], OTHER_ORDER, Range(lambda value: all(share > 0 for share in value), "must all be positive"), reader=PREPARED
    )
    """Share of samples drawn from each of `paths` (any positive scale), each with its own epochs.
    Empty: the windows of all paths are one pool, so that shares are in proportion to tokens."""
    seed: int = option(
        0, OTHER_ORDER, SEED,
        reader=Reader("data.shuffle_buffer",
                      lambda config: config.data.kind != "streaming" or config.data.shuffle_buffer > 0,
                      "only read with a shuffle_buffer, since a stream is in file order without one"),
    )  # fmt: skip
    """Seed of the sample order, or of generated samples. Sample i is a function of (data, seed, i) and of
    nothing else."""
    shuffle: bool = option(True, OTHER_ORDER, reader=PREPARED)
    """prepared: visit windows in a new pseudo-random order each epoch; False: in file order."""
    reset_state_at_documents: bool = option(False, breaking("another treatment of documents"), reader=TEXT)
    """Start every document of a packed window from an empty recurrent and convolution state; it begins by
    reading the separator before it, so no label is lost."""
    dataset: str = option(
        "", OTHER_DATA, reader=STREAMING, is_path=True, aliases="dataset_name dataset_path hf_dataset"
    )
    """streaming: name on the Hugging Face hub, or a local folder or file `datasets` can read."""
    dataset_config: str = option("", OTHER_DATA, reader=STREAMING)
    """streaming: configuration (subset) name of the hub dataset; empty: the default one."""
    split: str = option("train", OTHER_DATA, NOT_EMPTY, reader=STREAMING)
    """streaming: split to train on."""
    text_field: str = option("text", OTHER_DATA, NOT_EMPTY, reader=STREAMING)
    """streaming: column that holds the text."""
    eos: str = option("", OTHER_DATA, reader=TEXT)
    """Text of the token that separates documents; empty: the one that the tokenizer names. A prepared folder records
    its own (`prepare --eos`)."""
    shuffle_buffer: int = option(0, OTHER_ORDER, COUNT_OR_ZERO, reader=STREAMING)
    """streaming: documents in a block that is shuffled; 0: file order. Resuming re-reads one block."""
    group: str = option("", OTHER_DATA, reader=GROUP_WORD)
    """group_word: `S5`, `A5`, `Z60`, `D4`, `A4_x_Z5`, `S5_only_swaps`, `S5_limit_to_3`, `S5_4_tokens`; see
    data/generated/groups.py."""
    curriculum_start: int = option(0, OTHER_LENGTHS, at_least_or(0, 1, "full length from the start"), reader=GROUP_WORD)
    """group_word: tokens of a word at step 0, from where the length grows linearly to `training.seq_len`;
    later positions have no label. 0: full length from the start."""
    curriculum_steps: int = option(0, OTHER_LENGTHS, COUNT_OR_ZERO, reader=GROUP_WORD)
    """group_word: step at which words reach their full length."""
    language: Literal["parity", "modular_arithmetic", "modular_arithmetic_brackets"] = option(
        "parity", OTHER_DATA, reader=LANGUAGE
    )
    """formal_language: what to learn; see data/generated/languages.py."""
    min_length: int = option(3, OTHER_DATA, COUNT, reader=LANGUAGE)
    """formal_language: fewest tokens of a row without padding, `=` included."""
    max_length: int = option(40, OTHER_DATA, COUNT, reader=LANGUAGE)
    """formal_language: most tokens of a row, at most `training.seq_len`; lengths are drawn uniformly."""
    num_workers: int = option(0, SPEED, COUNT_OR_ZERO, aliases="workers n_workers dataloader_num_workers")
    """Worker processes of the loader; 0 loads in the training process (prepared data needs no more).
    streaming: 0 or 1."""
    prefetch_factor: int = option(
        2, SPEED, COUNT,
        reader=Reader("data.num_workers", lambda config: config.data.num_workers > 0,
                      "only read with num_workers of at least 1"),
    )  # fmt: skip
    """Batches each worker prepares ahead."""


@dataclass
class Training(titan.Training):
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = option(
        "auto", notable("other rounding"), aliases="precision bf16 amp mixed_precision param_dtype torch_dtype"
    )
    """Dtype of parameters and activations in forward and backward; master weights stay in `dtype`.
    `auto`: bfloat16 on CUDA, float32 on CPU."""
    max_skipped_steps: int = option(10, NEXT_STEP, COUNT)
    """Stop after this many steps in a row were skipped for a non-finite loss or gradient (at least 1)."""

    def samples_per_step(self, ranks: int) -> int:
        """Sequences an optimizer step takes of all data-parallel ranks together."""
        return self.global_batch_size if self.global_batch_size > 0 else self.local_batch_size * ranks


@dataclass
class Optimizer(titan.Optimizer):
    name: Literal[tuple(OPTIMIZERS)] = option("AdamW", breaking("another optimizer state", from_the_start=True))
    """Optimizer to use. `Muon`: torch's, of the hidden matrices (q, k, v, output gate and output projections, one
    matrix a micro-step, and the MLP), and AdamW of everything else. Its updates are scaled to the size of AdamW's
    (`match_rms_adamw`), so that `lr` and `weight_decay` mean the same to both."""
    lr: float = option(3e-4, NEXT_STEP, POSITIVE, aliases="learning_rate max_lr peak_lr base_lr")
    """Peak learning rate; `[lr_scheduler]` multiplies it by a factor in [0, 1]."""
    beta1: float = option(0.9, NEXT_STEP, BELOW_ONE, aliases="betas b1 adam_beta1")
    """Decay of the running mean of gradients, in [0, 1)."""
    beta2: float = option(0.95, NEXT_STEP, BELOW_ONE, aliases="b2 adam_beta2")
    """Decay of the running mean of squared gradients, in [0, 1)."""
    weight_decay: float = option(0.01, NEXT_STEP, COUNT_OR_ZERO, aliases="wd decay")
    """Decay of matrices, decoupled and multiplied by the rate: AdamW's and Muon's; norms, biases, A_log, dt_bias,
    convolutions, embeddings take none. Adam adds it to the gradient."""
    momentum: float = option(
        0.95, NEXT_STEP, BELOW_ONE, reader=read_with("optimizer.name", "Muon"), aliases="muon_momentum"
    )
    """Muon: decay of the running mean of gradients (Nesterov's), in [0, 1)."""
    implementation: Literal["fused", "foreach", "for-loop"] = option("fused", OTHER_ROUNDING)
    """Of Adam and AdamW: `fused` updates without waiting for the device, on the CPU too; the others wait for it once a
    step more."""


@dataclass
class LRScheduler(titan.LRScheduler):
    schedule: Literal["decay", "wsd"] = option("decay", NEXT_STEP, aliases="scheduler lr_schedule lr_scheduler_name")
    """Phases of the rate after its warm-up; `decay_type` says how it falls. `decay`: it falls to the end of the run,
    or in its last `decay_ratio`. `wsd` (warm-up, stable, decay): it stays at the peak and falls in the last
    `decay_steps`, or `decay_ratio`, or tenth of the run. A larger `training.steps` then extends the stable phase, a
    smaller one ends it earlier; docs/reliability.md says how to branch from any checkpoint."""
    decay_steps: int | None = option(
        None, NEXT_STEP, COUNT, reader=read_with("lr_scheduler.schedule", "wsd"),
        aliases="cooldown_steps cooldown num_decay_steps decay_iters lr_decay_steps",
    )  # fmt: skip
    """wsd: steps of the decay at the end of the run, however long that is, in the place of `decay_ratio`."""


@dataclass
class Validation(titan.Validation):
    paths: list[str] = option([], NOT_COMPARABLE, NO_BLANKS, is_path=True)
    """Prepared folders to validate on, in file order: the same windows every time. Generated data
    (`group_word`, `formal_language`) needs none: it is validated on its own held-out stream."""
    seq_len: int = option(0, NOT_COMPARABLE, at_least_or(0, 1, "the length of training"), reader=TEXT)
    """Window length in tokens; 0: as in training."""
    steps: int = option(-1, NOT_COMPARABLE, at_least_or(-1, 1, "every window of the set"), reader=TEXT)
    """Windows to read, in units of `local_batch_size`, evenly spaced and the same for any number of ranks; -1: every
    window of the set once."""
    prompts: list[str] = option(
        [], harmless("what to show"), reader=TEXT, aliases="sample_prompts generate_prompts", is_prose=True
    )
    """Texts that the model continues at each validation, greedy and sampled: in the log, RUN/samples.jsonl and
    TensorBoard. "" is the beginning of a document. On the command line one text, or several as '["def ", "class "]'.
    Every rank gathers the whole weights for it."""
    sample_tokens: int = option(
        64, harmless("what to show"), COUNT, aliases="max_new_tokens",
        reader=Reader("validation.prompts", lambda config: bool(config.validation.prompts), "only read with prompts"),
    )  # fmt: skip
    """Tokens added to each of `prompts`, at most."""
    lengths: list[int] = option(
        [], harmless("which lengths to report"),
        Range(lambda value: all(length >= 1 for length in value), "must all be at least 1"), reader=GENERATED,
    )  # fmt: skip
    """Generated data: lengths in tokens to report besides the one of training, longer ones as a rule. Of a formal
    language, length L has rows of `data.max_length` to L tokens."""
    samples: int = option(1024, NOT_COMPARABLE, COUNT, reader=GENERATED)
    """Generated data: held-out rows at each length, over all ranks."""


@dataclass
class Checkpoint(titan.Checkpoint):
    enable: bool = option(
        True, notable("decides whether this start saves and resumes"), aliases="enable_checkpoint save_checkpoints"
    )
    last_save_model_only: bool = option(False, notable("decides what the last checkpoint holds"))
    """True saves only weights at the end: such a run cannot be continued. Ours defaults to False."""
    keep_latest_k: int = option(
        3, SAVING,
        Range(lambda value: value == 0 or value >= 2,
              "must be 0 (keep all) or at least 2: the newest may be incomplete when a run dies"),
        aliases="keep_last keep_last_k save_total_limit max_to_keep keep",
    )  # fmt: skip
    """Complete checkpoints kept, newest first; 0: keep all; 1 is not allowed."""
    keep_every: int = option(0, SAVING, COUNT_OR_ZERO)
    """Steps divisible by it are milestones, kept for good; 0: none."""
    keep_best: int = option(
        0, SAVING, COUNT_OR_ZERO, aliases="save_best save_top_k keep_top_k load_best_model_at_end",
        reader=read_with("validation.enable", True, otherwise="the best is by validation loss: set validation.enable"),
    )  # fmt: skip
    """So many of the checkpoints with the lowest validation loss are kept besides; 0: none. A checkpoint has a loss if
    its step was validated; a restart goes on from the newest all the same."""
    verify_on_load: bool = option(True, harmless("whether checksums are compared"))
    """Compare the checksum of every file before resuming; a damaged checkpoint gives way to the one before."""

    @property
    def excluded(self) -> list[str]:
        """What is not taken of the whole state of `initial_load_path`.

        The step, the place in the data and the schedule go together: the step counts batches of those data, and the
        schedule counts steps.
        """
        names = set(self.exclude_from_loading)
        if names & {"dataloader", "train_state"}:
            names |= {"dataloader", "train_state", "lr_scheduler"}
        return sorted(names)


@dataclass
class Guard:
    walltime_minutes: float = option(0.0, STOPPING, COUNT_OR_ZERO)
    """Minutes from the start after which the run saves and stops; 0: the end of its SLURM job, if it is in one."""
    walltime_margin_seconds: float = option(60.0, STOPPING, COUNT_OR_ZERO)
    """Seconds kept free at the end, beyond twice the longest recent step and save."""
    hang_seconds: float = option(1200.0, STOPPING, COUNT_OR_ZERO)
    """Seconds without a finished step, validation batch or save after which a rank writes its stacks to RUN/stacks and
    exits, so that the launcher starts the run again; six times as long until the first step has ended. 0: never."""
    spike_threshold: float = option(8.0, STOPPING, COUNT_OR_ZERO)
    """A loss so many deviations above the median of the last 128 steps is reported with its samples; 0: none is."""


@dataclass
class Metrics(titan.Metrics):
    log_freq: int = option(10, LOGGING, COUNT, aliases="log_interval logging_steps log_every")
    """Steps between console lines, and points in TensorBoard and wandb; metrics.jsonl has a record for every step."""
    enable_tensorboard: bool = option(True, LOGGING, aliases="tensorboard use_tensorboard")
    peak_flops: float = option(0.0, LOGGING, COUNT_OR_ZERO)
    """Peak FLOP/s of one device for MFU; 0: looked up by device name, no MFU where that is unknown."""


@dataclass
class Comm(titan.Comm):
    train_timeout_seconds: int = option(1800, harmless("timeouts and traces"), COUNT)
    """Timeout of collectives after the first step, in seconds: longer than validation or a recompilation."""


@dataclass
class Compile(titan.Compile):
    backend: str = option("inductor", OTHER_ROUNDING, NOT_EMPTY)
    """Backend of torch.compile."""
    cuda_graph: Literal["auto", "always", "never"] = option("auto", SPEED, aliases="cudagraph cudagraphs cuda_graphs")
    """Whether forward and backward of a micro-batch are launched as one CUDA graph: on one GPU, without activation
    checkpointing. `auto`: where the model is compiled and its activations take little of the memory, so that the host
    would be slower than the device."""


@dataclass
class Debug(titan.Debug):
    seed: int = option(42, notable("no effect: the weights are drawn already"), SEED, aliases="random_seed manual_seed")
    """Seed of the initial weights."""


@dataclass
class JobConfig(titan.JobConfig):
    # No annotation, hence no field: `to_dict` and snapshots leave it out.
    provenance = MappingProxyType({})
    """Key -> "x.toml:14", "command line" or "default (ours|torchtitan)"; set by `config.load`."""
    warmup_in_file = None
    """`lr_scheduler.warmup_steps` before `config.load` shortened it with a run that the command line cuts short."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    guard: Guard = field(default_factory=Guard)
    metrics: Metrics = field(default_factory=Metrics)
    compile: Compile = field(default_factory=Compile)
    comm: Comm = field(default_factory=Comm)
    debug: Debug = field(default_factory=Debug)

    def data_ranks(self, world_size: int) -> int:
        """Ranks that read different sequences: those that share one under context parallelism count once."""
        return max(1, world_size // self.parallelism.context_parallel_degree)
