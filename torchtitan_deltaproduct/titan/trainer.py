"""The Trainer: torchtitan's construction of a run, with our step and loop.

One step takes the micro-batches of a global batch, divides the summed loss by the global number of valid tokens, clips,
and updates. Gradients are reduced over ranks with the last micro-batch alone: until then every rank holds its own sum
of them unsharded, in `training.mixed_precision_reduce` (4 bytes a parameter in float32). A step whose loss or gradient
is not finite is skipped on every rank and counted; the schedule follows the step number all the same, so that a run
that skipped differs from one that did not by that update alone.

The host waits for the device once a step, for the loss and the norm, and only after the update was launched, which
finds on the device whether it is to be skipped. While the device works the host reads the next global batch (`feed`),
and with the loss ranks exchange how many tokens that one has and whether to stop (`stopping`): all end after the same
step, with a complete checkpoint.
"""

import contextlib
import gc
import logging
import math
import time
from collections import deque
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule
from torchtitan import train as stock
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools import utils
from torchtitan.tools.profiling import maybe_enable_memory_snapshot, maybe_enable_profiling

from .. import events
from ..agreement import from_rank_0
from ..config.job import JobConfig
from ..errors import NonFiniteError
from ..models.init import left_undrawn
from ..optimizers import clip_gradients, local
from .captured import CapturedStep, obstacle
from .checkpointer import CheckpointManager
from .describe import describe, resumed
from .feed import Feed, to_device, to_host
from .parallelize import lowered_weights, sequence_ranks, sum_over_ranks
from .patches import without_checkpoints_and_autocast
from .rendezvous import own_store
from .spec import register
from .spikes import LossSpikes
from .stopping import Stopping
from .watchdog import Watchdog

logger = logging.getLogger(__name__)


