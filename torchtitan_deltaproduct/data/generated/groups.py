"""Finite groups as multiplication tables, and the word problems that the paper's names ask for.

    problem = parse_group("A4_x_Z5")
    group = problem.group                     # 60 elements; group.names[7], group.permutations[7]
    group.table[a, b]                         # index of the product a b, as an element
    problem.vocab_size, problem.classes       # 60, 60

Conventions, each with a test. An element is a permutation p of 0 .. degree-1, p[i] being the image of i.
(a b)[i] = a[b[i]]: the right factor acts first. The word g_1 g_2 ... g_t is the product from left to right.
Element 0 is the identity, and a token is the index of its element. Order of elements: S_n and A_n by p,
lexicographically; Z_n: 0 .. n-1; D_n (2n elements, the symmetries of an n-gon): r^0 .. r^(n-1), then r^0 s ..
r^(n-1) s, where r: i -> i+1 and s: i -> -i; products: the last factor changes fastest.
"""

import re
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import permutations
from math import factorial

import numpy as np

from torchtitan_deltaproduct.errors import ConfigError, nearest

MAX_ORDER = 5040
"""Largest group: its table has 25 million entries (S7, A7)."""

_NAME = re.compile(
    r"(?P<group>[SAZD]\d+(?:_x_[SAZD]\d+)*)"
    r"(?P<alphabet>_only_swaps|_limit_to_(?P<limit>\d+))?"
    r"(?:_(?P<tokens>\d+)_tokens(?P<spelling>_last|_s_token_only_input|_s_token)?)?"
)

_NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group; the conventions are those of the module."""

    name: str
    permutations: np.ndarray
    """[order, degree] int16, a faithful action; a product acts on the points of all factors."""
    table: np.ndarray
    """[order, order] of the smallest unsigned type: index of the product of row and column element."""
    names: tuple[str, ...]
    """What to call each element in print."""

    @property
    def order(self) -> int:
        return len(self.table)

    @property
    def moved(self) -> np.ndarray:
        """[order] int64: number of points that each element moves."""
        return (self.permutations != np.arange(self.permutations.shape[1])).sum(axis=1)

    def products(self, words: np.ndarray) -> np.ndarray:
        """Words [n, T] of element indices -> [n, T] of the type of `table`: entry t is g_1 g_2 ... g_t.

        By doubling (Hillis & Steele 1986): pass k joins two stretches of 2^k elements, log2(T) lookups a token.
        """
        out, flat = words.astype(np.intp), self.table.ravel()
        distance = 1
        while distance < out.shape[1]:
            out[:, distance:] = flat[out[:, :-distance] * self.order + out[:, distance:]]
            distance *= 2
        return out.astype(self.table.dtype)


@dataclass(frozen=True, eq=False)
class WordProblem:
    """A group, the elements that words are made of, and how an element is spelled; labels are elements of the group."""

    name: str
    group: Group
    alphabet: np.ndarray
    """[m] int64, indices of the elements that occur in words, each equally likely."""
    tokens_per_element: int = 1
    """t; an element is one token t times, or one token and t - 1 fillers."""
    filler: bool = False
    """Whether t - 1 fillers follow an element; the filler token is `group.order`."""
    score_last: bool = False
    """Count only the last token of an element. Otherwise every position has a label: the product of all elements that
    have been read to their last token (the identity before the first such)."""

    @property
    def vocab_size(self) -> int:
        """The elements of the group, in its order, then the filler if there is one."""
        return self.group.order + self.filler

    @property
    def classes(self) -> int:
        return self.group.order

    @property
    def chance(self) -> float:
        """Accuracy of guessing: products of a few random elements are uniform on the group."""
        return 1 / self.classes

    def describe(self) -> str:
        """`S5_limit_to_3: 120 elements, words over 31 of them`."""
        text = f"{self.name}: {self.group.order} elements"
        if len(self.alphabet) < self.group.order:
            text += f", words over {len(self.alphabet)} of them"
        if self.tokens_per_element > 1:
            text += f", {self.tokens_per_element} tokens each, {'with fillers' if self.filler else 'repeated'}"
        return text


def _small(order: int) -> type:
    return np.uint8 if order <= 256 else np.uint16


def _rank(perms: np.ndarray) -> np.ndarray:
    """[..., degree] -> [...] int64, in lexicographic order."""
    degree = perms.shape[-1]
    return perms.astype(np.int64) @ (degree ** np.arange(degree)[::-1])


def _table_of(perms: np.ndarray) -> np.ndarray:
    """Multiplication table of permutations in lexicographic order, by looking up each product's rank."""
    ranks = _rank(perms)
    return np.stack([np.searchsorted(ranks, _rank(left[perms])).astype(_small(len(perms))) for left in perms])


