"""Tokenizers: a folder with tokenizer.json, as Hugging Face writes it, read with the `tokenizers` library.

    tokenizer = load_tokenizer("data/tokenizer")
    ids = tokenizer.encode_batch(["def f(): pass"])          # lists of ids, no special tokens added
    eos = find_eos_id("data/tokenizer")                       # the separator between documents
    copy_tokenizer("data/tokenizer", "outputs/run/tokenizer", eos)      # a copy that names this separator as its own
    token_bytes("data/tokenizer", tokenizer.vocab_size, eos)  # for bits per byte

Text that happens to spell a special token, or the separator, is encoded as text: only `prepare` and `streaming` write
separators.
"""

import hashlib
import json
import re
import shutil
from array import array
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from torchtitan_deltaproduct.errors import DataError

# What to copy beside tokenizer.json so that Hugging Face finds a complete tokenizer.
COMPANIONS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
MOST_UNKNOWN = 0.01
"""Share of unknown tokens up to which text is taken for what the tokenizer was made for."""
# Those that name the separator, the one that counts first.
NAMING = ("tokenizer_config.json", "special_tokens_map.json")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Names of the separator, tried in this order when no configuration file names it.
USUAL_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>")

PIECE, PIECES_AT_ONCE = 1 << 16, 8
"""Characters of a long text that are encoded together at least, and how many such pieces at once."""
BETWEEN_WORDS = re.compile(r"(?<=[^\W_])(?=[ \n][^\W_])")
CONTEXT, MOST_PLACES = 128, 64
"""Characters on either side that are looked at to cut a text, and places that are tried."""
BYTE_ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())
"""The 256 characters by which a byte-level vocabulary writes the 256 bytes."""
LOCAL_NORMALIZERS = (None, "NFC", "NFD", "NFKC", "NFKD")


class Tokenizer:
    """The library's tokenizer of a folder with special tokens in text switched off, and the separator too.

    The separator is `eos_id`, or the one that the folder names. `vocab_size` is one more than the largest id.

    Raises:
        DataError: there is no tokenizer.json, or it is damaged.
    """

    def __init__(self, path: str | Path, eos_id: int | None = None):
        self.inner = _read(path)
        self.inner.encode_special_tokens = True
        self.inner.no_truncation()
        self.inner.no_padding()
        self.vocab_size = max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        # Of the token that stands for text the vocabulary cannot write.
        self.unknown_id = _unknown_id(self.inner)
        # Where such text leaves no token at all, as in BPE without bytes, the characters that are known.
        self.alphabet = _alphabet(self.inner)
        self.is_local = _is_local(self.inner)
        separator = named_eos_id(path) if eos_id is None else eos_id
        added = self.inner.get_added_tokens_decoder().get(separator)
        if added is not None and not added.special:
            # An ordinary added token is cut out of the text it stands in; a special one is not (see above).
            self.inner.add_special_tokens([AddedToken(added.content, special=True, normalized=False)])

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without separators; DataError if the vocabulary can write one not even as unknown."""
        return [list(ids) for ids in self.encode_documents(texts)]

    def encode_documents(self, texts: list[str]) -> list[list[int] | array]:
        """As `encode_batch`; in arrays if a text is long, which is encoded in pieces.

        The library needs 135 bytes of memory for each byte of what it encodes at once.
        """
        if all(len(text) <= PIECE for text in texts):
            return self._encode(texts)
        ids = [array("I") for _ in texts]
        for text, tokens in zip(texts, ids, strict=True):
            pieces = self.pieces(text)
            while some := list(islice(pieces, PIECES_AT_ONCE)):
                for part in self._encode(some):
                    tokens.extend(part)
        return ids

    def pieces(self, text: str) -> Iterator[str]:
        """A text in pieces whose tokens, one after the other, are those of the text.

        Between two words, before the space or line break, where the pre-tokenizer cuts too and makes the same of either
        side alone; not at all where what it does depends on more than the place, or something else may join the sides.
        """
        start = 0
        while self.is_local and len(text) - start > PIECE:
            places = islice(BETWEEN_WORDS.finditer(text, start + PIECE), MOST_PLACES)
            cut = next((place.start() for place in places if self._cuts(text, place.start())), None)
            if cut is None:
                break
            yield text[start:cut]
            start = cut
        yield text[start:]

    def _cuts(self, text: str, place: int) -> bool:
        left, right = text[max(0, place - CONTEXT) : place], text[place : place + CONTEXT]
        whole, before, after = map(self.inner.pre_tokenizer.pre_tokenize_str, (left + right, left, right))
        return whole == before + [(piece, (a + len(left), b + len(left))) for piece, (a, b) in after]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        try:
            return [enc.ids for enc in self.inner.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"the tokenizer cannot write the text: {error}; use one that can") from None

    def count_unknown(self, text: str, ids: list[int]) -> int:
        """Unknown tokens among the ids of a text; where the vocabulary drops what it cannot write, characters lost."""
        if self.alphabet is None:
            return ids.count(self.unknown_id)
        text = self.inner.normalizer.normalize_str(text) if self.inner.normalizer else text
        if self.inner.pre_tokenizer:
            # It may write bytes, or spaces, by other characters.
            text = "".join(piece for piece, _ in self.inner.pre_tokenizer.pre_tokenize_str(text))
        return sum(not (char in self.alphabet or char.isspace()) for char in text)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens shown."""
        return self.inner.decode(ids, skip_special_tokens=False)


