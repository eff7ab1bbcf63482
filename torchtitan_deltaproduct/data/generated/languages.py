"""`[data] kind = "formal_language"`: parity and arithmetic modulo 5, with one answer at the end of each row.

    [data]
    kind = "formal_language"
    language = "modular_arithmetic_brackets"
    min_length = 3                 # the setting of Grazzi et al. 2025: trained on 3 to 40 tokens,
    max_length = 40                # tested on 40 to 256

    input   ( 3 * ( - 2 ) ) = _ _ _        token ids 0 .. 4, then + - * ( ) = and the padding _
    label   . . . . . . . . 4 . . .        at `=` only; -100 elsewhere

The length counts all tokens but the padding, `=` included, and is uniform on the possible lengths from
min_length to max_length. `parity` is of a word of bits, labelled at its last bit: 1 for an odd number of ones.
`modular_arithmetic` alternates digits and + - * (an even number of tokens with `=`), `*` first.
`modular_arithmetic_brackets` follows the grammar of Deletang et al. 2023 with multiplication: expressions of
1 to 4 tokens are d, -d, (d), (-d); longer ones (x op y) with uniform lengths.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from torchtitan_deltaproduct.errors import ConfigError

from ..counter import below, draws, stream_key
from ..loader import Batch, Geometry, Loader
from ..packing import IGNORE
from . import Generated

MODULUS = 5
_PLUS, _MINUS, _TIMES, _OPEN, _CLOSE, _EQUALS, _BLANK = range(MODULUS, MODULUS + 7)

# bits [n, T] uint64, lengths [n] int64 -> padded tokens [n, T] int64 and answers [n] int64.
Generate = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Language:
    """What the rows of a language look like."""

    symbols: str
    """How each token id is written; the last is the padding."""
    classes: int
    """Answers are 0 .. classes - 1."""
    least: int
    step: int
    """Possible lengths are `least`, `least + step`, ... tokens."""
    generate: Generate


def _parity(bits: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inside = np.arange(bits.shape[1]) < lengths[:, None]
    ones = (bits >> np.uint64(63)).astype(np.int64)
    return np.where(inside, ones, 2), (ones * inside).sum(axis=1) % 2


def _arithmetic(bits: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    positions, equals = np.arange(bits.shape[1]), lengths[:, None] - 1
    tokens = np.where(positions % 2 == 0, below(bits, MODULUS), _PLUS + below(bits, 3))
    tokens = np.where(positions < equals, tokens, np.where(positions == equals, _EQUALS, _BLANK))
    # The value is total + term; `*` changes the term, + and - close it. Past the end, + 0 changes nothing.
    total, term = np.zeros(len(bits), dtype=np.int64), tokens[:, 0]
    for position in range(1, int(lengths.max()) - 1, 2):
        inside = position < lengths - 1
        operator = np.where(inside, tokens[:, position], _PLUS)
        digit = np.where(inside, tokens[:, position + 1], 0)
        times = operator == _TIMES
        total = np.where(times, total, total + term)
        term = np.where(times, term * digit % MODULUS, np.where(operator == _MINUS, -digit, digit))
    return tokens, (total + term) % MODULUS


def _brackets(bits: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All expressions of one depth are opened at once, then valued from the inside out.

    An expression is known by its row and first position: its value is kept there, and its random bits are
    those of that position. Only digits draw from their own.
    """
    rows = np.arange(len(bits))
    tokens = np.full(bits.shape, _BLANK, dtype=np.int64)
    tokens[rows, lengths - 1] = _EQUALS
    values = np.zeros(bits.shape, dtype=np.int64)
    row, start, size, depths = rows, np.zeros_like(rows), lengths - 1, []
    while len(row):
        leaf = size < 5
        _write_leaves(tokens, values, bits, row[leaf], start[leaf], size[leaf])
        row, start, size = row[~leaf], start[~leaf], size[~leaf]
        random = bits[row, start]
        left = 1 + below(random.astype(np.uint32), size - 4)
        middle = start + 1 + left
        operator = _PLUS + below(random, 3)
        tokens[row, start], tokens[row, middle], tokens[row, start + size - 1] = _OPEN, operator, _CLOSE
        depths.append((row, start, middle, operator))
        start, size = np.concatenate([start + 1, middle + 1]), np.concatenate([left, size - 3 - left])
        row = np.concatenate([row, row])
    for row, start, middle, operator in reversed(depths):
        left, right = values[row, start + 1], values[row, middle + 1]
        values[row, start] = np.choose(operator - _PLUS, [left + right, left - right, left * right]) % MODULUS
    return tokens, values[:, 0]


