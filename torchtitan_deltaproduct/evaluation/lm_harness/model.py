"""A checkpoint of ours as a model of lm-eval; registered as "deltaproduct". Needs lm-eval: see `eval.lm_harness`.

    lm = DeltaProductHarness("outputs/run", step=500, dtype="float32")
    lm_eval.simple_evaluate(lm, tasks=["lambada_openai"])

Nothing is ever truncated: the state is carried along contexts and documents of any length, also beyond the training
length. A context that is not empty is taken as it is; an empty one is the separator, as before a document in
training, and `loglikelihood_rolling` begins with it.
"""

import logging
import os
import re
import sys
from collections import defaultdict

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from torchtitan_deltaproduct.checkpoint.load import load_model
from torchtitan_deltaproduct.errors import ConfigError, DataError

from ..generate.decoding import Settings, continue_prompts
from ..generate.sampling import Sampling
from ..generate.vocabulary import open_vocabulary
from ..options import DTYPES, dtype_of, need_cuda
from ..swept import made_by
from .scoring import SEGMENT, Request, Score, score

NAME = "deltaproduct"
MAX_GEN_TOKS = 256
"""Tokens generated where a task does not say how many, as in lm-eval's own models."""
GENERATED_ROWS = 64
"""Prompts continued at a time with `batch_size=auto`."""
NO_TEMPLATE = "--apply_chat_template: a pretrained model has no chat template; leave it out"
UNDERSTOOD = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}

logger = logging.getLogger("lm_eval")


