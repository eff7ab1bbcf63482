"""Counting right answers on generated words, position by position, in words far longer than memory.

    problem = problem_of(loaded.config, length=128)                  # the test stream of the run's own problem
    counts = problem.count(model_reader(loaded.model), words=1024)
    counts.accuracy()                                                # [length]

Words go through the model in segments from a cache, so that its memory does not grow with the length; the tokens
themselves take 8 bytes each. No position before the first element is counted: there is no start token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from torchtitan_deltaproduct.data.counter import POSITION_BITS
from torchtitan_deltaproduct.data.generated.group_words import GroupWordSource
from torchtitan_deltaproduct.data.generated.languages import FormalSource
from torchtitan_deltaproduct.data.packing import IGNORE
from torchtitan_deltaproduct.errors import CheckpointError, ConfigError
from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.models.decode import init_cache, prefill

from .horizon import MOST_LENGTHS

MAX_TOKENS = 2**22
"""Tokens of a batch of words that are held at once; a single longer word is its own batch."""

# Tokens [B, T] and the cache (None at the start of the words) -> logits [B, T, vocab] and the next cache.
Reader = Callable[[Tensor, object], tuple[Tensor, object]]


@dataclass(frozen=True)
class Counts:
    """Right answers over that many words of one length L."""

    words: int
    scored: np.ndarray
    """[L] int64, words with a label at each position."""
    correct: np.ndarray
    """[L] int64, those of them whose label is predicted (arg max over the whole vocabulary)."""
    prefix: np.ndarray
    """[L] int64, words that are right at every labelled position up to this one."""
    least_margin: np.ndarray = field(default_factory=lambda: np.empty(0))
    """[up to 16 training lengths] float64, median over words of the least margin so far (`horizon`); [0]: unknown."""

    def accuracy(self) -> np.ndarray:
        """[L] float64: share of right answers at each position; NaN where no word has a label."""
        return np.divide(self.correct, self.scored, out=np.full(len(self.scored), np.nan), where=self.scored > 0)

    def between(self, first: int, last: int) -> tuple[int, int]:
        """Right answers and labels at positions first .. last, counted from 1."""
        return int(self.correct[first - 1 : last].sum()), int(self.scored[first - 1 : last].sum())


def model_reader(model: DeltaProductLM) -> Reader:
    """Reads with a model from its decoding cache."""
    device = model.tok_embeddings.weight.device

    def read(tokens: Tensor, cache) -> tuple[Tensor, object]:
        return prefill(model, tokens.to(device), init_cache(model, len(tokens)) if cache is None else cache)

    return read


def margins_of(logits: Tensor, answers: Tensor, scored: Tensor) -> Tensor:
    """[B, T] float32: the logit of the right answer less the largest other, infinite where nothing is asked."""
    index = answers.clamp(min=0).unsqueeze(-1)
    others = logits.float().scatter(-1, index, -torch.inf).amax(-1)
    return torch.where(scored, logits.float().gather(-1, index).squeeze(-1) - others, torch.inf)


@dataclass(frozen=True)
class Problem:
    """The test stream of a run's problem, such as `S3` or `parity`.

    Attributes:
        formal: a formal language (one answer a row, rows of many lengths), not a group.
        train_length, length: longest word, in tokens, that the run was trained on, and that is tested.
        chance: accuracy of guessing.
        sources, seed: streams whose counts are summed, and theirs.
    """

    name: str
    formal: bool
    train_length: int
    length: int
    chance: float
    sources: tuple
    seed: int

    def count(
        self, read: Reader, words: int, rows: int = 64, segment: int = 256,
        progress: Callable[[int], object] = lambda tokens: None,
    ) -> Counts:  # fmt: skip
        """Reads words 0 .. words - 1 of each source and counts.

        That many `rows` are read at a time, by segments, which change the results by rounding alone; `progress` is
        called with the number of tokens after each.
        """
        totals, least = np.zeros((3, self.length), dtype=np.int64), []
        reach = 0 if self.formal else min(self.length, MOST_LENGTHS * self.train_length)
        for source in self.sources:
            step = max(1, min(rows, MAX_TOKENS // source.seq_len))
            for first in range(0, words, step):
                inputs, labels = source.batch(np.arange(first, min(first + step, words)))
                cache, intact, margins = None, True, []
                for start in range(0, source.seq_len, segment):
                    piece = slice(start, min(start + segment, source.seq_len))
                    logits, cache = read(inputs["input"][:, piece], cache)
                    answers = labels[:, piece].to(logits.device)
                    scored, right = answers != IGNORE, logits.argmax(-1) == answers
                    prefix = (right | ~scored).cumprod(1).bool() & intact
                    intact = prefix[:, -1:]
                    if start < reach:
                        margins.append(margins_of(logits, answers, scored)[:, : reach - start])
                    totals[:, piece] += torch.stack([scored, right, prefix]).sum(1).cpu().numpy()
                    progress(answers.numel())
                if margins:
                    least.append(torch.cat(margins, 1).cummin(1).values.cpu().numpy())
        medians = [np.median(np.concatenate(least), 0)] if least else []
        return Counts(words * len(self.sources), *totals, *medians)

    def tokens(self, words: int) -> int:
        """Tokens that `count` reads."""
        return words * sum(source.seq_len for source in self.sources)


def at_least_trained(length: int, trained: int) -> int:
    """`length`, unless it is given and below the longest words of the training, by which a run is judged."""
    if 0 < length < trained:
        raise ConfigError(f"--length {length}: the run was trained on up to {trained:,} tokens; give at least as many")
    return length


def problem_of(config: dict, length: int = 0, seed: int | None = None) -> Problem:
    """The held-out words of the problem that a run was trained on.

    Args:
        config: the run's job config (`LoadedModel.config`).
        length: tokens of the longest word; 0: four times the training length, for formal languages at least 256.
        seed: of the stream; None: the run's own (streams of the same seed share no words).

    Raises:
        CheckpointError: the run was not trained on generated words. ConfigError: no words of that length.
    """
    if "data" not in config:
        raise CheckpointError("the model's folder does not say what it was trained on: give its run, or our own export")
    data, seq_len = config["data"], config["training"]["seq_len"]
    seed = data["seed"] if seed is None else seed
    if length >= 1 << POSITION_BITS:
        raise ConfigError(f"words of {length:,} tokens: their elements are numbered up to {1 << POSITION_BITS:,}")
    if data["kind"] == "group_word":
        length = at_least_trained(length, seq_len) or 4 * seq_len
        source = GroupWordSource(data["group"], length, seed, "test")
        return Problem(data["group"], False, seq_len, length, source.chance, (source,), seed)
    if data["kind"] == "formal_language":
        name, shortest, longest = data["language"], data["min_length"], data["max_length"]
        length = at_least_trained(length, longest) or max(256, 4 * longest)
        sources = (FormalSource(name, longest, shortest, longest, seed, "test"),)
        if length > longest:
            sources += (FormalSource(name, length, longest + 1, length, seed, "test"),)
        return Problem(name, True, longest, length, sources[0].chance, sources, seed)
    raise CheckpointError(
        f"data.kind is {data['kind']!r}: state tracking needs a run on group_word or formal_language, see "
        "train_configs/state_tracking"
    )
