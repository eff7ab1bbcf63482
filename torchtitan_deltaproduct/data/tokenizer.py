"""Tokenizers: a folder with tokenizer.json, as Hugging Face writes it, read with the `tokenizers` library.

    tokenizer = load_tokenizer("data/tokenizer")
    ids = tokenizer.encode_batch(["def f(): pass"])          # lists of ids, no special tokens added
    eos = find_eos_id("data/tokenizer")                       # the separator between documents
    token_bytes("data/tokenizer", tokenizer.vocab_size)       # for bits per byte

Text that happens to spell a special token is encoded as text: only `prepare` and `streaming` write
separators.
"""

import hashlib
import json
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as HfTokenizer

from torchtitan_deltaproduct.errors import DataError

# What to copy beside tokenizer.json so that Hugging Face finds a complete tokenizer.
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
# Names of the separator, tried in this order when no configuration file names it.
USUAL_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>")


class Tokenizer:
    """The library's tokenizer with special tokens in text switched off.

    Args:
        path: folder with tokenizer.json.
    """

    def __init__(self, path: str | Path):
        file = tokenizer_file(path)
        try:
            self.inner = HfTokenizer.from_file(str(file))
        except Exception as error:
            raise DataError(
                f"{file} cannot be read as a tokenizer ({error}).\n"
                "Expected the tokenizer.json of a fast tokenizer."
            ) from None
        self.inner.encode_special_tokens = True
        self.inner.no_truncation()
        self.inner.no_padding()
        self.vocab_size = max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without separators."""
        return [enc.ids for enc in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens shown."""
        return self.inner.decode(ids, skip_special_tokens=False)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads the tokenizer of a folder; DataError if there is none or it is damaged."""
    return Tokenizer(path)


def tokenizer_file(path: str | Path) -> Path:
    """`path`/tokenizer.json, or DataError."""
    file = Path(path, "tokenizer.json")
    if not file.is_file():
        raise DataError(
            f"There is no tokenizer.json in {path}.\n"
            "Name a folder that has one, or make it with torchtitan_deltaproduct.data.train_tokenizer."
        )
    return file


def tokenizer_sha256(path: str | Path) -> str:
    """Checksum of tokenizer.json."""
    return hashlib.sha256(tokenizer_file(path).read_bytes()).hexdigest()


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copies tokenizer.json and its companions into the folder `target`; tokenizer.json comes last."""
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in (*COMPANIONS, "tokenizer.json"):
        if Path(source, name).is_file():
            shutil.copyfile(Path(source, name), Path(target, name))


def find_eos_id(path: str | Path, eos: str = "") -> int:
    """Id of the token that separates documents.

    Args:
        path: folder with tokenizer.json.
        eos: the token's text; empty takes `eos_token` of tokenizer_config.json or special_tokens_map.json,
            else the first of `USUAL_EOS` that is a special token.
    """
    inner = HfTokenizer.from_file(str(tokenizer_file(path)))
    special = [token.content for token in inner.get_added_tokens_decoder().values() if token.special]
    shown = ", ".join(special[:8]) or "none"
    name = eos or _configured_eos(Path(path)) or next((name for name in USUAL_EOS if name in special), "")
    if not name:
        raise DataError(
            f"The tokenizer in {path} names no end-of-text token; its special tokens: {shown}.\n"
            "Name one with --eos TOKEN."
        )
    found = inner.token_to_id(name)
    if found is None:
        raise DataError(
            f"The tokenizer in {path} has no token {name!r}; its special tokens: {shown}.\n"
            "Name one of them with --eos TOKEN."
        )
    return found


def _configured_eos(folder: Path) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            try:
                token = json.loads((folder / name).read_text()).get("eos_token")
            except ValueError as error:
                raise DataError(f"{folder / name} is not valid JSON ({error}).") from None
            if token:
                return token["content"] if isinstance(token, dict) else token
    return ""


@lru_cache(maxsize=1)
def byte_level_alphabet() -> frozenset[str]:
    """The 256 characters by which a byte-level vocabulary writes the 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return frozenset(ByteLevel.alphabet())


def token_bytes(path: str | Path, vocab_size: int) -> np.ndarray:
    """UTF-8 bytes that each token stands for: [vocab_size] int32; special tokens count 0.

    Exact for byte-level vocabularies (GPT-2, Llama 3, Qwen, ours), and for SentencePiece ones with byte
    fallback (Llama 2, Mistral) up to the one space that they put before each document.
    """
    file = tokenizer_file(path)
    description = json.loads(file.read_text())
    inner = HfTokenizer.from_file(str(file))
    added = inner.get_added_tokens_decoder()
    parts = json.dumps([description.get("pre_tokenizer"), description.get("decoder")])
    byte_level = '"ByteLevel"' in parts
    table = np.zeros(vocab_size, dtype=np.int32)
    for token, index in inner.get_vocab(with_added_tokens=True).items():
        if index in added:
            table[index] = 0 if added[index].special else len(added[index].content.encode())
        elif byte_level and byte_level_alphabet().issuperset(token):
            table[index] = len(token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            table[index] = 1
        else:
            table[index] = len(token.replace("\u2581", " ").encode())
    return table