def _write_leaves(tokens, values, bits, row, start, size) -> None:
    """Writes d, -d, (d) or (-d), for sizes 1 to 4, and its value."""
    bracket, negative = size >= 3, size % 2 == 0
    place = start + bracket + negative
    digit = below(bits[row, place], MODULUS)
    tokens[row, place] = digit
    tokens[row[negative], place[negative] - 1] = _MINUS
    tokens[row[bracket], start[bracket]] = _OPEN
    tokens[row[bracket], place[bracket] + 1] = _CLOSE
    values[row, start] = np.where(negative, -digit, digit) % MODULUS


_ARITHMETIC_SYMBOLS = "01234+-*()=_"
LANGUAGES = {
    "parity": Language("01_", 2, 1, 1, _parity),
    "modular_arithmetic": Language(_ARITHMETIC_SYMBOLS, MODULUS, 2, 2, _arithmetic),
    "modular_arithmetic_brackets": Language(_ARITHMETIC_SYMBOLS, MODULUS, 2, 1, _brackets),
}


def build(data, geometry: Geometry, tokenizer_path: str = "") -> Loader:
    """The loader of `[data] kind = "formal_language"`; it needs no tokenizer."""
    source = FormalSource(data.language, geometry.seq_len, data.min_length, data.max_length, data.seed)
    return Loader(source, geometry, data.num_workers, data.prefetch_factor)


@dataclass
class FormalSource(Generated):
    """Rows of a language of `LANGUAGES`: `min_length` to `max_length` tokens, `=` included, padded to `seq_len`.

    `classes` is the number of answers, `chance` the accuracy of guessing.
    """

    name: str
    seq_len: int
    min_length: int = 3
    max_length: int = 40
    seed: int = 0
    split: str = "train"

    def __post_init__(self):
        self.check_split()
        if self.name not in LANGUAGES:
            raise ConfigError(f"data.language = {self.name!r}: known are {', '.join(LANGUAGES)}")
        self.language = LANGUAGES[self.name]
        self.vocab_size, self.classes = len(self.language.symbols), self.language.classes
        self.chance = 1 / self.classes
        if self.max_length > self.seq_len:
            raise ConfigError(
                f"data.max_length = {self.max_length}: rows hold training.seq_len = {self.seq_len} tokens"
            )
        first, step = self.language.least, self.language.step
        lengths = np.arange(first, self.max_length + 1, step)
        self.lengths = lengths[lengths >= self.min_length]
        if not len(self.lengths):
            raise ConfigError(
                f"data.min_length = {self.min_length} and data.max_length = {self.max_length}: no row of "
                f"{self.name} is that long; possible are {first}, {first + step}, {first + 2 * step}, ... tokens"
            )
        self.key = stream_key("formal_language", self.name, self.seed, self.split)

    def batch(self, samples: np.ndarray) -> Batch:
        """samples: [n] int64 -> ({"input": [n, T] int64}, labels [n, T] int64)."""
        # One draw for the length, then one for each position, so that they do not depend on seq_len.
        bits = draws(self.key, samples, 1 + self.seq_len)
        lengths = self.lengths[below(bits[:, 0], len(self.lengths))]
        tokens, answers = self.language.generate(bits[:, 1:], lengths)
        labels = np.full_like(tokens, IGNORE)
        labels[np.arange(len(tokens)), lengths - 1] = answers
        return {"input": torch.from_numpy(tokens)}, torch.from_numpy(labels)

    def text(self, tokens: np.ndarray) -> str:
        """[T] token ids -> `(3*(-2))=`, without the padding."""
        return "".join(self.language.symbols[token] for token in tokens).rstrip("_")

    def order(self) -> dict[str, object]:
        lengths = {"min_length": self.min_length, "max_length": self.max_length}
        return {"kind": "formal_language", "language": self.name, **self.shared_order(), **lengths}

    def describe(self) -> str:
        return (
            f"formal language: {self.name}, rows of {self.lengths[0]:,} to {self.lengths[-1]:,} tokens padded to "
            f"{self.seq_len:,}, seed {self.seed}, chance {self.chance:.0%}"
        )
