"""The DeltaProduct language model.

    model = DeltaProductLM(DeltaProductArgs(hidden_size=256, num_hidden_layers=4, num_heads=4, head_dim=64))
    model.init_weights()
    logits = model(tokens)                          # [B, T] int64 -> [B, T, vocab]
    loss = model(tokens, labels=labels)             # summed over the tokens with a label; makes no [B, T, vocab]

Parameters hold no values until `init_weights` or a checkpoint fills them. A tied head has no module and no
parameter of its own: `output` is None and the head multiplies by `tok_embeddings.weight`. With one parameter
there is no tie that `to_empty`, sharding or a checkpoint could lose; under FSDP it must stay in the root's
group, where both uses see it gathered.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import SequenceRanks
from .args import DeltaProductArgs
from .block import Block
from .embedding import Embedding
from .init import init_parameters
from .loss import linear_cross_entropy


class Head(nn.Linear):
    """An untied head. With labels, its forward is the loss: FSDP gathers the weight for that call alone."""

    def forward(self, x: Tensor, labels: Tensor | None = None, backend: str | None = None) -> Tensor:
        """[..., hidden] -> [..., vocab], or the summed loss; see `linear_cross_entropy`."""
        if labels is None:
            return super().forward(x)
        return linear_cross_entropy(x, self.weight, labels, backend=backend)


class DeltaProductLM(nn.Module):
    """Embedding, blocks, norm and head. `layers` is keyed "0", "1", ... as torchtitan expects.

    Args:
        args: the architecture.
        seed: of the initial weights; see `init_weights`.

    Attributes:
        loss_backend: of torch.compile for the loss; None: it runs in eager mode.

    Raises:
        ValueError: `head_dim * expand_v` is not a whole number.
    """

    def __init__(self, args: DeltaProductArgs, seed: int = 42):
        super().__init__()
        if not args.has_whole_values:
            raise ValueError(f"head_dim * expand_v = {args.head_dim} * {args.expand_v} is not a whole number")
        self.args = args
        self.seed = seed
        self.loss_backend: str | None = None
        self.tok_embeddings = Embedding(args.vocab_size, args.hidden_size)
        self.layers = nn.ModuleDict({str(i): Block(args) for i in range(args.num_hidden_layers)})
        self.norm = nn.RMSNorm(args.hidden_size, args.norm_eps)
        tied = args.tie_word_embeddings
        self.output = None if tied else Head(args.hidden_size, args.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        document_starts: Tensor | None = None,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits, or with `labels` the loss.

        Args:
            tokens: [B, T] int64.
            document_starts: [B, T] bool, True at the first token of each document; every row starts one. The
                recurrent and convolution states are reset there. None: each row is one document.
            labels: [B, T] int64, -100 where nothing is asked.
            positions: [B, T] int32, in the place of document_starts: the index of each token in its document, which may
                have begun on another rank (`spread_over`).

        Returns:
            [B, T, vocab] in the model's dtype; with `labels`, the summed cross-entropy, [] float32.
        """
        if document_starts is not None:
            positions = document_positions(document_starts)
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            decay = layer.mixer.decay() if self.args.use_forget_gate else None
            x = layer(x, decay, positions)
        return self.head(x) if labels is None else self.loss(x, labels)

    def head(self, x: Tensor) -> Tensor:
        """Final norm and head: [..., hidden] -> [..., vocab]."""
        x = self.norm(x)
        return F.linear(x, self.tok_embeddings.weight) if self.output is None else self.output(x)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Final norm, head and cross-entropy: [B, T, hidden] and [B, T] -> the sum over the labels."""
        x = self.norm(x)
        if self.output is None:
            return linear_cross_entropy(x, self.tok_embeddings.weight, labels, backend=self.loss_backend)
        return self.output(x, labels, self.loss_backend)

    def spread_over(self, ranks: SequenceRanks) -> None:
        """Context parallelism: from now on every rank of `ranks` is given its part of each row, in their order."""
        for block in self.layers.values():
            block.mixer.ranks = ranks

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Fills every parameter from `self.seed`, with the same values whether sharded or not.

        There are no buffers; `buffer_device` is torchtitan's argument and has no effect.
        """
        init_parameters(self, self.args, self.seed)


def document_positions(document_starts: Tensor) -> Tensor:
    """Index of each token in its document [B, T] int32, on the device and without waiting for it.

    Args:
        document_starts: [B, T] bool; the first token of each row counts as a start.
    """
    index = torch.arange(document_starts.shape[1], device=document_starts.device, dtype=torch.int32)
    return index - torch.where(document_starts, index, 0).cummax(1).values
