"""Continuing prompts with a model's cached state: constant memory and time a token, whatever the length.

    prompts = [vocabulary.encode("def main():"), vocabulary.encode("import ")]
    for text in continue_prompts(loaded.model, vocabulary, prompts, Settings(tokens=50, stops=["\\n\\n"])):
        print(text.text, text.reason)

Prompts of any lengths go together, without padding: a recurrent state would remember it. They are read side by side
in segments up to the end of the shortest, the others go on from there. A sequence that ends leaves the batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.models.decode import advance, init_cache, join, select, step
from torchtitan_deltaproduct.models.mixer import MixerCache

from .sampling import Sampler, Sampling
from .text_stream import TextStream
from .vocabulary import Vocabulary

SEGMENT = 2048
"""Tokens of a prompt read at a time."""


@dataclass(frozen=True)
class Settings:
    """When a text ends, and how its tokens are chosen.

    Attributes:
        tokens: the most to add to a prompt.
        stops: strings that end a text; it is cut before the first of them.
        sampling: how tokens are chosen.
        stop_at_separator: whether the end of the document ends the text.
        segment: tokens of a prompt read at a time; changes nothing beyond rounding.

    Raises:
        ConfigError: a value out of range.
    """

    tokens: int = 128
    stops: tuple[str, ...] | list[str] = ()
    sampling: Sampling = field(default_factory=Sampling)
    stop_at_separator: bool = True
    segment: int = SEGMENT

    def __post_init__(self):
        for name in ("tokens", "segment"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt.

    Attributes:
        tokens: the ids added; a separator that ended the text is the last of them.
        text: what they say, up to a stop string; special tokens that did not end the text are shown.
        reason: it ended by `separator`, `stop` (a string) or `length`.
    """

    tokens: list[int]
    text: str
    reason: str


def continue_prompts(
    model: DeltaProductLM,
    vocabulary: Vocabulary,
    prompts: list[list[int]],
    settings: Settings,
    seeds: list[int] | None = None,
    show: Callable[[int, str], None] | None = None,
) -> list[Continuation]:
    """Continues a batch of prompts.

    Args:
        model: the model.
        vocabulary: of the prompts; no other tokens are said.
        prompts: ids; an empty one begins with the separator, as a document does in training.
        settings: what to say, and how much.
        seeds: for each prompt, 0 by default: the same seed and prompt say the same in any batch.
        show: called with the place of a prompt and each piece of its text, as soon as it is certain.

    Raises:
        CheckpointError: the model's logits are not finite.
    """
    prompts = [prompt or [vocabulary.separator] for prompt in prompts]
    rows = [_Row(vocabulary, prompt, settings) for prompt in prompts]
    sampler = Sampler(settings.sampling, [0] * len(prompts) if seeds is None else seeds)
    logits, cache = read_prompts(model, prompts, settings.segment)
    active = list(range(len(prompts)))
    while True:
        tokens = sampler.choose(logits[:, : vocabulary.size], active)
        for place, token in zip(active, tokens, strict=True):
            text = rows[place].push(token)
            if show and text:
                show(place, text)
        kept = [i for i, place in enumerate(active) if not rows[place].reason]
        if not kept:
            return [row.result() for row in rows]
        if len(kept) < len(active):
            cache = select(cache, torch.tensor(kept, device=logits.device))
            active, tokens = [active[i] for i in kept], [tokens[i] for i in kept]
        logits, cache = step(model, torch.tensor(tokens, device=logits.device), cache)


class _Row:
    """One text as it grows."""

    def __init__(self, vocabulary: Vocabulary, prompt: list[int], settings: Settings):
        self.settings = settings
        self.end = vocabulary.separator if settings.stop_at_separator else None
        self.stream = TextStream(vocabulary.tokenizer, prompt, settings.stops)
        self.tokens, self.pieces, self.reason = [], [], ""

    def push(self, token: int) -> str:
        self.tokens.append(token)
        text = ""
        if token == self.end:
            self.reason = "separator"
        else:
            text = self.stream.push(token)
            if not self.stream.stopped and len(self.tokens) == self.settings.tokens:
                self.reason = "length"
        if self.reason:
            text += self.stream.finish()
        # What was held back may have turned out to be a stop string only now.
        if self.stream.stopped:
            self.reason = "stop"
        self.pieces.append(text)
        return text

    def result(self) -> Continuation:
        return Continuation(self.tokens, "".join(self.pieces), self.reason)


@torch.no_grad()
def read_prompts(
    model: DeltaProductLM, prompts: list[list[int]], segment: int = SEGMENT
) -> tuple[Tensor, list[MixerCache]]:
    """Reads prompts of any lengths.

    Args:
        model: the model.
        prompts: ids, at least one each.
        segment: tokens read at a time; memory grows with it, not with the prompts.

    Returns:
        Logits [B, vocab] of what follows each prompt, and the cache after them.
    """
    device = model.tok_embeddings.weight.device
    # Longest first: those that are still being read are always the first rows.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    cache, last, ended, start = init_cache(model, len(prompts)), [], [], 0
    for length in sorted({len(prompt) for prompt in prompts}):
        reading = [prompts[i] for i in order if len(prompts[i]) >= length]
        hidden = None
        for first, stop in _pieces(start, length, segment):
            tokens = torch.tensor([prompt[first:stop] for prompt in reading], device=device)
            hidden, cache = advance(model, tokens, cache)
        longer = sum(len(prompt) > length for prompt in reading)
        last.insert(0, hidden[longer:, -1])
        ended.insert(0, select(cache, slice(longer, None)))
        cache, start = select(cache, slice(longer)), length
    back = torch.tensor(order, device=device).argsort()
    return model.head(torch.cat(last)[back]), select(join(ended), back)


def _pieces(start: int, stop: int, segment: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, segment):
        yield first, min(first + segment, stop)