load_tokenizer = Tokenizer


def _read(path: str | Path) -> HfTokenizer:
    file = tokenizer_file(path)
    try:
        # Not by the library's own reading of a path, which must be UTF-8.
        return HfTokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"{file} cannot be read as a tokenizer ({error}); expected the tokenizer.json of a fast tokenizer"
        ) from None


def _unknown_id(inner: HfTokenizer) -> int | None:
    if isinstance(inner.model, models.Unigram):
        return json.loads(inner.to_str())["model"]["unk_id"]
    name = getattr(inner.model, "unk_token", None)
    return None if name is None else inner.token_to_id(name)


def _is_local(inner: HfTokenizer) -> bool:
    """Whether tokens never reach beyond what the pre-tokenizer cuts out, and that may be looked at piece by piece."""
    normalizer = None if inner.normalizer is None else type(inner.normalizer).__name__
    # Special tokens in text are text here (see the module).
    added = [token for token in inner.get_added_tokens_decoder().values() if not token.special]
    reaching = any(t.lstrip or t.rstrip or t.single_word or any(map(str.isspace, t.content)) for t in added)
    return inner.pre_tokenizer is not None and normalizer in LOCAL_NORMALIZERS and not reaching


def _alphabet(inner: HfTokenizer) -> frozenset[str] | None:
    """The characters of a BPE vocabulary that has neither bytes nor an unknown token; None for every other one."""
    if getattr(inner.model, "byte_fallback", True) or _unknown_id(inner) is not None:
        return None
    characters = frozenset("".join(inner.get_vocab(with_added_tokens=False)))
    return None if characters >= BYTE_ALPHABET else characters


def tokenizer_file(path: str | Path) -> Path:
    file = Path(path, "tokenizer.json")
    if file.is_file():
        return file
    if HUB_NAME.fullmatch(str(path)) and not Path(path).parent.exists():
        folder = f"data/{Path(path).name}"
        raise DataError(
            f"There is no folder {path}. If the hub has a tokenizer of that name, fetch it and name {folder}:\n"
            f'hf download {path} --include "*token*" --local-dir {folder}'
        )
    raise DataError(
        f"There is no tokenizer.json in {path}.\n"
        "Name a folder that has one, or make it with torchtitan_deltaproduct.data.train_tokenizer."
    )


def tokenizer_sha256(path: str | Path) -> str:
    return hashlib.sha256(tokenizer_file(path).read_bytes()).hexdigest()


