"""The tokenizer of a loaded model, checked against it.

vocabulary = open_vocabulary(loaded)            # or open_vocabulary(loaded, "data/tokenizer")
ids = vocabulary.encode("def main():")
vocabulary.separator                            # stands between documents; an empty prompt begins with it
"""

from dataclasses import dataclass
from pathlib import Path

from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.data.text.tokenizer import Tokenizer, load_tokenizer
from torchtitan_deltaproduct.errors import ConfigError


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of the training data, the id of the token between its documents, and the tokenizer's folder."""

    tokenizer: Tokenizer
    separator: int
    folder: Path

    @property
    def size(self) -> int:
        """Ids with a text: 0 .. size-1; a model may have more, padded, which it should never say."""
        return self.tokenizer.vocab_size

    def encode(self, text: str) -> list[int]:
        """Token ids, nothing added; text that spells a special token is text."""
        return self.tokenizer.encode_batch([text])[0]


def open_vocabulary(
    loaded: LoadedModel, folder: str | Path | None = None, eos: str = "", option: str = "--eos TOKEN"
) -> Vocabulary:
    """The tokenizer that a model was trained with.

    Args:
        loaded: the model.
        folder: with tokenizer.json; None: the one found beside the model.
        eos, option: text of the separator, and the user's option for it; see `LoadedModel.separator`.

    Raises:
        ConfigError: there is none, or it has more tokens than the model. DataError: it cannot be read, or no separator
            is known.
    """
    where = Path(folder) if folder else loaded.tokenizer
    if where is None:
        raise ConfigError(
            f"{loaded.label} has no tokenizer: there is no tokenizer.json in {loaded.run} or where its data were\n"
            "name the folder of the one it was trained with: --tokenizer FOLDER"
        )
    separator = loaded.separator(where, eos, option)
    tokenizer, most = load_tokenizer(where, separator), loaded.model.args.vocab_size
    if tokenizer.vocab_size > most:
        raise ConfigError(
            f"the tokenizer in {where} is not the model's: it has {tokenizer.vocab_size:,} tokens, {loaded.label} has "
            f"{most:,}\nname the folder of the one it was trained with: --tokenizer FOLDER"
        )
    return Vocabulary(tokenizer, separator, where)
