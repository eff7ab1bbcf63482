"""What `plan` says of the data of a run: what the sets on this machine hold, or what is wrong with them.

    data_rows(config, world_size=8)       # [("training", "data/a", "1.2 B tokens in ...; tokenizer of ..."), ...]

Manifests, sizes and times are looked at, tokens are not read.
"""

from pathlib import Path

from ..config.job import JobConfig
from ..errors import DataError, UserError
from .shards.corpora import open_manifest
from .shards.manifest import NAME as MANIFEST
from .shards.manifest import Manifest
from .shards.verified import file_states
from .text.tokenizer import Tokenizer, tokenizer_sha256

Rows = list[tuple[str, ...]]
"""Lines of text, the first of each a name."""
UNUSABLE = "CANNOT BE USED: "
"""How the text begins of data that a run would refuse."""


def data_rows(config: JobConfig, world_size: int) -> Rows:
    """The training and validation sets as they are on this machine: what they hold, or what is wrong with them."""
    if config.data.kind == "streaming":
        shown = config.data.dataset + (f" ({config.data.dataset_config})" if config.data.dataset_config else "")
        rows = [("streamed", shown, f"split {config.data.split}, not opened here")]
        return rows + _tokenizer_rows(config) + _validation_rows(config)
    if config.data.kind != "prepared":
        return [("generated", config.data.group or config.data.language, "from data.seed; nothing is read")]
    windows, rows = [], []
    for path in config.data.paths:
        manifest, row = _set_row("training", path, config)
        rows.append(row)
        windows.append(manifest.tokens // config.training.seq_len if manifest else 0)
    samples = config.training.samples_per_step(config.data_ranks(world_size)) * config.training.steps
    if all(windows):
        shares = config.data.weights or windows
        for path, own, share in zip(config.data.paths, windows, shares, strict=True):
            epochs = samples * share / sum(shares) / own
            remark = f"of {path}: {own:,} windows of {config.training.seq_len:,} tokens"
            rows.append(("epochs", f"{epochs:.3g}", remark))
    return rows + _validation_rows(config)


def _validation_rows(config: JobConfig) -> Rows:
    validation = config.validation
    rows = [_set_row("validation", path, config)[1] for path in (validation.paths if validation.enable else [])]
    if prompts := len(validation.prompts):
        words = f"{validation.sample_tokens} tokens each, greedy and sampled, every {validation.freq:,} steps"
        rows.append(("samples", f"{prompts} prompt{'s' * (prompts > 1)}", words))
    return rows


def _set_row(name: str, path: str, config: JobConfig) -> tuple[Manifest | None, tuple[str, ...]]:
    """The manifest of a prepared folder, None if it cannot be trained on, and the row that tells of it."""
    try:
        manifest = open_manifest(path, config.model.hf_assets_path, config.data.eos)
        if Path(path, MANIFEST).is_file():
            file_states(Path(path), manifest)
            if tokenizer_sha256(Path(path, "tokenizer")) != manifest.tokenizer_sha256:
                raise DataError(f"its tokenizer is not the one it was prepared with; copy {path} again")
        if manifest.vocab_size > config.model.vocab_size:
            raise DataError(
                f"has token ids up to {manifest.vocab_size - 1:,}, but model.vocab_size = {config.model.vocab_size:,}"
            )
        if manifest.tokens < config.training.seq_len:
            raise DataError(f"has {manifest.tokens:,} tokens, less than one window of {config.training.seq_len:,}")
    except UserError as error:
        return None, (name, path, f"{UNUSABLE}{str(error).splitlines()[0]}")
    unused = config.model.vocab_size - manifest.vocab_size
    fits = f"tokenizer of {manifest.vocab_size:,}, {unused:,} rows of the embedding unused"
    return manifest, (name, path, f"{manifest.counts()}; {fits}")


def _tokenizer_rows(config: JobConfig) -> Rows:
    folder = config.model.hf_assets_path
    try:
        size = Tokenizer(folder).vocab_size
    except (UserError, OSError) as error:
        return [("tokenizer", folder, f"{UNUSABLE}{str(error).splitlines()[0]}")]
    wrong = UNUSABLE if size > config.model.vocab_size else ""
    return [("tokenizer", folder, f"{wrong}{size:,} tokens, model.vocab_size = {config.model.vocab_size:,}")]
