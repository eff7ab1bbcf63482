"""Tokens to text while they come: no character is shown before it is whole, nothing of a stop string ever.

    stream = TextStream(tokenizer, prompt_ids, stops=["\\n\\n"])
    for token in tokens:
        print(stream.push(token), end="", flush=True)
    print(stream.finish())

A token may be part of a character (the bytes of 語 are often three tokens), and a stop string may begin in one token
and end in another: such text is held back until it is certain.
"""

from collections.abc import Sequence

from torchtitan_deltaproduct.data.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What the decoder shows for bytes that are no character (yet)."""
CONTEXT = 16
"""Tokens of the prompt that the decoder sees, so that it knows whether a space stands before the first token."""
MOST_PENDING = 16
"""Tokens held back for an unfinished character; it has 4 bytes at most, so these are none."""


class TextStream:
    """The text of a growing sequence.

    Args:
        tokenizer: whose tokens come.
        prompt: the ids before them, which are not shown.
        stops: strings that end the text; the earliest one and what follows it is never shown.
    """

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
    """Passes text on up to the first of some stop strings; empty ones are ignored.

    Attributes:
        complete: whether one has come.
    """

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
