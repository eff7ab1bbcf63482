"""Ranges and contradictions."""
import os
from dataclasses import dataclass
from .problems import Problem


@dataclass(frozen=True)
class Environment:
    """What is known of the machine a config is to run on; None where it is not."""

    world_size: int | None = None
    cuda: bool | None = None

    @classmethod
    def detect(cls) -> "Environment":
        import torch

        return cls(int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available())


def check(config, sources, environment, unusable=frozenset()) -> list[Problem]:
    return []
