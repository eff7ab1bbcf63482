"""`[data] kind = "group_word"`: random words over a group; the label at each position is the prefix product.

    [data]
    kind = "group_word"
    group = "S5"                       # any name of data/generated/groups.py
    seed = 1
    curriculum_start = 16              # optional: words of 16 tokens first, of training.seq_len after
    curriculum_steps = 2000            # 2,000 steps

    input            g_1   g_2      g_3          ...      element indices, no start token
    label            g_1   g_1 g_2  g_1 g_2 g_3  ...      element indices, 0 .. order-1

A longer word of the same index begins with the shorter one. While a curriculum lasts, positions past its length hold
the identity and have no label.
"""

from dataclasses import dataclass

import numpy as np
import torch

from torchtitan_deltaproduct.errors import ConfigError

from ..counter import below, draws, stream_key
from ..loader import Batch, Geometry, Loader
from ..packing import IGNORE
from . import Generated
from .groups import parse_group


def build(data, geometry: Geometry, tokenizer_path: str = "") -> Loader:
    """The loader of `[data] kind = "group_word"`; it needs no tokenizer."""
    start, steps = data.curriculum_start, data.curriculum_steps
    curriculum = Curriculum(start, geometry.seq_len, steps, geometry.global_batch_size) if start else None
    source = GroupWordSource(data.group, geometry.seq_len, data.seed, "train", curriculum)
    return Loader(source, geometry, data.num_workers, data.prefetch_factor)


@dataclass(frozen=True)
class Curriculum:
    """Length of words by global step: linear from `start` at step 0 to `stop` at step `steps`, in tokens."""

    start: int
    stop: int
    steps: int
    global_batch_size: int

    def __post_init__(self):
        if not 1 <= self.start <= self.stop or self.steps < 1:
            raise ConfigError(
                f"data.curriculum_start = {self.start} and data.curriculum_steps = {self.steps}: the length grows "
                f"from 1 or more to training.seq_len = {self.stop}, in at least 1 step"
            )

    def lengths(self, samples: np.ndarray) -> np.ndarray:
        """samples: [n] int64 global sample indices -> [n] int64 tokens."""
        step = np.minimum(samples // self.global_batch_size, self.steps)
        return self.start + (self.stop - self.start) * step // self.steps


@dataclass
class GroupWordSource(Generated):
    """Words of `seq_len` tokens over the group of a `name` such as `S5_limit_to_3`, see `groups.parse_group`.

    A curriculum shortens the words of early steps. There are `classes` labels; `chance` is the accuracy of guessing.
    """

    name: str
    seq_len: int
    seed: int = 0
    split: str = "train"
    curriculum: Curriculum | None = None

    def __post_init__(self):
        self.check_split()
        self.problem = parse_group(self.name)
        self.vocab_size, self.classes, self.chance = self.problem.vocab_size, self.problem.classes, self.problem.chance
        self.key = stream_key("group_word", self.seed, self.split)

    def words(self, samples: np.ndarray, elements: int) -> np.ndarray:
        """samples: [n] int64 -> [n, elements] int64 indices of group elements, uniform on the alphabet."""
        alphabet = self.problem.alphabet
        # Two elements from each 64 bits.
        bits = draws(self.key, samples, -(-elements // 2)).view(np.uint32)[:, :elements]
        chosen = below(bits, len(alphabet))
        return chosen if len(alphabet) == self.problem.group.order else alphabet[chosen]

    def batch(self, samples: np.ndarray) -> Batch:
        """samples: [n] int64 -> ({"input": [n, T] int64}, labels [n, T] int64)."""
        repeats = self.problem.tokens_per_element
        words = self.words(samples, -(-self.seq_len // repeats))
        labels = self.problem.group.products(words).astype(np.int64)
        inputs = words
        if repeats > 1:
            inputs, labels = self._spell(words, labels)
        if self.curriculum:
            lengths = self.curriculum.lengths(np.asarray(samples))
            past = np.arange(self.seq_len) >= lengths[:, None]
            inputs, labels = np.where(past, 0, inputs), np.where(past, IGNORE, labels)
        return {"input": torch.from_numpy(inputs)}, torch.from_numpy(labels)

    def _spell(self, words: np.ndarray, products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n, elements] words and prefix products -> [n, T] tokens and labels."""
        problem, repeats = self.problem, self.problem.tokens_per_element
        inputs = np.repeat(words, repeats, axis=1)
        if problem.filler:
            inputs[:, np.arange(inputs.shape[1]) % repeats > 0] = problem.group.order
        labels = np.full_like(inputs, IGNORE)
        if not problem.score_last:
            # The product of what has been read to the last token: of no element before the first such.
            before = np.pad(products, ((0, 0), (1, 0)))[:, :-1]
            labels = np.repeat(before, repeats, axis=1)
        labels[:, repeats - 1 :: repeats] = products
        return np.ascontiguousarray(inputs[:, : self.seq_len]), np.ascontiguousarray(labels[:, : self.seq_len])

    def order(self) -> dict[str, object]:
        parts = {"kind": "group_word", "group": self.name, **self.shared_order()}
        if grows := self.curriculum:
            parts |= {"curriculum_start": grows.start, "curriculum_steps": grows.steps}
            parts["global_batch_size"] = grows.global_batch_size
        return parts

    def describe(self) -> str:
        grows = self.curriculum
        longer = f", from {grows.start:,} tokens on over {grows.steps:,} steps" if grows else ""
        return f"group words: {self.problem.describe()}; {self.seq_len:,} tokens, seed {self.seed}{longer}"
