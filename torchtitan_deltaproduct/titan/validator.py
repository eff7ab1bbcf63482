"""Evaluation on a fixed held-out set: the same windows every time, weighted by tokens, whatever the number of ranks.

torchtitan's own validator reads another window at each call, averages per-rank means, and hangs when ranks run out of
data at different steps; here every rank has the same number of batches, padded with ignored labels. `Validator` reports
loss in nats and in bits per byte of text; `word_validator.WordValidator` reports accuracies on generated data.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.validate import BaseValidator
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils

from ..config.job import JobConfig
from ..data.held_out import held_out_text
from ..data.loader import Batch
from ..models.loss import IGNORE_INDEX
from .feed import own_part
from .metrics import MetricsProcessor
from .parallelize import sequence_ranks, sum_over_ranks
from .samples import Samples


class Interrupted(Exception):
    """The run has to stop; the text is the reason."""


class HeldOutValidator(BaseValidator):
    """What every validator does: when, a pass without gradients, sums over ranks. `last` is the newest result."""

    def __init__(
        self,
        job_config: JobConfig,
        dp_world_size: int,
        dp_rank: int,
        parallel_dims: ParallelDims,
        metrics_processor: MetricsProcessor,
    ) -> None:
        self.job_config = job_config
        self.dp_world_size, self.dp_rank = dp_world_size, dp_rank
        self.parallel_dims, self.ranks = parallel_dims, sequence_ranks(parallel_dims)
        self.metrics = metrics_processor
        self.last: dict[str, float] = {}
        self.samples: Samples | None = None
        self.after_batch: Callable[[], str | None] = lambda: None
        """Called on all ranks after each batch; a reason to stop, the same on all, breaks the pass off."""

    def should_validate(self, step: int) -> bool:
        """Before the first step, every `freq` steps, and after the last."""
        return step % self.job_config.validation.freq == 0 or step == self.job_config.training.steps

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """One pass of the model over the held-out data, on all ranks: sums and means over all of them."""
        raise NotImplementedError

    def summary(self, values: dict[str, float]) -> str:
        """What the console line says of `values`, the loss and the time apart."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line for the log on the held-out data."""
        raise NotImplementedError

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> str | None:
        """Evaluates, logs, and keeps what was found, and the `seconds` it took, in `last`.

        Returns:
            None, or why the run has to stop: then the pass was broken off and nothing is logged.
        """
        start, model = time.perf_counter(), model_parts[0]
        model.eval()
        try:
            self.last = self.evaluate(model)
            self.last["seconds"] = round(time.perf_counter() - start, 2)
            if self.samples is not None:
                # Before the record of the validation, which says to a restart that all of it was done.
                self.metrics.log_samples(step, self.samples.draw(model, step))
        except Interrupted as reason:
            return str(reason)
        finally:
            model.train()
            # The root group stays gathered after a forward pass, and only a backward pass would put it back: without
            # this, a checkpoint saved next would look for the optimizer state of the gathered parameters.
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        self.metrics.log_validation(step, self.last, self.summary(self.last))
        return None

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yields each batch, this rank's part, on the device, and looks after it whether the run has to stop."""
        for inputs, labels in (own_part(batch, self.ranks) for batch in loader):
            yield {name: tensor.to(utils.device_type) for name, tensor in inputs.items()}, labels.to(utils.device_type)
            if reason := self.after_batch():
                raise Interrupted(reason)


class Validator(HeldOutValidator):
    """Loss (nats per token), perplexity and bits per byte on prepared text."""

    def __init__(self, job_config: JobConfig, **given) -> None:
        super().__init__(job_config, **given)
        config = job_config.validation
        self.loader = held_out_text(
            config.paths,
            seq_len=config.seq_len or job_config.training.seq_len,
            local_batch_size=config.local_batch_size,
            steps=config.steps,
            dp_rank=self.dp_rank,
            dp_world_size=self.dp_world_size,
            reset_state_at_documents=job_config.data.reset_state_at_documents,
            tokenizer_path=job_config.model.hf_assets_path,
            eos=job_config.data.eos,
        )
        if config.prompts:
            self.samples = Samples(config.prompts, config.sample_tokens, self.loader.source.streams[0])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        totals = torch.zeros(3, dtype=torch.float64)  # summed loss, tokens, bytes
        token_bytes = self.loader.source.token_bytes
        for batch, labels in self.batches(self.loader):
            loss = model(batch.pop("input"), **batch, labels=labels).item()
            valid = labels[labels != IGNORE_INDEX].cpu()
            totals += torch.tensor([loss, valid.numel(), token_bytes[valid].sum().item()], dtype=torch.float64)
        loss_sum, tokens, n_bytes = sum_over_ranks(totals.to(utils.device_type), self.parallel_dims).tolist()
        return {
            "loss": loss_sum / tokens,
            "perplexity": math.exp(min(loss_sum / tokens, 700.0)),
            "bits_per_byte": loss_sum / math.log(2) / n_bytes,
            "tokens": tokens,
            "bytes": n_bytes,
        }

    def summary(self, values: dict[str, float]) -> str:
        return f"perplexity {values['perplexity']:,.2f}  bits/byte {values['bits_per_byte']:.4f}"

    def describe(self) -> str:
        return "; ".join([self.loader.describe(), *([self.samples.describe()] if self.samples else [])])
