"""Is the data of a run there, undamaged, and such that the model has a row for every token?

    identity = check_data(config)      # ["3f0a...", ...], a checksum of each training set; errors say what is wrong

Called before any process group starts, by the launchers on the machine that submits and by every rank.
"""

from ..config.job import JobConfig
from ..errors import ConfigError
from . import GENERATED
from .generated import GENERATOR
from .held_out import held_out_lengths
from .shards.prepared import open_streams


def check_data(config: JobConfig) -> list[str] | None:
    """Checksums of the prepared training sets, after a check that every token id has a row in the embedding.

    Generated data has the version of its generator instead: the rest of what decides it is in `[data]`.

    Raises:
        DataError: a set is missing or damaged, or of another tokenizer or separator than the first. ConfigError:
            `model.vocab_size` is too small for it, or generated data cannot be made as `[data]` says.
    """
    if config.data.kind in GENERATED:
        return check_generated(config)
    training = config.data.paths if config.data.kind == "prepared" else []
    paths = [*training, *(config.validation.paths if config.validation.enable else [])]
    streams = open_streams(paths, "data.paths", config.model.hf_assets_path, config.data.eos) if paths else []
    for stream in streams:
        manifest = stream.manifest
        if manifest.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"{stream.folder} has token ids up to {manifest.vocab_size - 1:,}, but model.vocab_size = "
                f"{config.model.vocab_size:,} ({config.provenance.get('model.vocab_size', 'default')})\n"
                f"set model.vocab_size to {manifest.vocab_size:,} or more (a multiple of 64 is fastest)"
            )
    return [stream.manifest.content_sha256 for stream in streams[: len(training)]] or None


def check_generated(config: JobConfig) -> list[str]:
    """The version of the generator, after making its sources: a wrong name of a group shows here."""
    key = "data.group" if config.data.kind == "group_word" else "data.language"
    origin, lengths = config.provenance.get(key, "default"), config.validation.lengths
    sizes = {"seq_len": config.training.seq_len, "local_batch_size": 1, "samples": 1}
    try:
        source = held_out_lengths(config.data, lengths=lengths, **sizes)[0].source
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    if source.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{source.name} ({origin}) has {source.vocab_size:,} tokens, but model.vocab_size = "
            f"{config.model.vocab_size:,} ({config.provenance.get('model.vocab_size', 'default')})\n"
            f"set model.vocab_size to {source.vocab_size:,}"
        )
    return [f"generator {GENERATOR}"]
