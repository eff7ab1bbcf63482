"""What a run tells: one `metrics.jsonl` record a step; every `log_freq` steps a console line, TensorBoard and wandb.

    {"step": 20, "loss": 5.1, "lr": 0.0003, "grad_norm": 0.8, "tokens": 327680, "tokens_per_second": 9000.0, ...}
    {"step": 20, "validation_loss": 5.2, "validation_bits_per_byte": 1.9, "validation_perplexity": 181.3, ...}
    {"step": 20, "validation_loss": 0.1, "validation_token_accuracy": 0.97, "validation_token_accuracy_128": 0.8, ...}

`metrics.jsonl`, `samples.jsonl` (what the model says to `validation.prompts`) and the TensorBoard folder belong to the
run, not to a launch: on a restart they read as if the run had never stopped (`records`).
"""

import contextlib
import logging
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchtitan.components import metrics as stock
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils

from ..config.job import JobConfig
from ..config.values import flatten, shorten
from ..files import utf8_path
from ..formats import clock
from ..history import ends, of_a_step
from .records import RecordFile, restore_history

logger = logging.getLogger(__name__)


class TensorBoard(stock.BaseLogger):
    """Scalars in one folder across restarts; `purge_step` hides what a killed run wrote past the resumed step.

    The library's writer dies with its first failed write, on a full disk say. It is made anew some steps later.
    """

    RETRY = 100
    """Steps between tries."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.retry_at, self.writer = folder, 0, None
        self.purge_step = step + 1 if step else 0
        self.kept_open = contextlib.ExitStack()
        self.log({}, step)

    def log(self, metrics: dict, step: int) -> None:
        self.write(lambda writer: [writer.add_scalar(name, value, step) for name, value in metrics.items()], step)

    def log_texts(self, texts: dict[str, str], step: int) -> None:
        """Texts as they are; TensorBoard takes them for Markdown, in which four spaces begin a block of code."""
        code = {name: textwrap.indent(text, "    ", lambda line: True) for name, text in texts.items()}
        self.write(lambda writer: [writer.add_text(name, text, step) for name, text in code.items()], step)

    def log_settings(self, settings: dict[str, bool | int | float | str], step: int) -> None:
        """Settings for the page HPARAMS, which puts the runs of a folder beside each other with their losses."""
        about, session, _ = hparams(settings, dict.fromkeys(("loss", "validation_loss"), 0.0))
        # `SummaryWriter.add_hparams` would open a second folder.
        self.write(lambda writer: [writer.file_writer.add_summary(part) for part in (about, session)], step)

    def write(self, action: Callable[[SummaryWriter], object], step: int) -> None:
        """Lets `action` use the library's writer."""
        if self.writer is None and step < self.retry_at:
            return
        try:
            self.writer = self.writer or self.open()
            action(self.writer)
        except OSError as error:
            logger.warning("TensorBoard's files in %s cannot be written (%s)", self.folder, error)
            self.writer, self.retry_at = None, step + self.RETRY

    def open(self) -> SummaryWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        writer = SummaryWriter(self.kept_open.enter_context(utf8_path(self.folder)), purge_step=self.purge_step)
        # Only the first one hides what is there.
        self.purge_step = None
        return writer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self.writer is not None:
                self.writer.close()
        self.kept_open.close()


LEARNED = ("model", "data", "training", "optimizer", "lr_scheduler")
"""Tables of the settings that decide what is learned."""


def hyperparameters(config: JobConfig) -> dict[str, bool | int | float | str]:
    """The settings that decide what is learned, by their full names; lists as text, what is unset left out."""
    tables = {name: asdict(getattr(config, name)) for name in LEARNED}
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in flatten(tables).items()
        if value is not None and value != []
    }