def _cycles(perm: np.ndarray) -> str:
    """`(0 1)(2 4)`; `e` for the identity."""
    text, seen = "", set()
    for start in range(len(perm)):
        cycle, point = [], start
        while point not in seen:
            seen.add(point)
            cycle.append(str(point))
            point = int(perm[point])
        if len(cycle) > 1:
            text += f"({' '.join(cycle)})"
    return text or "e"


def symmetric(n: int) -> Group:
    perms = np.array(list(permutations(range(n))), dtype=np.int16)
    return Group(f"S{n}", perms, _table_of(perms), tuple(map(_cycles, perms)))


def alternating(n: int) -> Group:
    perms = np.array(list(permutations(range(n))), dtype=np.int16)
    pairs = np.triu(np.ones((n, n), dtype=bool), 1)
    inversions = ((perms[:, :, None] > perms[:, None, :]) & pairs).sum(axis=(1, 2))
    perms = perms[inversions % 2 == 0]
    return Group(f"A{n}", perms, _table_of(perms), tuple(map(_cycles, perms)))


def cyclic(n: int) -> Group:
    """Z_n: addition modulo n, k as the rotation i -> i + k of n points."""
    k = np.arange(n)
    total = np.add.outer(k, k) % n
    return Group(f"Z{n}", total.astype(np.int16), total.astype(_small(n)), tuple(map(str, range(n))))


def dihedral(n: int) -> Group:
    """D_n: the 2n symmetries of an n-gon; r^k: i -> k + i and r^k s: i -> k - i on its corners."""
    flip, k = np.divmod(np.arange(2 * n), n)
    sign = (1 - 2 * flip)[:, None]
    perms = (k[:, None] + sign * np.arange(n)) % n
    table = (flip[:, None] ^ flip) * n + (k[:, None] + sign * k) % n
    names = [f"r{j}" for j in range(n)] + [f"r{j}s" for j in range(n)]
    return Group(f"D{n}", perms.astype(np.int16), table.astype(_small(2 * n)), tuple(names))


def direct_product(left: Group, right: Group) -> Group:
    """Pairs (a, b) with index a * right.order + b, multiplied factor by factor."""
    order = left.order * right.order
    a, b = np.divmod(np.arange(order), right.order)
    table = left.table[np.ix_(a, a)].astype(np.int64) * right.order + right.table[np.ix_(b, b)]
    degree = left.permutations.shape[1]
    perms = np.concatenate([left.permutations[a], right.permutations[b] + degree], axis=1).astype(np.int16)
    names = tuple(f"{left.names[i]},{right.names[j]}" for i, j in zip(a.tolist(), b.tolist(), strict=True))
    return Group(f"{left.name}_x_{right.name}", perms, table.astype(_small(order)), names)


