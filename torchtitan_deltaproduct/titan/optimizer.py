"""The optimizer in two groups, and the learning-rate schedule.

Matrices decay, everything else does not: weight decay on a norm's gain, a bias, `A_log` or `dt_bias` pulls a scale
towards zero that has no reason to be there, and on an embedding it shrinks the rows of rare words (`decays`).

A checkpoint restores the moments and the step. Learning rate, betas, decay and implementation come from the config,
so that changing one of them on a restart has an effect; torchtitan's containers would put the saved ones back.
"""

import logging

import torch
from torch import Tensor, nn
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import LRScheduler
from torchtitan.distributed import ParallelDims

from ..config.job import Optimizer
from ..config.schedule import Schedule
from ..optimizers import OPTIMIZERS

logger = logging.getLogger(__name__)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether the named parameter takes weight decay: matrices do, except embeddings (a tied head is one)."""
    return parameter.ndim == 2 and "tok_embeddings" not in name


class TwoGroupOptimizers(OptimizersContainer):
    """torchtitan's container over parameter groups instead of one flat list."""

    def __init__(self, model_parts: list[nn.Module], optimizer_cls: type, optimizer_kwargs: dict) -> None:
        self.model_parts = model_parts
        self.optimizers = []
        for model in model_parts:
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for n, p in named if decays(n, p)]},
                {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
            ]
            self.optimizers.append(optimizer_cls(groups, **optimizer_kwargs))
            counts = [sum(p.numel() for p in group["params"]) for group in groups]
            logger.info(
                "optimizer: %s, weight decay %g on %s parameters, none on %s",
                optimizer_cls.__name__, optimizer_kwargs["weight_decay"], f"{counts[0]:,}", f"{counts[1]:,}",
            )  # fmt: skip
        self._post_init([p for model in model_parts for p in model.parameters()], optimizer_kwargs)

    def step(self, skip: Tensor) -> None:
        """Updates, or leaves weights, moments and their step as they are.

        Args:
            skip: [] bool, the same on all ranks. The fused implementation looks at it on the device, as it does for
                torch's GradScaler; the others wait for it.
        """
        for optimizer in self.optimizers:
            group = optimizer.param_groups[0]
            if group.get("fused"):
                optimizer.found_inf = skip.to(group["params"][0].device, torch.float32)
            elif skip:
                continue
            optimizer.step()

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores the moments; the settings of the groups stay those of the config."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        super().load_state_dict(state_dict)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, values in zip(groups, settings, strict=True):
            group.update(values)


class Schedules(LRSchedulersContainer):
    """torchtitan's container, whose only state is the step: the rate of a step is a function of config and step."""

    def state_dict(self) -> dict[str, int]:
        return {"version": 1, "last_epoch": self.schedulers[0].last_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        for scheduler in self.schedulers:
            scheduler.last_epoch = state_dict["last_epoch"]
            rates = [b * f(scheduler.last_epoch) for b, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates


def build_lr_schedulers(optimizers: TwoGroupOptimizers, config: LRScheduler, training_steps: int) -> Schedules:
    """Warm-up, then cosine, linear or square-root decay, or warm-up-stable-decay: see `config.schedule`."""
    return Schedules(optimizers, Schedule.of(config, training_steps))


def build_optimizers(
    model_parts: list[nn.Module], config: Optimizer, parallel_dims: ParallelDims
) -> TwoGroupOptimizers:
    """The optimizer `config` names, over the parameters of `model_parts`."""
    kind = OPTIMIZERS[config.name]
    return TwoGroupOptimizers(model_parts, kind.algorithm, kind.arguments(config))
