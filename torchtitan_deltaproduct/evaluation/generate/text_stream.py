"""Tokens to text while they come: no character is shown before it is whole, nothing of a stop string ever.

    stream = TextStream(tokenizer, prompt_ids, stops=["\\n\\n"])
    for token in tokens:
        print(stream.push(token), end="", flush=True)
        if stream.stopped:
            break
    print(stream.finish())

A token may be part of a character (the bytes of 語 are often three tokens), and a stop string may begin in one token
and end in another: such text is held back until it is certain.
"""

from tokenizers.decoders import DecodeStream

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

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: list[str] | tuple[str, ...] = ()):
        self.tokenizer = tokenizer
        self.stops = StopStrings(stops)
        self._restart(prompt[-CONTEXT:])

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self.stops.found

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come; often empty."""
        self.pending.append(token)
        try:
            text = self.decoder.step(self.tokenizer.inner, token)
        except Exception:
            # Bytes that are no character can change how the bytes before them look; those have been shown.
            text = self._flush()
        if text is None and len(self.pending) >= MOST_PENDING:
            text = self._flush()
        if text is None:
            return ""
        if self.pending:
            self.before, self.pending = self.pending, []
        return self.stops.push(text)

    def finish(self) -> str:
        """The text still held back, when no more tokens come."""
        text = self._flush() if self.pending else ""
        return self.stops.push(text) + self.stops.finish()

    def _restart(self, before: list[int]) -> None:
        # A decoder takes a prompt whose text ends in the replacement character for unfinished, and would show it.
        if before and self.tokenizer.decode(before).endswith(REPLACEMENT):
            before = []
        self.before, self.pending = before, []
        self.decoder = DecodeStream(ids=before, skip_special_tokens=False)

    def _flush(self) -> str:
        """The text of the pending tokens as it is."""
        known, text = self.tokenizer.decode(self.before), self.tokenizer.decode(self.before + self.pending)
        new = text[len(known) :] if text.startswith(known) else self.tokenizer.decode(self.pending)
        self._restart(self.pending)
        return new


class StopStrings:
    """Passes text on up to the first stop string.

    Args:
        stops: the strings; empty ones are ignored.
    """

    def __init__(self, stops: list[str] | tuple[str, ...]):
        self.stops = [stop for stop in stops if stop]
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The part of the text so far that can no longer belong to a stop string and was not passed on before."""
        if self.found:
            return ""
        text = self.held + text
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self.held = True, ""
            return text[: min(places)]
        certain = len(text) - self._beginning(text)
        self.held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        text, self.held = self.held, ""
        return text

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max((len(stop) for stop in self.stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stops)), 0)