def wandb_logger(job_config: JobConfig, folder: Path) -> stock.BaseLogger:
    """torchtitan's wandb logger, continuing the run whose id is kept in `folder/wandb_id`; named after the folder."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(os.environ.get("WANDB_RUN_ID") or os.urandom(4).hex(), encoding="utf-8")
    os.environ["WANDB_RUN_ID"] = path.read_text(encoding="utf-8").strip()
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_PROJECT", "torchtitan-deltaproduct")
    os.environ.setdefault("WANDB_RUN_NAME", "/".join(folder.resolve().parts[-2:]))
    return stock.WandBLogger(str(folder), job_config)


class MetricsProcessor(stock.MetricsProcessor):
    """Collects a step's numbers and writes them; only rank 0 writes. Call `open(step)` once the step is known."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        # The parent's __init__ would open a TensorBoard folder named after the minute of the launch.
        self.job_config = job_config
        self.parallel_dims = parallel_dims
        self.logger = stock.LoggerContainer()
        plain = job_config.metrics.disable_color_printing or not sys.stdout.isatty()
        self.color = utils.NoColor() if plain else utils.Color()
        self.device_memory_monitor = stock.build_device_memory_monitor()
        name = self.device_memory_monitor.device_name
        self.gpu_peak_flops = job_config.metrics.peak_flops or utils.get_peak_flops(name)
        self.num_flops_per_token = -1
        self.ntokens_since_last_log = 0
        self.data_loading_times: list[float] = []
        self.is_writer = torch.distributed.get_rank() == 0
        self.records = self.samples = self.tensorboard = None
        self.eta_rate = None
        self.retries = 0
        self.began = time.time()
        self.best_speed: float | None = None

    def open(self, step: int, saved_at: float = math.inf, began: float | None = None) -> None:
        """Opens the run's files to continue after `step`, of a checkpoint `saved_at`, and starts the clock.

        Args:
            step: optimizer steps taken.
            saved_at: in seconds since 1970.
            began: when the run was launched for the first time; None: now.
        """
        self.began = began or time.time()
        folder = Path(self.job_config.job.dump_folder)
        if self.is_writer:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            if moved := restore_history(path, step, saved_at):
                logger.warning("%s", moved)
            self.records = RecordFile(path)
            if self.job_config.validation.prompts:
                path = folder / "samples.jsonl"
                if moved := restore_history(path, step, saved_at, redone=not self.has_validation(step)):
                    logger.warning("%s", moved)
                self.samples = RecordFile(path)
            if self.job_config.metrics.enable_tensorboard:
                self.tensorboard = TensorBoard(folder / self.job_config.metrics.save_tb_folder, step)
                self.tensorboard.log_settings(hyperparameters(self.job_config), step)
                self.logger.add_logger(self.tensorboard)
            if self.job_config.metrics.enable_wandb:
                self.logger.add_logger(wandb_logger(self.job_config, folder))
        self.restart_clock()

    def has_validation(self, step: int) -> bool:
        """Whether this step was validated before, by the run's own record; False on other ranks than 0."""
        # The file ends with this step: `open` brought it there.
        newest = ends(Path(self.job_config.job.dump_folder, "metrics.jsonl"), head=0) if self.is_writer else []
        return any(r["step"] == step and "validation_loss" in r for r in newest if of_a_step(r))

    def restart_clock(self) -> None:
        """Leaves what happened since the last record (validation, a save) out of the next one's speed."""
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.time_last_log = time.perf_counter()

    def should_log(self, step: int) -> bool:
        """Whether a step has a console line: the first, every `log_freq`-th and the last."""
        return super().should_log(step) or step == self.job_config.training.steps

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """Adds speed and memory to one step's `values` and writes the record; the console line when it is due."""
        peak = self.peak_memory(step)
        if not self.is_writer:
            self.restart_clock()
            return
        seconds = max(time.perf_counter() - self.time_last_log, 1e-9)
        # The loader counts this rank's tokens; every rank has as many.
        ranks = self.parallel_dims.world_size
        speed = self.ntokens_since_last_log * ranks / seconds
        values = values | {
            "tokens_per_second": round(speed, 1),
            "seconds": round(seconds, 4),
            "data_seconds": round(sum(self.data_loading_times), 4),
            "memory_gib": round(peak / 2**30, 3),
        }
        if self.gpu_peak_flops:
            values["mfu"] = self.num_flops_per_token * speed / (ranks * self.gpu_peak_flops)
        if self.best_speed is not None:
            self.best_speed = max(self.best_speed, speed)
            values["goodput"] = round(values["tokens"] / self.best_speed / max(time.time() - self.began, 1e-9), 4)
            # A slow average, for the ETA.
            self.eta_rate = seconds if self.eta_rate is None else 0.95 * self.eta_rate + 0.05 * seconds
        else:
            # The first step of a launch compiles: it does not show what this machine can do.
            self.best_speed = 0.0
        self.write(step, values)
        if self.should_log(step):
            logger.info(self.step_line(step, values))
        self.restart_clock()

    def peak_memory(self, step: int) -> int:
        """The most memory that this rank's allocator had reserved, in bytes; where a console line is due, it says
        whether that was short."""
        stats = stock.device_module.memory_stats(self.device_memory_monitor.device)
        retries = stats.get("num_alloc_retries", 0)
        if self.should_log(step) and retries > self.retries:
            logger.warning("memory is short: %d allocations so far had to wait until the cache was freed", retries)
            self.retries = retries
        return stats.get("reserved_bytes.all.peak", 0)

    def step_line(self, step: int, values: dict[str, float]) -> str:
        """The console line of one step."""
        c, total = self.color, self.job_config.training.steps
        eta = "" if self.eta_rate is None else f"  eta {clock(self.eta_rate * (total - step))}"
        mfu = f"  {c.magenta}mfu {100 * values['mfu']:.1f}%" if "mfu" in values else ""
        return (
            f"{c.red}step {step:>{len(str(total))}}/{total}  {c.green}loss {values['loss']:7.4f}  "
            f"{c.orange}grad_norm {values['grad_norm']:6.3f}  {c.reset}lr {values['lr']:.2e}  "
            f"{c.blue}tok/s {values['tokens_per_second']:,.0f}{mfu}  "
            f"{c.turquoise}mem {values['memory_gib']:.2f} GiB{c.reset}{eta}"
        )

    def log_validation(self, step: int, values: dict[str, float], summary: str) -> None:
        """Writes a validation record and its console line; `values` without the `validation_` prefix."""
        self.write(step, {f"validation_{name}": value for name, value in values.items()})
        c = self.color
        logger.info(
            f"{c.yellow}validation at step {step}  {c.green}loss {values['loss']:.4f}  "
            f"{c.reset}{summary}  ({values['tokens']:,.0f} tokens in {values['seconds']:.1f} s)"
        )
        self.restart_clock()

    def log_samples(self, step: int, samples: list[dict[str, int | str]]) -> None:
        """Writes what the model says at a step to samples.jsonl and TensorBoard, and the beginnings to the console."""
        for sample in samples if self.is_writer else []:
            self.samples.write(sample | {"time": round(time.time(), 3)})
            prompt, text = repr(sample["prompt"]), repr(sample["text"])
            logger.info(f"sample at step {step}, {sample['mode']}: {shorten(prompt, 24)} -> {shorten(text, 60)}")
        if self.tensorboard is not None:
            texts = {f"samples/{i}_{s['mode']}": f"{s['prompt']}{s['text']}" for i, s in enumerate(samples)}
            self.tensorboard.log_texts(texts, step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One record to metrics.jsonl, and every `log_freq` steps to TensorBoard and wandb (rank 0)."""
        if not self.is_writer:
            return
        # NaN is not JSON: a record of a skipped step carries null.
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        lost = {"lost_records": self.records.lost} if self.records.lost else {}
        self.records.write({"step": step} | finite | lost | {"time": round(time.time(), 3)})
        # Validation whenever there is one; of the steps those with a console line.
        if "loss" not in values or self.should_log(step):
            self.logger.log({k: v for k, v in values.items() if math.isfinite(v)}, step)

    def close(self) -> None:
        self.logger.close()
        for file in filter(None, (self.records, self.samples)):
            file.close()
