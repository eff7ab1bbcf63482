"""Continuing prompts with a model's cached state: constant memory and time a token, whatever the length.

    prompts = [vocabulary.encode("def main():"), vocabulary.encode("import ")]
    for text in continue_prompts(loaded.model, vocabulary, prompts, Settings(tokens=50, stops=["\\n\\n"])):
        print(text.text, text.reason)

Prompts of any lengths go together, without padding: a recurrent state would remember it. They are read side by side
in segments up to the end of the shortest, the others go on from there. A sequence that ends leaves the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.models.decode import advance, init_cache, join, select, step
from torchtitan_deltaproduct.models.mixer import MixerCache

from .sampling import Sampling, choose, random_streams
from .vocabulary import TextStream, Vocabulary

SEGMENT = 2048
"""Tokens of a prompt read at a time."""


@dataclass(frozen=True)
class Settings:
    """When a text ends, and how its tokens are chosen; ConfigError if a value is out of range."""

    tokens: int = 128
    """The most to add to a prompt."""
    stops: Sequence[str] = ()
    """Strings that end a text; it is cut before the first of them."""
    sampling: Sampling = field(default_factory=Sampling)
    stop_at_separator: bool = True
    """Whether the end of the document ends the text."""
    segment: int = SEGMENT
    """Tokens of a prompt read at a time; changes nothing beyond rounding."""

    def __post_init__(self):
        for name in ("tokens", "segment"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: must be at least 1")


@dataclass
class Continuation:
    """What follows a prompt."""

    stream: TextStream = field(repr=False, compare=False)
    tokens: list[int] = field(default_factory=list)
    """The ids added; a separator that ended the text is the last of them."""
    pieces: list[str] = field(default_factory=list)
    """Of `text`."""
    reason: str = ""
    """It ended by `separator`, `stop` (a string) or `length`."""

    @property
    def text(self) -> str:
        """What the tokens say, up to a stop string; special tokens that did not end the text are shown."""
        return "".join(self.pieces)

    def push(self, token: int, separator: int | None, most: int) -> str:
        """Takes the next of at most `most` tokens and returns the text that is certain now; `separator` ends it."""
        self.tokens.append(token)
        piece = "" if token == separator else self.stream.push(token)
        if token == separator:
            self.reason = "separator"
        elif len(self.tokens) == most:
            self.reason = "length"
        if self.reason:
            piece += self.stream.finish()
        # What was held back may have turned out to be a stop string only now.
        if self.stream.stopped:
            self.reason = "stop"
        self.pieces.append(piece)
        return piece


def continue_prompts(
    model: DeltaProductLM, vocabulary: Vocabulary, prompts: list[list[int]], settings: Settings,
    seeds: list[int] | None = None, show: Callable[[int, str], None] | None = None,
) -> list[Continuation]:  # fmt: skip
    """Continues a batch of prompts; no tokens but those of the vocabulary are said.

    Args:
        prompts: ids; an empty one begins with the separator, as a document does in training.
        seeds: for each prompt, 0 by default: the same seed and prompt say the same in any batch.
        show: called after each token with the place of its prompt and the text that is certain now, perhaps none.

    Raises:
        CheckpointError: the model's logits are not finite.
    """
    prompts = [prompt or [vocabulary.separator] for prompt in prompts]
    texts = [Continuation(TextStream(vocabulary.tokenizer, prompt, settings.stops)) for prompt in prompts]
    separator = vocabulary.separator if settings.stop_at_separator else None
    streams = random_streams(seeds or [0] * len(prompts))
    logits, cache = read_prompts(model, prompts, settings.segment)
    active = list(range(len(prompts)))
    while True:
        tokens = choose(logits[:, : vocabulary.size], settings.sampling, [streams[place] for place in active])
        for place, token in zip(active, tokens, strict=True):
            piece = texts[place].push(token, separator, settings.tokens)
            if show:
                show(place, piece)
        kept = [i for i, place in enumerate(active) if not texts[place].reason]
        if not kept:
            return texts
        if len(kept) < len(active):
            cache = select(cache, torch.tensor(kept, device=logits.device))
            active, tokens = [active[i] for i in kept], [tokens[i] for i in kept]
        logits, cache = step(model, torch.tensor(tokens, device=logits.device), cache)


@torch.no_grad()
def read_prompts(
    model: DeltaProductLM, prompts: list[list[int]], segment: int = SEGMENT
) -> tuple[Tensor, list[MixerCache]]:
    """Logits [B, vocab] of what follows prompts of any lengths, at least one token each, and the cache after them.

    `segment` tokens are read at a time, which bounds the memory.
    """
    device = model.tok_embeddings.weight.device
    # Longest first: those that are still being read are always the first rows.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    cache, last, ended, start = init_cache(model, len(prompts)), [], [], 0
    for length in sorted({len(prompt) for prompt in prompts}):
        reading = [prompts[i] for i in order if len(prompts[i]) >= length]
        hidden = None
        for first in range(start, length, segment):
            tokens = torch.tensor([prompt[first : min(first + segment, length)] for prompt in reading], device=device)
            hidden, cache = advance(model, tokens, cache)
        longer = sum(len(prompt) > length for prompt in reading)
        last.insert(0, hidden[longer:, -1])
        ended.insert(0, select(cache, slice(longer, None)))
        cache, start = select(cache, slice(longer)), length
    back = torch.tensor(order, device=device).argsort()
    return model.head(torch.cat(last)[back]), select(join(ended), back)