# Family -> how to make it, its smallest n, its order.
_FAMILIES = {
    "S": (symmetric, 2, factorial),
    "A": (alternating, 3, lambda n: factorial(n) // 2),
    "Z": (cyclic, 2, lambda n: n),
    "D": (dihedral, 3, lambda n: 2 * n),
}


@lru_cache(maxsize=32)
def parse_group(name: str) -> WordProblem:
    """The word problem of a name, in the notation of the paper's programs.

    Args:
        name: `S5`, `A5`, `Z60`, `D4`; products `A4_x_Z5`, any number of factors. On one S_n or A_n,
            `_limit_to_<m>`: words of permutations that move at most m points, the identity among them; on
            S_n `_only_swaps`, which is `_limit_to_2` (the authors': transpositions and the identity).
            Then `_<t>_tokens`: each element is t tokens, the same one repeated; `_<t>_tokens_s_token`: one and
            t - 1 fillers. The former has a label at every token, the latter at the last of each element (the
            authors let the model predict fillers, which says nothing). The other way round in each case:
            `_<t>_tokens_last` and `_<t>_tokens_s_token_only_input`.

    Raises:
        ConfigError: no such name, or more than `MAX_ORDER` elements.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise _unknown(name)
    factors = match["group"].split("_x_")
    _check_factors(name, factors)
    group = reduce(direct_product, [_FAMILIES[factor[0]][0](int(factor[1:])) for factor in factors])
    alphabet = np.arange(group.order)
    if match["alphabet"]:
        limit = int(match["limit"] or 2)
        _check_limit(name, factors, match["alphabet"], limit)
        alphabet = np.flatnonzero(group.moved <= limit)
    tokens = int(match["tokens"] or 1)
    if match["tokens"] and tokens < 2:
        raise ConfigError(f"data.group = {name!r}: an element needs at least 2 tokens in _<t>_tokens; drop it")
    spelling = match["spelling"] or ""
    filler = spelling.startswith("_s_token")
    return WordProblem(name, group, alphabet, tokens, filler, spelling in ("_last", "_s_token"))


def _check_factors(name: str, factors: list[str]) -> None:
    total = 1
    for factor in factors:
        _, least, order = _FAMILIES[factor[0]]
        n = int(factor[1:])
        if n < least:
            other = "; D2 is Z2_x_Z2" if factor == "D2" else ""
            raise ConfigError(f"data.group = {name!r}: {factor} must be at least {factor[0]}{least}{other}")
        # n bounds the order of every family from below: 5000! need not be computed.
        total *= order(n) if n <= MAX_ORDER and (factor[0] in "ZD" or n < 10) else MAX_ORDER + 1
    if total > MAX_ORDER:
        raise ConfigError(
            f"data.group = {name!r} has more than {MAX_ORDER:,} elements, the most whose multiplication table "
            "is kept; S7, A7, Z5040 and D2520 are the largest of their kind"
        )


def _check_limit(name: str, factors: list[str], alphabet: str, limit: int) -> None:
    family, n = factors[0][0], int(factors[0][1:])
    if len(factors) > 1 or family not in "SA" or (alphabet == "_only_swaps" and family != "S"):
        allowed = "one S<n>" if alphabet == "_only_swaps" else "one S<n> or A<n>"
        raise ConfigError(f"data.group = {name!r}: {alphabet} goes with {allowed}, such as S5{alphabet}")
    least = 2 if family == "S" else 3
    if not least <= limit <= n:
        raise ConfigError(
            f"data.group = {name!r}: permutations of {factors[0]} move {least} to {n} points, not {limit}"
        )


def _unknown(name: str) -> ConfigError:
    plain = [f"{family}{n}" for family, top in zip("SAZD", (7, 7, 61, 31), strict=True) for n in range(2, top)]
    known = [*plain, "A4_x_Z5", "S3_x_Z2", "S3_x_S3", "A5_x_Z2", "Z2_x_Z2", "D4_x_Z3"]
    for n in range(3, 7):
        for start in (f"S{n}", f"S{n}_only_swaps", *(f"S{n}_limit_to_{m}" for m in range(2, n + 1))):
            known += [start, *(f"{start}_{t}_tokens{end}" for t in range(2, 6) for end in ("", "_s_token", "_last"))]
    written = re.sub(r"(?<=\d)\s*[x×*]\s*(?=[SAZD])", "_x_", name.strip().upper().replace("X", "x"))
    written = re.sub(r"[A-Z_]{4,}", lambda match: match[0].lower(), written)
    # Another letter or number is another group, however alike the names are.
    alike = [one for one in known if one[0] == written[:1] and _NUMBERS.findall(one) == _NUMBERS.findall(written)]
    guess = written if _NAME.fullmatch(written) else nearest(name, alike)
    hint = f"; nearest: {guess!r}" if guess else ""
    return ConfigError(
        f"data.group = {name!r} is not the name of a group{hint}\n"
        "names: S<n>, A<n>, Z<n>, D<n>, products with _x_, then _only_swaps or _limit_to_<m>, then _<t>_tokens"
    )