@register_model(NAME)
class DeltaProductHarness(TemplateLM):
    """What lm-eval asks of a model. The arguments are those of `--model_args`.

    Args:
        pretrained: run folder, one of its checkpoint/step-N, or Hugging Face folder.
        step: of a run folder; None: the newest complete one.
        device: "cpu", "cuda", "cuda:1", ...; None: cuda if there is one. Under torchrun each rank takes its own.
        dtype: auto (bfloat16 on cuda, float32 on cpu), float32, bfloat16 or float64.
        batch_size: rows of a batch; "auto": by the number of tokens.
        max_batch_size: the most rows with "auto".
        tokenizer: folder with tokenizer.json; None: the model's.
        eos: text of the separator of documents; empty: that of training.
        add_bos_token: begin every context with the separator, not only empty ones.
        segment: tokens of a text read at a time.
        trust_remote_code: what lm-eval adds for data sets; code that comes with a model is never run.

    Raises:
        ConfigError: an argument that does not exist or cannot be. CheckpointError: the model cannot be loaded.
    """

    def __init__(
        self, pretrained: str | None = None, step: int | None = None, device: str | None = None, dtype: str = "auto",
        batch_size: int | str = "auto", max_batch_size: int | None = None, tokenizer: str | None = None, eos: str = "",
        add_bos_token: bool = False, segment: int = SEGMENT, trust_remote_code: bool = False, **unknown,
    ):  # fmt: skip
        super().__init__()
        if unknown:
            raise ConfigError(f"--model_args {', '.join(unknown)}: no such argument; there are {', '.join(ARGUMENTS)}")
        if pretrained is None:
            raise ConfigError("no model is named: expected a run, checkpoint/step-N or Hugging Face folder")
        if dtype not in DTYPES:
            raise ConfigError(f"--model_args dtype={dtype}: expected {', '.join(DTYPES)}")
        # lm-eval's `auto:N` means here the same as `auto`.
        automatic = str(batch_size).split(":")[0] == "auto"
        self.rows = None if automatic else _whole("batch_size", batch_size)
        self.most_rows = None if max_batch_size is None else _whole("max_batch_size", max_batch_size)
        self.segment = _whole("segment", segment)
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if self._world_size > 1 and not dist.is_initialized():
            # lm-eval gives each rank its share of the documents.
            dist.init_process_group("gloo")
        self._rank = dist.get_rank() if self._world_size > 1 else 0
        self._device = _device(device)
        step = None if step is None else _whole("step", step)
        self.loaded = load_model(str(pretrained), step, self._device, dtype_of(dtype, self._device.type))
        self.vocabulary = open_vocabulary(self.loaded, tokenizer, str(eos), "--model_args eos=TOKEN")
        self.before = [self.vocabulary.separator] if add_bos_token else []

    @property
    def eot_token_id(self) -> int:
        return self.vocabulary.separator

    @property
    def tokenizer_name(self) -> str:
        return str(self.vocabulary.folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        ids = self.vocabulary.encode(string)
        return ids if add_special_tokens is False else self.before + ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        texts = [request.args for request in requests]
        return self._score("loglikelihood", texts, [self._pair(*text) for text in texts], disable_tqdm)

    def _pair(self, context: str, continuation: str) -> Request:
        """Context and continuation as tokens: encoded as one text and cut, as lm-eval does, else each by itself.

        Where the two merge into a token, a cut would score another text than the continuation, or none, which would
        have the probability 1.
        """
        if context == "":
            before, scored = [self.eot_token_id], self.tok_encode(continuation, add_special_tokens=False)
        else:
            # As in lm-eval, blanks between the two belong to the continuation.
            stem = context.rstrip()
            before, whole = self.tok_encode(stem), self.tok_encode(context + continuation)
            scored = whole[len(before) :] if whole[: len(before)] == before else []
            scored = scored or self.tok_encode(context[len(stem) :] + continuation, add_special_tokens=False)
        self._check_scored(continuation, scored)
        return before or [self.eot_token_id], scored

    def _check_scored(self, text: str, ids: list[int]) -> None:
        """Raises DataError if the tokenizer makes nothing of a text that is not empty."""
        if text and not ids:
            raise DataError(f"{text!r} has no tokens in {self.tokenizer_name}, so it has no probability")

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False, **kwargs) -> list[Score]:
        """Of requests that are ((context, continuation), their ids, its ids); lm-eval wants it to be there."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._score("loglikelihood", [text for text, _, _ in requests], pairs, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args for request in requests]
        pairs = [([self.eot_token_id], self.vocabulary.encode(text)) for (text,) in texts]
        for (text,), (_, ids) in zip(texts, pairs, strict=True):
            self._check_scored(text, ids)
        return [logprob for logprob, _ in self._score("loglikelihood_rolling", texts, pairs, disable_tqdm)]

    def _score(self, kind: str, texts: list[tuple], pairs: list[Request], disable_tqdm: bool) -> list[Score]:
        """Scores and, for `--use_cache`, hands each result to lm-eval as it is known."""
        with self._bar(kind, len(pairs), disable_tqdm) as bar:

            def progress(place: int, scored: Score) -> None:
                bar.update()
                self.cache_hook.add_partial(kind, texts[place], scored if kind == "loglikelihood" else scored[0])

            return score(self.loaded.model, pairs, self.rows, self.segment, progress, self.most_rows)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        alike: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items()))].append(place)
        answers, rows = [""] * len(requests), self.rows or min(GENERATED_ROWS, self.most_rows or GENERATED_ROWS)
        # Random choices depend on --seed and on the place of the request, not on the batches.
        seed = torch.initial_seed() % 2**32
        with self._bar("generate_until", len(requests), disable_tqdm) as bar:
            for places in alike.values():
                settings = self._settings(requests[places[0]].args[1])
                places.sort(key=lambda place: -len(prompts[place]))
                for first in range(0, len(places), rows):
                    batch = places[first : first + rows]
                    inputs, seeds = [prompts[place] for place in batch], [seed + place for place in batch]
                    texts = continue_prompts(self.loaded.model, self.vocabulary, inputs, settings, seeds)
                    for place, text in zip(batch, texts, strict=True):
                        answers[place] = text.text
                        self.cache_hook.add_partial("generate_until", requests[place].args, text.text)
                    bar.update(len(batch))
        return answers

    def _settings(self, asked: dict) -> Settings:
        """What a task's generation_kwargs and `--gen_kwargs` ask for."""
        # A task may write null for what it leaves open.
        asked = normalize_gen_kwargs({key: value for key, value in asked.items() if value is not None}, MAX_GEN_TOKS)
        others = {name: value for name, value in asked.items() if name not in UNDERSTOOD}
        if others and str(others) not in _warned:
            _warned.add(str(others))
            logger.warning("generation arguments that are not supported are left out: %s", others)
        # As elsewhere, do_sample alone means a temperature of 1.
        temperature = float(asked.get("temperature", 1.0 if asked["do_sample"] else 0.0))
        sampling = Sampling(temperature, int(asked.get("top_k", 0)), float(asked.get("top_p", 1.0)))
        return Settings(asked["max_gen_toks"], asked["until"], sampling, segment=self.segment)

    def _bar(self, kind: str, total: int, disable: bool) -> tqdm:
        return tqdm(total=total, desc=f"Running {kind} requests", disable=disable or self.rank != 0)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if chat_template:
            raise ConfigError(NO_TEMPLATE)
        return None

    def get_model_info(self) -> dict:
        """What lm-eval writes into its results beside the scores."""
        model = self.loaded.model
        return {
            "model_num_parameters": sum(p.numel() for p in model.parameters()),
            "model_dtype": str(model.tok_embeddings.weight.dtype),
            "model_label": self.loaded.label,
            "model_step": self.loaded.step,
            "train_length": self.loaded.train_length,
            "tokenizer": self.tokenizer_name,
            "made_by": made_by(sys.argv[1:], [self.loaded]),
        }

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world_size == 1:
            return tensor
        tensors: list = [None] * self.world_size
        dist.all_gather_object(tensors, tensor.cpu().reshape(-1))
        return torch.cat(tensors)

    def gather_object(self, obj, dst: int = 0) -> list | None:
        if self.world_size == 1:
            return [obj]
        objects = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, objects, dst=dst)
        return objects

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


ARGUMENTS = list(DeltaProductHarness.__init__.__annotations__)
_warned: set[str] = set()


def _whole(name: str, value) -> int:
    if not re.fullmatch("[1-9][0-9]*", str(value)):
        raise ConfigError(f"{name}={value}: expected a whole number of at least 1")
    return int(value)


def _device(asked: str | None) -> torch.device:
    """That of --device; under torchrun `cuda` is one for each rank."""
    name = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"--device {name}: expected cpu, cuda or cuda:N")
    need_cuda(name)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
