"""The tables of a training TOML: torchtitan 0.2.2's job config, and ours.

`JobConfig` is what the loader (`config.load`) fills and what the trainer reads. A field that torchtitan
defines keeps torchtitan's name and meaning; where its default is a trap for this model (see docs of the
field) ours differs. Every field carries its own doc string with unit and range: `config.load` quotes it in
error messages. A new field also needs a class in `config.compare`, and a range in `config.check` where not
every value is one.
"""

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from torchtitan.config import job_config as titan

from ..models.args import DeltaProductArgs


@dataclass
class Model(DeltaProductArgs, titan.Model):
    name: str = "deltaproduct"
    """Always `deltaproduct`."""
    flavor: str = ""
    """A free label, shown in the log and by `plan`, for example `213M-n2`."""
    hf_assets_path: str = ""
    """Folder with tokenizer.json. prepared: empty, or that of the data's manifest. streaming: what makes the tokens."""


@dataclass
class Data:
    kind: Literal["prepared", "streaming", "group_word", "formal_language"] = "prepared"
    """`prepared`: memory-mapped token shards (`python -m torchtitan_deltaproduct.data.prepare`).
    `streaming`: a Hugging Face dataset, tokenised on the fly.
    `group_word`: random words over a group, generated; the label at each position is the prefix product.
    `formal_language`: parity or arithmetic modulo 5, generated, with one answer at the end of each row."""
    paths: list[str] = field(default_factory=list)
    """Prepared folders to train on; several make a mixture."""
    weights: list[float] = field(default_factory=list)
    """Share of samples drawn from each of `paths` (any positive scale), each with its own epochs.
    Empty: the windows of all paths are one pool, so that shares are in proportion to tokens."""
    seed: int = 0
    """Seed of the sample order, or of generated samples. Sample i is a function of (data, seed, i) and of
    nothing else."""
    shuffle: bool = True
    """prepared: visit windows in a new pseudo-random order each epoch; False: in file order."""
    reset_state_at_documents: bool = False
    """Start every document of a packed window from an empty recurrent and convolution state; it begins by
    reading the separator before it, so no label is lost."""
    dataset: str = ""
    """streaming: name on the Hugging Face hub, or a local folder or file `datasets` can read."""
    dataset_config: str = ""
    """streaming: configuration (subset) name of the hub dataset; empty: the default one."""
    split: str = "train"
    """streaming: split to train on."""
    text_field: str = "text"
    """streaming: column that holds the text."""
    eos: str = ""
    """streaming: text of the token that separates documents; empty: the one that the tokenizer names. Prepared data
    records its own (`prepare --eos`)."""
    shuffle_buffer: int = 0
    """streaming: documents in a block that is shuffled; 0: file order. Resuming re-reads one block."""
    group: str = ""
    """group_word: `S5`, `A5`, `Z60`, `D4`, `A4_x_Z5`, `S5_only_swaps`, `S5_limit_to_3`, `S5_4_tokens`; see
    data/groups.py."""
    curriculum_start: int = 0
    """group_word: tokens of a word at step 0, from where the length grows linearly to `training.seq_len`;
    later positions have no label. 0: full length from the start."""
    curriculum_steps: int = 0
    """group_word: step at which words reach their full length."""
    language: Literal["parity", "modular_arithmetic", "modular_arithmetic_brackets"] = "parity"
    """formal_language: what to learn; see data/formal.py."""
    min_length: int = 3
    """formal_language: fewest tokens of a row without padding, `=` included."""
    max_length: int = 40
    """formal_language: most tokens of a row, at most `training.seq_len`; lengths are drawn uniformly."""
    num_workers: int = 0
    """Worker processes of the loader; 0 loads in the training process (prepared data needs no more).
    streaming: 0 or 1."""
    prefetch_factor: int = 2
    """Batches each worker prepares ahead."""


