"""Text to tokens and back, by the tokenizer of a loaded model: what comes back is shown as soon as it is certain.

    vocabulary = open_vocabulary(loaded)            # or open_vocabulary(loaded, "data/tokenizer")
    prompt = vocabulary.encode("def main():")
    stream = TextStream(vocabulary.tokenizer, prompt, stops=["\\n\\n"])
    for token in tokens: print(stream.push(token), end="", flush=True)
    print(stream.finish())

A token may be part of a character (the bytes of 語 are often three tokens), and a stop string may begin in one token
and end in another: such text is held back until it is certain.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.data.text.tokenizer import Tokenizer, load_tokenizer
from torchtitan_deltaproduct.errors import ConfigError

REPLACEMENT = "\ufffd"
"""What the decoder shows for bytes that are no character (yet)."""
CONTEXT = 16
"""Tokens of the prompt that the decoder sees, so that it knows whether a space stands before the first token."""
MOST_PENDING = 16
"""Tokens held back for an unfinished character; it has 4 bytes at most, so these are none."""


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
    """The tokenizer of a folder (None: the one found beside the model); for the rest see `LoadedModel.separator`.

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


class TextStream:
    """The text of tokens that come after a prompt, up to the earliest of some stop strings, which is never shown."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, StopStrings(stops)
        before = prompt[-CONTEXT:]
        # Bytes that are no character would be taken for the beginning of one.
        self.before = [] if tokenizer.decode(before).endswith(REPLACEMENT) else before
        self.pending: list[int] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self.stops.complete

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come; often empty."""
        self.pending.append(token)
        text = self.tokenizer.decode(self.before + self.pending)
        if text.endswith(REPLACEMENT) and len(self.pending) < MOST_PENDING:
            return ""
        return self.stops.push(self._take(text))

    def finish(self) -> str:
        """The text still held back, when no more tokens come."""
        text = self._take(self.tokenizer.decode(self.before + self.pending)) if self.pending else ""
        return self.stops.push(text) + self.stops.finish()

    def _take(self, text: str) -> str:
        """What the pending tokens add to the text before them; these are then the ones before."""
        known = self.tokenizer.decode(self.before)
        # Bytes that are no character can change how those before them look, which have been shown.
        new = text[len(known) :] if text.startswith(known) else self.tokenizer.decode(self.pending)
        self.before, self.pending = self.pending, []
        return new


class StopStrings:
    """Passes text on up to the first of some stop strings (`complete`: one has come); empty ones are ignored."""

    def __init__(self, stops: Sequence[str]):
        self.stops = [stop for stop in stops if stop]
        self.held, self.complete = "", False

    def push(self, text: str) -> str:
        """The part of the text so far that can no longer belong to a stop string and was not passed on before."""
        if self.complete:
            return ""
        text = self.held + text
        end = min((place for stop in self.stops if (place := text.find(stop)) >= 0), default=None)
        self.complete = end is not None
        if end is None:
            end = len(text) - self._beginning(text)
        self.held = "" if self.complete else text[end:]
        return text[:end]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        text, self.held = self.held, ""
        return text

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(map(len, self.stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stops)), 0)
