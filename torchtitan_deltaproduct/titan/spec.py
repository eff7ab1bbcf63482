"""The TrainSpec of DeltaProduct: torchtitan's plug-in contract, filled in.

torchtitan looks a model up by `model.name` and its arguments by `model.flavor`; our arguments are the `[model]` table
itself, so `register` makes the spec for one job config.
"""

from dataclasses import asdict, dataclass, field

from torch import nn
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec

from ..config.job import JobConfig
from ..data import GENERATED, build_loader
from ..models import DeltaProductLM, counts
from ..models.args import DeltaProductArgs
from .metrics import MetricsProcessor
from .optimizer import GroupedOptimizers, Schedules
from .parallelize import parallelize
from .patches import add_train_spec
from .validator import HeldOutValidator, Validator
from .word_validator import WordValidator


@dataclass
class ModelArgs(BaseModelArgs):
    """The `[model]` table and the seed of the weights, in the shape torchtitan's Trainer expects."""

    architecture: DeltaProductArgs = field(default_factory=DeltaProductArgs)
    seed: int = 42

    def update_from_config(self, job_config: JobConfig, **kwargs) -> None:
        names = DeltaProductArgs.__dataclass_fields__
        self.architecture = DeltaProductArgs(**{k: v for k, v in asdict(job_config.model).items() if k in names})
        self.seed = job_config.debug.seed

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and FLOPs per token of a training step (forward and backward), by formulas that fit `model`."""
        counts.check_formulas(model, self.architecture)
        return counts.total_parameters(self.architecture), counts.training_flops_per_token(self.architecture)


def build_training_loader(dp_world_size: int, dp_rank: int, tokenizer, job_config: JobConfig):
    """The loader of `[data]`, told the global batch so that any number of ranks sees the same one."""
    return build_loader(
        job_config.data,
        seq_len=job_config.training.seq_len,
        local_batch_size=job_config.training.local_batch_size,
        global_batch_size=job_config.training.samples_per_step(dp_world_size),
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        tokenizer_path=job_config.model.hf_assets_path,
    )


def build_validator(job_config: JobConfig, **given) -> HeldOutValidator:
    """The signature TrainSpec asks for; of what it gives, pipeline parallelism's part is not used."""
    names = ("dp_world_size", "dp_rank", "parallel_dims", "metrics_processor")
    kind = WordValidator if job_config.data.kind in GENERATED else Validator
    return kind(job_config, **{name: given[name] for name in names})


def register(job_config: JobConfig) -> None:
    """Makes `job_config.model` the model torchtitan builds."""
    spec = TrainSpec(
        model_cls=lambda args: DeltaProductLM(args.architecture, seed=args.seed),
        model_args={job_config.model.flavor: ModelArgs()},
        parallelize_fn=parallelize,
        pipelining_fn=None,
        build_optimizers_fn=lambda model_parts, config, _dims: GroupedOptimizers(model_parts, config),
        build_lr_schedulers_fn=Schedules,
        build_dataloader_fn=build_training_loader,
        build_tokenizer_fn=None,
        # The model computes its loss itself, and torchtitan only hands on what this returns.
        build_loss_fn=lambda job_config, **given: None,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=lambda job_config, parallel_dims, *_: MetricsProcessor(job_config, parallel_dims),
    )
    add_train_spec(job_config.model.name, spec)
