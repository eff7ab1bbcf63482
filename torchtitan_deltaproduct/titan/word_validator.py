"""Accuracy on held-out words of a group or a formal language, at the length of training and at longer ones.

    {"step": 400, "validation_loss": 0.003, "validation_token_accuracy": 0.999, "validation_prefix_accuracy": 0.99,
     "validation_sequence_accuracy": 0.98, "validation_loss_128": 0.02, "validation_token_accuracy_128": 0.995, ...}

Only positions with a label count; there is no start token. An answer is the largest of all logits. Formal languages
have one answer a row, hence `accuracy` and `scaled_accuracy`, (accuracy - chance) / (1 - chance): 0 is guessing.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.tools import utils

from ..config.job import JobConfig
from ..data.held_out import HeldOut, held_out_lengths
from ..models.loss import IGNORE_INDEX
from ..ops import SequenceRanks
from ..ops.ranks import gather
from .parallelize import sum_over_ranks
from .validator import HeldOutValidator


def count_right(logits: torch.Tensor, labels: torch.Tensor, ranks: SequenceRanks | None = None) -> torch.Tensor:
    """What the accuracies of a batch are made of.

    Args:
        logits: [B, T, vocab].
        labels: [B, T] int64, -100 where nothing is asked.
        ranks: that have the other parts of the rows. The first of them counts whole rows, the others nothing.

    Returns:
        [5] float64 on the CPU: scored positions; right ones; those up to which all of the row are right; rows with
        a scored position; rows all right.
    """
    scored = labels != IGNORE_INDEX
    wrong = scored & (logits.argmax(-1) != labels)
    if ranks is not None:
        parts = gather(torch.stack([scored, wrong]).byte(), ranks.size, ranks.group)
        scored, wrong = parts.bool().permute(1, 2, 0, 3).flatten(2)
        scored, wrong = scored & (ranks.rank == 0), wrong & (ranks.rank == 0)
    unbroken = scored & (wrong.cumsum(1) == 0)
    rows = scored.any(1)
    counts = [scored.sum(), (scored & ~wrong).sum(), unbroken.sum(), rows.sum(), (rows & ~wrong.any(1)).sum()]
    return torch.stack(counts).double().cpu()


class WordValidator(HeldOutValidator):
    """Loss (nats per answer) and accuracies; those of a longer length L end in `_L`."""

    def __init__(self, job_config: JobConfig, **given) -> None:
        super().__init__(job_config, **given)
        config = job_config.validation
        self.loaders = held_out_lengths(
            job_config.data,
            seq_len=job_config.training.seq_len,
            lengths=config.lengths,
            local_batch_size=config.local_batch_size,
            samples=config.samples,
            dp_rank=self.dp_rank,
            dp_world_size=self.dp_world_size,
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The measures of `measure` at the length of training, then with the length as suffix at each other one."""
        values = {}
        for length, loader in self.loaders.items():
            suffix = f"_{length}" if length else ""
            values |= {name + suffix: value for name, value in self.measure(model, loader).items()}
        return values

    def measure(self, model: nn.Module, loader: HeldOut) -> dict[str, float]:
        """Loss and accuracies at one length, over all ranks.

        `token_accuracy`: share of scored positions answered right. `prefix_accuracy`: share of scored positions up to
        which, itself included, every answer of the word is right. `sequence_accuracy`: share of words all right.
        """
        totals = torch.zeros(6, dtype=torch.float64)
        for batch, labels in self.batches(loader):
            logits = model(batch.pop("input"), **batch).float()
            totals[0] += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            totals[1:] += count_right(logits, labels, self.ranks)
        totals = sum_over_ranks(totals.to(utils.device_type), self.parallel_dims)
        loss, tokens, right, unbroken, rows, rows_right = totals.tolist()
        values = {"loss": loss / tokens}
        if self.job_config.data.kind == "formal_language":
            accuracy, chance = right / tokens, loader.source.chance
            values |= {"accuracy": accuracy, "scaled_accuracy": (accuracy - chance) / (1 - chance)}
        else:
            values |= {
                "token_accuracy": right / tokens,
                "prefix_accuracy": unbroken / tokens,
                "sequence_accuracy": rows_right / rows,
            }
        return values | {"tokens": tokens}

    def summary(self, values: dict[str, float]) -> str:
        """`accuracy 0.9990 token 0.9950 prefix 0.9800 sequence; at 128: 0.9512 0.6630 0.2441`."""
        if self.job_config.data.kind == "formal_language":
            labels = {"accuracy": "accuracy", "scaled_accuracy": "scaled"}
        else:
            labels = {f"{name}_accuracy": name for name in ("token", "prefix", "sequence")}
        parts = ["accuracy: " + "  ".join(f"{label} {values[name]:.4f}" for name, label in labels.items())]
        for length in filter(None, self.loaders):
            parts.append(f"at {length:,}: " + "  ".join(f"{values[f'{name}_{length}']:.4f}" for name in labels))
        return "; ".join(parts)

    def describe(self) -> str:
        longer = ", ".join(f"{length:,}" for length in self.loaders if length)
        return self.loaders[0].describe() + (f"; also at {longer} tokens" if longer else "")