def copy_tokenizer(source: str | Path, target: str | Path, eos_id: int | None = None) -> None:
    """Copies tokenizer.json and its companions into the folder `target`; tokenizer.json comes last.

    The copy names the separator `eos_id` as its `eos_token`, whatever `source` names; DataError if it has none such.
    """
    name = ""
    if eos_id is not None and named_eos_id(source) != eos_id:
        name = _read(source).id_to_token(eos_id)
        if name is None:
            raise DataError(f"the tokenizer in {source} has no token {eos_id}, the separator of the model or data")
    Path(target).mkdir(parents=True, exist_ok=True)
    for file in (*COMPANIONS, "tokenizer.json"):
        if name and file in NAMING:
            # The first is made where there is none, and must name a class then.
            least = {"tokenizer_class": "PreTrainedTokenizerFast"} if file == NAMING[0] else {}
            if known := least | _read_names(Path(source, file)):
                text = json.dumps(known | {"eos_token": name}, indent=1) + "\n"
                Path(target, file).write_text(text, encoding="utf-8")
        elif Path(source, file).is_file():
            shutil.copyfile(Path(source, file), Path(target, file))


def same_tokenizer(source: str | Path, target: str | Path, eos_id: int | None) -> bool:
    """Whether `target` holds all that `copy_tokenizer` would make of `source`."""
    with suppress(DataError):
        return tokenizer_sha256(source) == tokenizer_sha256(target) and eos_id in (None, named_eos_id(target))
    return False


def find_eos_id(path: str | Path, eos: str = "", option: str = "--eos TOKEN") -> int:
    """Id of the token that separates documents: `eos`, or the one that the folder names, or a usual special token.

    `option` is what a user can set, for messages.
    """
    inner = _read(path)
    special = [token.content for token in inner.get_added_tokens_decoder().values() if token.special]
    shown = f"its special tokens: {', '.join(special[:8]) or 'none'}"
    name = eos or _named_eos(Path(path)) or next((name for name in USUAL_EOS if name in special), "")
    if not name:
        raise DataError(f"The tokenizer in {path} names no end-of-text token; {shown}.\nName one with {option}.")
    index = inner.token_to_id(name)
    if index is None:
        raise DataError(f"The tokenizer in {path} has no token {name!r}; {shown}.\nName one of them with {option}.")
    return index


def named_eos_id(path: str | Path) -> int | None:
    """Id of the `eos_token` that the folder's configuration names; None if it names none that exists."""
    name = _named_eos(Path(path))
    return _read(path).token_to_id(name) if name else None


def _named_eos(folder: Path) -> str:
    for name in NAMING:
        token = _read_names(folder / name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token and not isinstance(token, str):
            raise DataError(f"{folder / name} has an eos_token of type {type(token).__name__}; expected a token's text")
        if token:
            return token
    return ""


def _read_names(file: Path) -> dict:
    """What a configuration file of a tokenizer says; nothing if there is none."""
    if not file.is_file():
        return {}
    try:
        names = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON ({error}); copy the tokenizer again") from None
    if not isinstance(names, dict):
        raise DataError(f"{file} holds a JSON {type(names).__name__}; expected an object with eos_token")
    return names


def token_bytes(path: str | Path, vocab_size: int, eos_id: int | None = None) -> np.ndarray:
    """UTF-8 bytes that each token stands for: [vocab_size] int32; special tokens and the separator count 0.

    Exact for byte-level vocabularies without a normaliser (GPT-2, Llama 3, ours), and for SentencePiece ones with byte
    fallback (Llama 2, Mistral) up to the one space that they put before each document. Where a normaliser changes the
    text, or unknown tokens stand for some, only the manifest knows the bytes (`held_out.HeldOutWindows`).
    """
    description, inner = json.loads(tokenizer_file(path).read_text(encoding="utf-8")), _read(path)
    added = inner.get_added_tokens_decoder()
    byte_level = '"ByteLevel"' in json.dumps([description.get("pre_tokenizer"), description.get("decoder")])
    table = np.zeros(vocab_size, dtype=np.int32)
    for token, index in inner.get_vocab(with_added_tokens=True).items():
        if index == eos_id:
            continue
        if index in added:
            table[index] = 0 if added[index].special else len(added[index].content.encode())
        elif byte_level and BYTE_ALPHABET.issuperset(token):
            table[index] = len(token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            table[index] = 1
        else:
            table[index] = len(token.replace("\u2581", " ").encode())
    return table
