"""The Trainer: torchtitan's construction of a run, with our step and loop.

One step reads the micro-batches of a global batch, divides the summed loss by the global number of valid tokens,
clips, and updates. A step whose loss or gradient is not finite is skipped on every rank and counted; the schedule
follows the step number all the same, so that a run that skipped differs from one that did not by that update alone.
"""

import contextlib
import gc
import logging
import math
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan import train as stock
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.profiling import maybe_enable_memory_snapshot, maybe_enable_profiling

from ..config.job import JobConfig
from .checkpointer import CheckpointManager
from .describe import describe
from .spec import global_batch_size, register

logger = logging.getLogger(__name__)

# The stock Trainer builds its checkpointer by this name, and its autocast context by that one: `parallelize` gives
# mixed precision to fully_shard in every layout, and autocast would lower the float32 products of the operator.
stock.CheckpointManager = CheckpointManager
stock.dist_utils.maybe_enable_amp = lambda *args: contextlib.nullcontext()


class NonFiniteError(RuntimeError):
    """Training cannot go on: too many steps in a row were skipped, or the weights themselves are not finite."""


class Trainer(stock.Trainer):
    """torchtitan's Trainer for DeltaProduct; see the module docstring."""

    def __init__(self, job_config: JobConfig, snapshot: dict | None = None) -> None:
        register(job_config)
        super().__init__(job_config)
        dims = self.parallel_dims
        self.samples_per_step = global_batch_size(job_config, dims.dp_replicate * dims.dp_shard)
        self.skipped_steps = self.skipped_in_a_row = 0
        self.checkpointer.snapshot = snapshot

    @property
    def tokens_seen(self) -> int:
        """Training tokens consumed by all ranks up to the current step."""
        return self.step * self.samples_per_step * self.job_config.training.seq_len

    @record
    def train(self) -> None:
        """Runs to `training.steps` from the newest checkpoint, or from the start."""
        config = self.job_config
        loaded = self.checkpointer.load(step=config.checkpoint.load_step)
        for line in describe(self):
            logger.info(line)
        self.metrics_processor.open(self.step)
        if loaded is not None and self.step:
            logger.info("resumed at step %s of %s; data at token %s", self.step, config.training.steps,
                        f"{self.tokens_seen:,}")  # fmt: skip
        elif loaded is not None:
            logger.info("starting from the weights of %s", loaded.path)
        profiling = {"global_step": self.step, "base_folder": config.job.dump_folder}
        with (
            maybe_enable_profiling(config.profiling, **profiling) as profiler,
            maybe_enable_memory_snapshot(config.profiling, **profiling) as memory_profiler,
        ):
            if config.validation.enable and self.step == 0:
                self.validator.validate(self.model_parts, 0)
            batches = self.batch_generator(self.dataloader)
            first_step = self.step + 1
            while self.should_continue_training():
                self.step += 1
                self.gc_handler.run(self.step)
                self.train_step(batches)
                self.finish_step()
                for tool in (profiler, memory_profiler):
                    if tool:
                        tool.step()
                if self.step == first_step:
                    # Compilation and lazy initialisation are over: a hang from here on is a fault.
                    seconds = config.comm.train_timeout_seconds
                    dist_utils.set_pg_timeouts(timedelta(seconds=seconds), self.parallel_dims)
        logger.info("finished: step %d of %d", self.step, config.training.steps)

    def finish_step(self) -> None:
        """What follows the update of a step: validation when due, then a checkpoint when due.

        Validation goes first: once step s is saved, a restart begins at s + 1 and would not come back to it.
        """
        config, last = self.job_config, self.step == self.job_config.training.steps
        if config.validation.enable and self.validator.should_validate(self.step):
            self.validator.validate(self.model_parts, self.step)
        if self.checkpointer._should_save(self.step, last):
            self.refuse_non_finite_weights()
            self.checkpointer.save(self.step, last_step=last)
            self.metrics_processor.restart_clock()

    def train_step(self, data_iterator) -> None:
        """One optimizer step over one global batch."""
        self.optimizers.zero_grad()
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        microbatches, tokens = self.next_global_batch(data_iterator)
        losses = []
        for inputs, labels in microbatches:
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
            labels = labels.to(self.device, non_blocking=True)
            loss = self.forward_backward_step(input_dict=batch, labels=labels, global_valid_tokens=tokens)
            losses.append(loss.detach())
        parameters = [p for model in self.model_parts for p in model.parameters()]
        grad_norm = dist_utils.clip_grad_norm_(parameters, self.job_config.training.max_norm, foreach=True)
        loss = torch.stack(losses).sum()
        if self.parallel_dims.dp_cp_enabled:
            dist.all_reduce(loss, group=self.parallel_dims.get_mesh("loss").get_group())
        # The one wait for the device in a step: everything below decides on these two numbers.
        loss_value, norm_value = torch.stack([loss.float(), grad_norm.float()]).tolist()
        self.checkpointer.maybe_wait_for_staging()
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            self.optimizers.step()
            self.skipped_in_a_row = 0
        else:
            self.skip_step(loss_value, norm_value)
        self.lr_schedulers.step()
        self.metrics_processor.log_step(
            self.step,
            {
                "loss": loss_value,
                "grad_norm": norm_value,
                "lr": lr,
                "tokens": self.tokens_seen,
                "epoch": round(max(self.dataloader.epochs().values()), 4),
                "skipped_steps": self.skipped_steps,
            },
        )

    def next_global_batch(self, data_iterator) -> tuple[list, torch.Tensor]:
        """This rank's micro-batches, and the number of valid tokens in the whole global batch (at least 1)."""
        microbatches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        valid = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in microbatches)
        tokens = torch.tensor(float(valid), device=self.device)
        if self.parallel_dims.dp_enabled:
            dist.all_reduce(tokens, group=self.parallel_dims.get_mesh("batch").get_group())
        return microbatches, tokens.clamp(min=1.0)

    def skip_step(self, loss: float, grad_norm: float) -> None:
        """Counts a step without an update, names the first bad gradient, and stops after too many in a row."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        bad = [
            name
            for model in self.model_parts
            for name, p in model.named_parameters()
            if p.grad is not None and not local(p.grad).isfinite().all()
        ]
        where = f"; first non-finite gradient on rank {dist.get_rank()}: {bad[0]}" if bad else ""
        logger.warning(
            "step %d skipped on all ranks: loss %g, gradient norm %g (%d in a row, %d in all)%s",
            self.step, loss, grad_norm, self.skipped_in_a_row, self.skipped_steps, where,
        )  # fmt: skip
        limit = self.job_config.training.max_skipped_steps
        if self.skipped_in_a_row >= limit:
            raise NonFiniteError(
                f"{limit} steps in a row had a non-finite loss or gradient; the last good step is "
                f"{self.step - self.skipped_in_a_row}. Lower optimizer.lr or look at the data of these steps; "
                "training.max_skipped_steps sets the limit"
            )

    def refuse_non_finite_weights(self) -> None:
        """Raises NonFiniteError on all ranks if any weight on any rank is not finite, so that it is never saved."""
        norms = torch._foreach_norm([local(p) for model in self.model_parts for p in model.parameters()])
        finite = torch.stack([n.isfinite() for n in norms]).all().float()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite.item():
            raise NonFiniteError(
                f"the weights at step {self.step} are not finite and were not saved; restart to continue from "
                "the newest checkpoint, with a lower optimizer.lr or a smaller training.max_norm"
            )

    def state_dict(self) -> dict[str, int]:
        return {"version": 1, "step": self.step, "skipped_steps": self.skipped_steps,
                "skipped_in_a_row": self.skipped_in_a_row}  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.step = state_dict["step"]
        self.skipped_steps = state_dict["skipped_steps"]
        self.skipped_in_a_row = state_dict["skipped_in_a_row"]

    def close(self) -> None:
        super().close()
        # torchtitan switches the collector off for the process, and a test or a notebook lives on.
        gc.enable()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor this rank holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
