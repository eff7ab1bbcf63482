"""The optimizer in its groups, and the learning-rate schedule.

Matrices decay, everything else does not: weight decay on a norm's gain, a bias, `A_log` or `dt_bias` pulls a scale
towards zero that has no reason to be there, and on an embedding it shrinks the rows of rare words (`decays`).

Under Muon the hidden matrices have an optimizer of their own, and the rest, the head and the embedding among it, AdamW.

A checkpoint restores the moments and the step. Learning rate, betas, decay and implementation come from the config,
so that changing one of them on a restart has an effect; torchtitan's containers would put the saved ones back.
"""

import logging

import torch
from torch import Tensor, nn
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.optimizer import OptimizersContainer

from ..config.job import LRScheduler, Optimizer
from ..config.schedule import Schedule
from ..models.args import DeltaProductArgs
from ..models.counts import hidden_matrices
from ..models.init import plain_name
from ..optimizers import OPTIMIZERS, Kind

logger = logging.getLogger(__name__)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether the named parameter takes weight decay: matrices do, except embeddings (a tied head is one)."""
    return parameter.ndim == 2 and "tok_embeddings" not in name


def stacks(args: DeltaProductArgs) -> dict[str, int]:
    """Names of the hidden matrices of all layers -> how many stand in each, one below the other."""
    return {
        f"layers.{layer}.{name}.weight": count
        for layer in range(args.num_hidden_layers)
        for name, (count, _, _) in hidden_matrices(args).items()
    }


class GroupedOptimizers(OptimizersContainer):
    """torchtitan's container over parameter groups instead of one flat list.

    Args:
        model_parts: the models.
        table: `[optimizer]`.
    """

    def __init__(self, model_parts: list[nn.Module], table: Optimizer) -> None:
        # torchtitan pairs optimizers with models: one that has two of them stands there twice.
        self.model_parts, self.optimizers = [], []
        kind = OPTIMIZERS[table.name]
        for model in model_parts:
            named = [(plain_name(n), p) for n, p in model.named_parameters() if p.requires_grad]
            stacked = stacks(model.args) if kind.hidden else {}
            rest = [(name, parameter) for name, parameter in named if name not in stacked]
            self._add(model, kind, [
                {"params": [p for n, p in rest if decays(n, p)]},
                {"params": [p for n, p in rest if not decays(n, p)], "weight_decay": 0.0},
            ], table)  # fmt: skip
            if kind.hidden:
                self._add(model, kind.hidden, [
                    {"params": [p for n, p in named if stacked.get(n) == count], "stacked": count}
                    for count in sorted(set(stacked.values()))
                ], table)  # fmt: skip
        self._post_init([p for model in model_parts for p in model.parameters()], {})

    def _add(self, model: nn.Module, kind: Kind, groups: list[dict], table: Optimizer) -> None:
        self.model_parts.append(model)
        self.optimizers.append(kind.algorithm(groups, **kind.arguments(table)))
        free = sum(p.numel() for group in groups for p in group["params"] if group.get("weight_decay") == 0.0)
        whole = sum(p.numel() for group in groups for p in group["params"])
        logger.info(
            "optimizer: %s, weight decay %g on %s parameters, none on %s",
            kind.algorithm.__name__, table.weight_decay, f"{whole - free:,}", f"{free:,}",
        )  # fmt: skip

    def step(self, skip: Tensor) -> None:
        """Updates, or leaves weights, moments and their step as they are.

        Args:
            skip: [] bool, the same on all ranks. Muon and the fused implementation look at it on the device, as they
                would for torch's GradScaler; the others wait for it.
        """
        for optimizer in self.optimizers:
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                optimizer.found_inf = skip.to(optimizer.param_groups[0]["params"][0].device, torch.float32)
            elif skip:
                continue
            optimizer.step()

    def state_dict(self) -> dict:
        """The moments and steps by parameter. Settings, a dozen small objects for each, come from the config."""
        return {name: value for name, value in super().state_dict().items() if not name.startswith("param_groups.")}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores the moments; the settings of the groups stay those of the config."""
        super().load_state_dict(super().state_dict() | state_dict)


class Schedules(LRSchedulersContainer):
    """torchtitan's container, whose only state is the step: the rate of a step is a function of config and step.

    Args:
        optimizers: whose rate it sets.
        table: warm-up, perhaps a stable phase, then cosine, linear or square-root decay: see `config.schedule`.
        steps: of the training.
    """

    def __init__(self, optimizers: GroupedOptimizers, table: LRScheduler, steps: int) -> None:
        super().__init__(optimizers, Schedule.of(table, steps))

    def state_dict(self) -> dict[str, int]:
        return {"version": 1, "last_epoch": self.schedulers[0].last_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        for scheduler in self.schedulers:
            scheduler.last_epoch = state_dict["last_epoch"]
            rates = [b * f(scheduler.last_epoch) for b, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates
