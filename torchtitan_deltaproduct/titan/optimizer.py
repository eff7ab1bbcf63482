"""AdamW in two groups: matrices decay, everything else does not.

Weight decay on a norm's gain, a bias, `A_log` or `dt_bias` pulls a scale towards zero that has no reason to be there,
and on an embedding it shrinks the rows of rare words; see `decays` for the rule.
"""

import logging

from torch import nn
from torch.optim import Adam, AdamW
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils

from ..config.job import Optimizer

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


def build_optimizers(
    model_parts: list[nn.Module], config: Optimizer, parallel_dims: ParallelDims
) -> TwoGroupOptimizers:
    """The optimizer `config` names, over the parameters of `model_parts`."""
    implementation = config.implementation
    if implementation == "auto":
        implementation = "fused" if utils.device_type == "cuda" else "foreach"
    kwargs = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "fused": implementation == "fused",
        "foreach": implementation == "foreach",
    }
    return TwoGroupOptimizers(model_parts, {"Adam": Adam, "AdamW": AdamW}[config.name], kwargs)
