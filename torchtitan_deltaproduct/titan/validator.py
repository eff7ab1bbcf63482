"""Loss on a fixed held-out set: the same windows every time, weighted by tokens, in nats and in bits per byte.

torchtitan's own validator reads another window at each call, averages per-rank means, and hangs when ranks run out of
data at different steps; here every rank has the same number of batches, padded with ignored labels.
"""

import math
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.loss import IGNORE_INDEX, cross_entropy_loss
from torchtitan.components.validate import BaseValidator
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils

from ..config.job import JobConfig
from ..data import build_validation_loader
from .metrics import MetricsProcessor


class Validator(BaseValidator):
    """Runs the model over the validation windows; `last` is the newest result."""

    def __init__(
        self,
        job_config: JobConfig,
        dp_world_size: int,
        dp_rank: int,
        parallel_dims: ParallelDims,
        metrics_processor: MetricsProcessor,
        validation_context,
    ) -> None:
        self.job_config = job_config
        self.parallel_dims = parallel_dims
        self.metrics = metrics_processor
        self.context = validation_context
        config = job_config.validation
        self.loader = build_validation_loader(
            config.paths,
            seq_len=config.seq_len or job_config.training.seq_len,
            local_batch_size=config.local_batch_size,
            steps=config.steps,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            reset_state_at_documents=job_config.data.reset_state_at_documents,
        )
        self.last: dict[str, float] = {}

    def should_validate(self, step: int) -> bool:
        """Before the first step, every `freq` steps, and after the last."""
        return step % self.job_config.validation.freq == 0 or step == self.job_config.training.steps

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> dict[str, float]:
        """Evaluates, logs, and returns loss (nats per token), perplexity, bits_per_byte, tokens, bytes, seconds."""
        start = time.perf_counter()
        model = model_parts[0]
        model.eval()
        totals = torch.zeros(3, dtype=torch.float64)  # summed loss, tokens, bytes
        token_bytes = self.loader.token_bytes
        for inputs, labels in self.loader:
            valid = labels[labels != IGNORE_INDEX]
            batch = {name: tensor.to(utils.device_type) for name, tensor in inputs.items()}
            with self.context():
                logits = model(batch.pop("input"), **batch)
                loss = cross_entropy_loss(logits, labels.to(utils.device_type))
            totals += torch.tensor([loss.item(), valid.numel(), token_bytes[valid].sum().item()], dtype=torch.float64)
        model.train()
        # The root group stays gathered after a forward pass, and only a backward pass would put it back: without this,
        # a checkpoint saved next would look for the optimizer state of the gathered parameters.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        if self.parallel_dims.dp_enabled:
            on_device = totals.to(utils.device_type)
            dist.all_reduce(on_device, group=self.parallel_dims.get_mesh("batch").get_group())
            totals = on_device.cpu()
        loss_sum, tokens, n_bytes = totals.tolist()
        loss = loss_sum / tokens
        self.last = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss_sum / math.log(2) / n_bytes,
            "tokens": tokens,
            "bytes": n_bytes,
            "seconds": round(time.perf_counter() - start, 2),
        }
        self.metrics.log_validation(step, self.last)
        return self.last


def build_validator(job_config: JobConfig, **given) -> Validator:
    """The signature TrainSpec asks for; of what it gives, pipeline parallelism's part is not used."""
    names = ("dp_world_size", "dp_rank", "parallel_dims", "metrics_processor", "validation_context")
    return Validator(job_config, **{name: given[name] for name in names})