class Trainer(stock.Trainer):
    """torchtitan's Trainer for DeltaProduct; see the module docstring.

    Args:
        job_config: a checked config.
        snapshot: of the config, to be stored beside every checkpoint.
        stopping: where signals are noted; None: they are not.
        draw: whether to draw initial weights; not needed where a checkpoint's are loaded.
    """

    def __init__(
        self,
        job_config: JobConfig,
        snapshot: dict | None = None,
        stopping: Stopping | None = None,
        draw: bool = True,
    ) -> None:
        register(job_config)
        with without_checkpoints_and_autocast(job_config), contextlib.nullcontext() if draw else left_undrawn():
            super().__init__(job_config)
        self.drawn = draw
        dims, guard = self.parallel_dims, job_config.guard
        self.run_folder = Path(job_config.job.dump_folder)
        self.weights = lowered_weights(self.model_parts[0], job_config)
        self.captured = self.capture_steps()
        self.feed = Feed(self.dataloader, self.gradient_accumulation_steps, self.device, sequence_ranks(dims))
        self.checkpointer = CheckpointManager(
            self.feed, self.model_parts, self.optimizers, self.lr_schedulers, states={"train_state": self},
            checkpoint_config=job_config.checkpoint, sd_adapter=None, base_folder=job_config.job.dump_folder,
        )  # fmt: skip
        self.tokens_ahead: float | None = None
        self.samples_per_step = job_config.training.samples_per_step(dims.dp_replicate * dims.dp_shard)
        self.skipped_steps = self.skipped_in_a_row = 0
        self.validated_step = -1
        self.step_seconds: deque[float] = deque(maxlen=20)
        self.spikes = LossSpikes(guard.spike_threshold)
        self.stopping = stopping or Stopping()
        self.watchdog = Watchdog(self.run_folder, dist.get_rank(), guard.hang_seconds)
        self.checkpointer.snapshot, self.checkpointer.run = snapshot, self.run_folder
        if job_config.validation.enable:
            self.validator.after_batch = self.after_validation_batch

    def init_distributed(self):
        with own_store():
            return super().init_distributed()

    @property
    def tokens_seen(self) -> int:
        """Training tokens consumed by all ranks up to the current step."""
        return self.step * self.samples_per_step * self.job_config.training.seq_len

    @property
    def samples(self) -> tuple[int, int]:
        """First and last global sample index of the current step."""
        return (self.step - 1) * self.samples_per_step, self.step * self.samples_per_step - 1

    @record
    def train(self) -> str:
        """Runs to `training.steps` from the newest checkpoint, or from the start.

        Returns:
            Why it ended: `finished`, a signal's name, or `walltime`.
        """
        config = self.job_config
        self.start()
        profiling = {"global_step": self.step, "base_folder": config.job.dump_folder}
        with (
            maybe_enable_profiling(config.profiling, **profiling) as profiler,
            maybe_enable_memory_snapshot(config.profiling, **profiling) as memory_profiler,
        ):
            stop = self.agree_to_stop() or self.validate_if_due()
            if stop:
                logger.warning("stopped on %s before step %d: there was nothing new to save", stop, self.step + 1)
                return stop
            first_step = self.step + 1
            while self.should_continue_training():
                begin = time.monotonic()
                self.step += 1
                self.gc_handler.run(self.step)
                stop = self.train_step(self.feed)
                stop = self.finish_step(stop, begin, first=self.step == first_step)
                for tool in (profiler, memory_profiler):
                    if tool:
                        tool.step()
                if stop:
                    saved = "it is saved; the same command goes on from it" if self.saves else "nothing was saved"
                    logger.warning("stopped on %s after step %d: %s", stop, self.step, saved)
                    return stop
                if self.step == first_step:
                    # Asked for its state before its first update, the optimizer would make one up.
                    if self.saves and not self.skipped_in_a_row:
                        self.checkpointer.reserve()
                        self.metrics_processor.restart_clock()
                    # Compilation and lazy initialisation are over: a hang from here on is a fault.
                    seconds = config.comm.train_timeout_seconds
                    dist_utils.set_pg_timeouts(timedelta(seconds=seconds), self.parallel_dims)
        logger.info("finished: step %d of %d", self.step, config.training.steps)
        return "finished"

    @property
    def saves(self) -> bool:
        """Whether this run writes checkpoints."""
        return self.checkpointer.enable and not self.checkpointer.load_only

    def start(self) -> None:
        """Loads, says what there is, and opens the run's files."""
        config, guard, ranks = self.job_config, self.job_config.guard, dist.get_world_size()
        loaded = self.checkpointer.load(step=config.checkpoint.load_step)
        if loaded is None and not self.drawn:
            # The checkpoint that was there as the launch began is gone.
            for model in self.model_parts:
                model.init_weights()
        for line in describe(self):
            logger.info(line)
        if line := self.stopping.set_walltime(guard.walltime_minutes, guard.walltime_margin_seconds):
            logger.info(line)
        # Only rank 0 writes, and only it reads what was written.
        past = events.read_events(self.run_folder) if dist.get_rank() == 0 else []
        began = events.began([*past, {"event": "launch", "step": self.step, "time": time.time()}])
        # The records of a launch that saves nothing are of a try-out: those of the run are put aside until it goes on.
        saved_at = loaded.marker.time if loaded and self.saves else -math.inf if loaded else math.inf
        self.metrics_processor.open(self.step, saved_at, began)
        validated = from_rank_0(lambda: self.metrics_processor.has_validation(self.step))
        self.validated_step = self.step if validated else -1
        if loaded is not None and self.step:
            logger.info(resumed(loaded, past, ranks, self.step, config.training.steps, self.tokens_seen))
        elif loaded is not None:
            logger.info("starting from the weights of %s", loaded.path)
        if dist.get_rank() == 0:
            events.append(self.run_folder, "launch", step=self.step, ranks=ranks, **events.whereabouts())
        self.watchdog.start(self.step)

    def finish_step(self, stop: str | None, begin: float, first: bool) -> str | None:
        """What follows the update of a step: validation when due, then a checkpoint when due.

        Validation goes first: once step s is saved, a restart begins at s + 1. A run that has to stop leaves it out, or
        breaks it off, and the restart makes up for it.

        Args:
            stop: why the run has to stop, or None.
            begin: when the step began, by the monotonic clock.
            first: of this launch: its duration says nothing about the next.

        Returns:
            `stop`, or the reason found during validation.
        """
        last = self.step == self.job_config.training.steps
        self.watchdog.beat(self.step, "step")
        stop = stop or self.validate_if_due()
        if not first:
            self.step_seconds.append(time.monotonic() - begin)
        if self.saves and (stop or self.checkpointer.due(self.step, last)):
            self.refuse_non_finite_weights()
            self.checkpointer.save(self.step, last_step=last, reason=stop or "")
            self.watchdog.beat(self.step, "save")
            self.metrics_processor.restart_clock()
        return stop

    def validate_if_due(self) -> str | None:
        """Validates the current step unless that was done before; returns why to stop if that broke it off."""
        due = self.job_config.validation.enable and self.validator.should_validate(self.step)
        if not due or self.validated_step == self.step:
            return None
        with self.weights:
            stop = self.validator.validate(self.model_parts, self.step)
        if not stop:
            self.validated_step = self.step
            if self.saves:
                self.checkpointer.note_validation(self.step, self.validator.last["loss"])
        return stop

    def after_validation_batch(self) -> str | None:
        """Called by the validator after each batch, on all ranks."""
        self.watchdog.beat(self.step, "validation batch")
        return self.agree_to_stop()

    def agree_to_stop(self) -> str | None:
        """Why to stop, if any rank wants to; the same answer on all ranks, which must all ask."""
        flags = self.numbers(self.stop_flags())
        dist.all_reduce(flags)
        return Stopping.reason(flags.tolist())

    def numbers(self, values: list[float]) -> torch.Tensor:
        """[n] float64 on the device, without a wait."""
        return to_device(torch.tensor(values, dtype=torch.float64), self.device)

    def stop_flags(self) -> list[float]:
        return self.stopping.flags(max(self.step_seconds, default=0.0), self.checkpointer.save_seconds)

    def train_step(self, feed: Feed) -> str | None:
        """One optimizer step over one global batch; returns why to stop after it, the same on all ranks."""
        step = self.captured or self.forward_backward_step
        (self.captured or self.optimizers).zero_grad()
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        microbatches, tokens = self.next_global_batch(feed)
        loss = torch.zeros(1, dtype=torch.float64, device=self.device)
        with self.weights:
            for i, (inputs, labels) in enumerate(microbatches):
                reduce_gradients(self.model_parts, i == len(microbatches) - 1)
                loss += step(input_dict=inputs, labels=labels, global_valid_tokens=tokens)
        parameters = [p for model in self.model_parts for p in model.parameters()]
        grad_norm = clip_gradients(parameters, self.job_config.training.max_norm).to(self.device)
        ahead = self.read_ahead(feed)
        others = self.numbers([*self.stop_flags(), ahead])
        totals = sum_over_ranks(torch.cat([loss, grad_norm.double().view(1), others]), self.parallel_dims)
        # The norm is summed for this alone: ranks that skipped and ranks that did not would never agree again.
        skip = ~totals[:2].isfinite().all()
        totals[1] = grad_norm
        numbers = to_host(torch.cat([totals, skip.view(1)]))
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.step(skip)
        loss_value, norm_value, *flags, self.tokens_ahead, skipped = numbers()
        if skipped:
            self.skip_step(loss_value, norm_value)
        else:
            self.skipped_in_a_row = 0
            self.look_for_spike(loss_value)
        self.lr_schedulers.step()
        self.metrics_processor.log_step(
            self.step,
            {
                "loss": loss_value,
                "grad_norm": norm_value,
                "lr": lr,
                "tokens": self.tokens_seen,
                "epoch": round(max(feed.epochs().values()), 4),
                "skipped_steps": self.skipped_steps,
                "failed_saves": self.checkpointer.failed_saves,
            },
        )
        return Stopping.reason(flags)

    def look_for_spike(self, loss: float) -> None:
        """Reports a loss far above the recent ones, with the samples it came from."""
        spike = self.spikes.observe(loss)
        if spike:
            first, last = self.samples
            logger.warning("step %d: %s; samples %d to %d, shown by: python -m torchtitan_deltaproduct.data.show_batch "
                           "%s --step %d", self.step, spike, first, last, self.run_folder, self.step)  # fmt: skip
            if dist.get_rank() == 0:
                events.append(self.run_folder, "loss_spike", step=self.step, loss=loss, samples=[first, last])

    def forward_backward_step(
        self, *, input_dict: dict, labels: torch.Tensor, global_valid_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Adds to the gradients what a micro-batch contributes.

        Args:
            input_dict: of the model, on the device.
            labels: [B, T].
            global_valid_tokens: [] float32 on the device.

        Returns:
            The loss of the micro-batch over the tokens of its global batch, [] on the device.
        """
        inputs = {name: tensor for name, tensor in input_dict.items() if name != "input"}
        loss = self.model_parts[0](input_dict["input"], **inputs, labels=labels) / global_valid_tokens
        loss.backward()
        self.weights.collect()
        return loss.detach()

    def capture_steps(self) -> CapturedStep | None:
        """What launches a micro-batch as one CUDA graph, where it can and is to."""
        card = utils.device_module.get_device_properties(utils.device_module.current_device()).total_memory
        reason = obstacle(self.job_config, self.device, dist.get_world_size(), card)
        if self.device.type == "cuda":
            logger.info("a micro-batch: %s", f"launched kernel by kernel ({reason})" if reason else "one CUDA graph")
        return None if reason else CapturedStep(self.forward_backward_step, self.model_parts[0].parameters())

    def next_global_batch(self, feed: Feed) -> tuple[list, torch.Tensor]:
        """This rank's micro-batches, and the number of valid tokens in the whole global batch (at least 1): [] float32
        on the device, since a graph would keep a number of the host's for ever."""
        microbatches = feed.take()
        self.metrics_processor.ntokens_since_last_log += sum(labels.numel() for _, labels in microbatches)
        if self.tokens_ahead is None:
            # The first step of a launch: every later one was counted by the one before it.
            tokens = sum_over_ranks(self.numbers([feed.labels]), self.parallel_dims).tolist()
            self.metrics_processor.data_loading_times.append(feed.seconds)
        else:
            tokens = [self.tokens_ahead]
        return microbatches, to_device(torch.tensor(max(1.0, tokens[0])), self.device)

    def read_ahead(self, feed: Feed) -> int:
        """Reads the next step's batch if there is to be one; returns its labels on this rank."""
        if not self.should_continue_training():
            return 0
        feed.read_ahead()
        self.metrics_processor.data_loading_times.append(feed.seconds)
        return feed.labels

    def skip_step(self, loss: float, grad_norm: float) -> None:
        """Counts a step without an update, names the first bad gradient, and stops after too many in a row."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        named = (pair for model in self.model_parts for pair in model.named_parameters())
        bad = next((name for name, p in named if p.grad is not None and not local(p.grad).isfinite().all()), None)
        where = f"; first non-finite gradient on rank {dist.get_rank()}: {bad}" if bad else ""
        first, last = self.samples
        logger.warning(
            "step %d skipped on all ranks: loss %g, gradient norm %g, samples %d to %d (%d in a row, %d in all)%s",
            self.step, loss, grad_norm, first, last, self.skipped_in_a_row, self.skipped_steps, where,
        )  # fmt: skip
        if dist.get_rank() == 0:
            events.append(self.run_folder, "skipped_step", step=self.step, samples=[first, last])
        # A save of an optimizer that has made no update yet makes its state up, but not where there are gradients.
        self.optimizers.zero_grad()
        limit = self.job_config.training.max_skipped_steps
        if self.skipped_in_a_row >= limit:
            raise NonFiniteError(
                f"{limit} steps in a row had a non-finite loss or gradient; the last good step is "
                f"{self.step - self.skipped_in_a_row}\n"
                "lower optimizer.lr or look at the data of these steps; training.max_skipped_steps sets the limit"
            )

    def refuse_non_finite_weights(self) -> None:
        """Raises NonFiniteError on all ranks if any weight on any rank is not finite, so that it is never saved."""
        norms = torch._foreach_norm([local(p) for model in self.model_parts for p in model.parameters()])
        finite = torch.stack([n.isfinite() for n in norms]).all().float()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite.item():
            raise NonFiniteError(
                f"the weights at step {self.step} are not finite and were not saved\n"
                "restart to continue from the newest checkpoint, with a lower optimizer.lr or training.max_norm"
            )

    def state_dict(self) -> dict:
        return {"version": 2, "step": self.step, "skipped_steps": self.skipped_steps,
                "skipped_in_a_row": self.skipped_in_a_row, "spikes": self.spikes.state_dict()}  # fmt: skip

    def load_state_dict(self, state_dict: dict) -> None:
        self.step = state_dict["step"]
        self.skipped_steps = state_dict["skipped_steps"]
        self.skipped_in_a_row = state_dict["skipped_in_a_row"]
        self.spikes.load_state_dict(state_dict["spikes"])

    def close(self) -> None:
        self.watchdog.close()
        self.feed.close()
        super().close()
        # torchtitan switches the collector off for the process, and a test or a notebook lives on.
        gc.enable()


def reduce_gradients(model_parts: list[nn.Module], now: bool) -> None:
    """Makes the next backward pass reduce gradients over ranks (`now`), or only add to the sum that this rank holds."""
    for model in model_parts:
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(now)
