"""What a model says while it trains: continuations of `validation.prompts` at each validation.

    {"step": 500, "prompt": "def main(", "mode": "greedy", "text": "self):\\n ...", "time": 1764000000.0}

is a line of RUN/samples.jsonl; `mode` is `greedy` or `sampled` (temperature 1, from a seed that is the step, so that a
resumed run says the same). All ranks gather the whole weights for it, in the compute type, and decode alike, from
cached states and outside of compiled code. Training's random numbers are not touched.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..data.shards.shards import TokenStream
from ..data.text.tokenizer import load_tokenizer
from ..models.decode import init_cache, join, prefill, step

MODES = ("greedy", "sampled")


class Samples:
    """Continues some prompts.

    Args:
        prompts: texts; an empty one stands for the beginning of a document.
        tokens: the most to add to each.
        data: whose tokenizer and separator are used.
    """

    def __init__(self, prompts: list[str], tokens: int, data: TokenStream) -> None:
        self.prompts, self.tokens, self.separator = prompts, tokens, data.manifest.eos_id
        self.tokenizer = load_tokenizer(data.tokenizer_path, self.separator)
        self.ids = [ids or [self.separator] for ids in self.tokenizer.encode_batch(prompts)]

    def draw(self, model: nn.Module, step: int) -> list[dict[str, int | str]]:
        """The records of a step; collective."""
        # On all ranks: FSDP may gather the embedding and the head anew for each token.
        with gathered(model):
            said = continuations(model, self.ids, self.tokenizer.vocab_size, self.separator, self.tokens, seed=step)
        asked = [(prompt, ids, mode) for prompt, ids in zip(self.prompts, self.ids, strict=True) for mode in MODES]
        return [
            {"step": step, "prompt": prompt, "mode": mode, "text": self.text(ids, new)}
            for (prompt, ids, mode), new in zip(asked, said, strict=True)
        ]

    def text(self, before: list[int], ids: list[int]) -> str:
        """Text of `ids` after those `before`: only then is it clear whether it begins with a space."""
        known, whole = self.tokenizer.decode(before), self.tokenizer.decode(before + ids)
        return whole[len(known) :] if whole.startswith(known) else self.tokenizer.decode(ids)

    def describe(self) -> str:
        """One line for the log."""
        count = len(self.prompts)
        return (
            f"samples: {count} prompt{'s' * (count > 1)}, {self.tokens} tokens each, greedy and sampled, "
            "at each validation"
        )


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it, every module of a sharded model has its whole weights, in the compute type; collective."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


@torch.no_grad()
def continuations(
    model: nn.Module, prompts: list[list[int]], vocabulary: int, separator: int, count: int, seed: int
) -> list[list[int]]:
    """Tokens that follow each prompt, up to the separator or to logits that are not finite: for each prompt the most
    probable ones, then sampled ones.

    Args:
        model: whole on its device.
        prompts: ids, at least one each.
        vocabulary: ids from here on have no text, and are not said.
        separator: ends a text.
        count: the most tokens of a text.
        seed: of the sampled ones.
    """
    device, caches, logits = model.tok_embeddings.weight.device, [], []
    for ids in prompts:
        of_prompt, cache = prefill(model, torch.tensor([ids], device=device), init_cache(model, 1), last_only=True)
        caches += [cache] * len(MODES)
        logits += [of_prompt[:, 0]] * len(MODES)
    cache, logits = join(caches), torch.cat(logits)
    said: list[list[int]] = [[] for _ in logits]
    open_ended = torch.ones(len(said), dtype=torch.bool)
    # On the CPU, so that a seed means the same everywhere.
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        scores = logits[:, :vocabulary].double().cpu()
        open_ended &= scores.isfinite().all(1)
        scores = scores.nan_to_num()
        tokens = scores.argmax(1)
        tokens[1::2] = torch.multinomial(scores[1::2].softmax(1), 1, generator=generator)[:, 0]
        open_ended &= tokens != separator
        for ids, token, goes_on in zip(said, tokens.tolist(), open_ended.tolist(), strict=True):
            ids += [token] * goes_on
        # To the last, even where all texts have ended: ranks must ask for the same weights as often.
        logits, cache = step(model, tokens.to(device), cache)
    return said
