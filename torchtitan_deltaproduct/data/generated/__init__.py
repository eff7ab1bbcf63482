"""Sequences made from a seed alone: words over a group (`group_words`) and formal languages (`languages`)."""

from torchtitan_deltaproduct.errors import ConfigError

SPLITS = ("train", "validation", "test")
GENERATOR = 1
"""Version of the numbers drawn: part of `order`, so that a checkpoint refuses other ones."""


class Generated:
    """What the sources of this room share: sample i is a pure function of (seed, split, i); nothing is stored."""

    name: str
    seq_len: int
    seed: int
    split: str
    """One of `SPLITS`: streams that are drawn under different keys."""
    tokenizer_path = ""

    def check_split(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"no stream {self.split!r}: there are {', '.join(SPLITS)}")

    def shared_order(self) -> dict[str, object]:
        return {"seed": self.seed, "split": self.split, "seq_len": self.seq_len, "generator": GENERATOR}

    def epochs(self, sample: int) -> dict[str, float]:
        """None is ever completed: the data is endless."""
        return {self.name: 0.0}