@dataclass
class Training(titan.Training):
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of parameters and activations in forward and backward; master weights stay in `dtype`.
    `auto`: bfloat16 on CUDA, float32 on CPU."""
    max_skipped_steps: int = 10
    """Stop after this many steps in a row were skipped for a non-finite loss or gradient (at least 1)."""

    def samples_per_step(self, ranks: int) -> int:
        """Sequences an optimizer step takes of all data-parallel ranks together."""
        return self.global_batch_size if self.global_batch_size > 0 else self.local_batch_size * ranks


@dataclass
class Optimizer(titan.Optimizer):
    name: Literal["AdamW", "Adam"] = "AdamW"
    """Optimizer to use."""
    lr: float = 3e-4
    """Peak learning rate; `[lr_scheduler]` multiplies it by a factor in [0, 1]."""
    beta1: float = 0.9
    """Decay of the running mean of gradients, in [0, 1)."""
    beta2: float = 0.95
    """Decay of the running mean of squared gradients, in [0, 1)."""
    weight_decay: float = 0.01
    """AdamW weight decay of matrices; norms, biases, A_log, dt_bias, convolutions, embeddings take none."""
    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """`fused` updates without waiting for the device, on the CPU too; the others wait for it once a step more."""


@dataclass
class Validation(titan.Validation):
    paths: list[str] = field(default_factory=list)
    """Prepared folders to validate on, in file order: the same windows every time. Generated data
    (`group_word`, `formal_language`) needs none: it is validated on its own held-out stream."""
    seq_len: int = 0
    """Window length in tokens; 0: as in training."""
    steps: int = -1
    """Windows to read, in units of `local_batch_size`, evenly spaced and the same for any number of ranks; -1: every
    window of the set once."""
    lengths: list[int] = field(default_factory=list)
    """Generated data: lengths in tokens to report besides the one of training, longer ones as a rule. Of a formal
    language, length L has rows of `data.max_length` to L tokens."""
    samples: int = 1024
    """Generated data: held-out rows at each length, over all ranks."""


@dataclass
class Checkpoint(titan.Checkpoint):
    enable: bool = True
    last_save_model_only: bool = False
    """True saves only weights at the end: such a run cannot be continued. Ours defaults to False."""
    keep_latest_k: int = 3
    """Complete checkpoints kept, newest first; 0: keep all; 1 is not allowed."""
    keep_every: int = 0
    """Steps divisible by it are milestones, kept for good; 0: none."""
    verify_on_load: bool = True
    """Compare the checksum of every file before resuming; a damaged checkpoint gives way to the one before."""


@dataclass
class Guard:
    walltime_minutes: float = 0.0
    """Minutes from the start after which the run saves and stops; 0: the end of its SLURM job, if it is in one."""
    walltime_margin_seconds: float = 60.0
    """Seconds kept free at the end, beyond twice the longest recent step and save."""
    hang_seconds: float = 1200.0
    """Seconds without a finished step, validation batch or save after which a rank writes its stacks to RUN/stacks and
    exits, so that the launcher starts the run again; six times as long until the first step has ended. 0: never."""
    spike_threshold: float = 8.0
    """A loss so many deviations above the median of the last 128 steps is reported with its samples; 0: none is."""


@dataclass
class Metrics(titan.Metrics):
    log_freq: int = 10
    """Steps between console lines; metrics.jsonl has a record for every step."""
    enable_tensorboard: bool = True
    peak_flops: float = 0.0
    """Peak FLOP/s of one device for MFU; 0: looked up by device name, no MFU where that is unknown."""


@dataclass
class Comm(titan.Comm):
    train_timeout_seconds: int = 1800
    """Timeout of collectives after the first step, in seconds: longer than validation or a recompilation."""


@dataclass
class Compile(titan.Compile):
    backend: str = "inductor"
    """Backend of torch.compile."""


@dataclass
class Debug(titan.Debug):
    seed: int = 42
    """Seed of the initial weights."""


@dataclass
class JobConfig(titan.JobConfig):
    # No annotation, hence no field: `to_dict` and snapshots leave it out.
    provenance = MappingProxyType({})
    """Key -> "x.toml:14", "command line" or "default (ours|torchtitan)"; set by `config.load`."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    guard: Guard = field(default_factory=Guard)
    metrics: Metrics = field(default_factory=Metrics)
    compile: Compile = field(default_factory=Compile)
    comm: Comm = field(default_factory=Comm)
    debug: Debug = field(default_factory=Debug)
