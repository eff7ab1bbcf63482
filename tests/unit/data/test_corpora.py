"""Token files of others: formats written here by hand, byte for byte, against what the stream and the loader read."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from torchtitan_deltaproduct.config import Environment, load_config
from torchtitan_deltaproduct.config.job import Data
from torchtitan_deltaproduct.data import build_loader, separator_id
from torchtitan_deltaproduct.data.check import check_data
from torchtitan_deltaproduct.data.held_out import held_out_text
from torchtitan_deltaproduct.data.shards.corpora import open_stream
from torchtitan_deltaproduct.data.shards.manifest import read_manifest
from torchtitan_deltaproduct.data.show import main as show
from torchtitan_deltaproduct.data.text.tokenizer import load_tokenizer
from torchtitan_deltaproduct.errors import ConfigError, DataError

from .conftest import make_set

CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
SIZES = {"seq_len": 16, "local_batch_size": 4, "global_batch_size": 4}


def write_megatron(prefix: Path, documents: list[list[list[int]]], code: int = 8, version: int = 1) -> Path:
    """Documents of sequences of tokens, as Megatron's `IndexedDatasetBuilder` writes them."""
    sequences = [sequence for document in documents for sequence in document]
    dtype = np.dtype(CODES[code])
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{prefix}.bin", "wb") as file:
        for sequence in sequences:
            file.write(np.array(sequence, dtype=dtype).tobytes(order="C"))
    lengths = [len(sequence) for sequence in sequences]
    pointers = [sum(lengths[:number]) * dtype.itemsize for number in range(len(lengths))]
    firsts = [sum(map(len, documents[:number])) for number in range(len(documents) + 1)]
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", version) + struct.pack("<B", code))
        file.write(struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(firsts)))
        file.write(struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(pointers)}q", *pointers))
        file.write(struct.pack(f"<{len(firsts)}q", *firsts))
    return prefix


def read_megatron(prefix: Path) -> list[list[int]]:
    """The documents of a corpus, by the description of the format alone."""
    raw = Path(f"{prefix}.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00" and struct.unpack("<Q", raw[9:17]) == (1,)
    (code,), (count, entries) = struct.unpack("<B", raw[17:18]), struct.unpack("<QQ", raw[18:34])
    place, parts = 34, []
    for letter, number in (("i", count), ("q", count), ("q", entries)):
        size = struct.calcsize(f"<{number}{letter}")
        parts.append(struct.unpack(f"<{number}{letter}", raw[place : place + size]))
        place += size
    lengths, pointers, firsts = parts
    assert place == len(raw) and firsts[0] == 0 and firsts[-1] == count
    tokens = Path(f"{prefix}.bin").read_bytes()
    sequences = [np.frombuffer(tokens, CODES[code], n, p).tolist() for n, p in zip(lengths, pointers, strict=True)]
    return [sum(sequences[a:b], []) for a, b in zip(firsts, firsts[1:], strict=False)]


def random_documents(seed: int, count: int, ends: bool = True, high: int = 400) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(1, high, rng.integers(1, 60)).tolist(), *[0] * ends] for _ in range(count)]


def whole(stream) -> tuple[list[int], list[int]]:
    tokens = np.empty(stream.tokens, dtype=np.int64)
    assert stream.read(0, tokens) == stream.tokens
    return tokens.tolist(), stream.document_starts(0, stream.tokens).tolist()


def joined(documents: list[list[int]]) -> tuple[list[int], list[int]]:
    ends = np.cumsum([len(document) for document in documents])
    return sum(documents, []), [0, *ends[:-1].tolist()]


@pytest.mark.parametrize(("code", "high"), [(1, 250), (2, 120), (3, 400), (4, 400), (5, 400), (8, 400)])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_megatron(tmp_path, tokenizer, code, high, cut, ends):
    """All types; documents of one sequence or several; with separators, or without them, which are put in then."""
    documents = random_documents(code, 700, ends, high)
    pieces = [[document[:1], document[1:]] if cut and len(document) > 1 else [document] for document in documents]
    write_megatron(tmp_path / "web.v1_text_document", pieces, code)
    assert read_megatron(tmp_path / "web.v1_text_document") == documents
    tokens, starts = joined(documents if ends else [[*document, 0] for document in documents])
    for name in ("web.v1_text_document", "web.v1_text_document.bin", "web.v1_text_document.idx", "."):
        stream = pickle.loads(pickle.dumps(open_stream(tmp_path / name, tokenizer)))
        assert whole(stream) == (tokens, starts) and stream.manifest.documents == 700
    rng = np.random.default_rng(0)
    for first in rng.integers(-1, len(tokens) - 40, 60).tolist():
        piece = np.empty(40, dtype=np.int64)
        assert stream.read(first, piece) == 40 and piece.tolist() == ([0] + tokens)[first + 1 : first + 41]
        inside = stream.document_starts(max(first, 0), first + 40).tolist()
        assert inside == [start for start in starts if first <= start < first + 40]
    numbers = [0, 1, 350, 699]
    assert [stream.document(n).tolist() for n in numbers] == [documents[n] + [0] * (not ends) for n in numbers]


@pytest.mark.parametrize("how", ["raw", "saved", "saved as int32"])
def test_npy(tmp_path, tokenizer, how):
    """Raw tokens as OLMo has them, in the type for the vocabulary, and what `np.save` writes."""
    parts = [random_documents(seed, 50) for seed in (1, 2)]
    for number, documents in enumerate(parts):
        tokens, path = np.array(sum(documents, []), dtype=np.uint16), tmp_path / "deep" / f"part-{number}.npy"
        path.parent.mkdir(exist_ok=True)
        tokens.tofile(path) if how == "raw" else np.save(path, tokens.astype(np.int32 if "int32" in how else np.uint16))
    expected = joined(parts[0] + parts[1])
    assert whole(open_stream(tmp_path, tokenizer)) == expected
    assert whole(open_stream(tmp_path / "deep/part-1.npy", tokenizer)) == joined(parts[1])


@pytest.mark.parametrize("saved", [False, True])
def test_npy_that_does_not_end_with_a_separator(tmp_path, tokenizer, saved, caplog):
    """Its end is the end of a document: a separator stands there for the reader, at whatever place a read begins."""
    parts = [[3, 0, 4, 5], [6, 7], [8, 9, 0]]
    for number, part in enumerate(parts):
        tokens, path = np.array(part, dtype=np.uint16), tmp_path / f"part-{number}.npy"
        np.save(path, tokens) if saved else tokens.tofile(path)
    stream = pickle.loads(pickle.dumps(open_stream(tmp_path, tokenizer)))
    tokens = [3, 0, 4, 5, 0, 6, 7, 0, 8, 9, 0]
    assert whole(stream) == (tokens, [0, 2, 5, 8])
    for first in range(len(tokens)):
        for count in range(1, len(tokens) - first + 1):
            piece = np.empty(count, dtype=np.int64)
            assert stream.read(first, piece) == count and piece.tolist() == tokens[first : first + count]
    assert [record.message for record in caplog.records if "2 of 3 files" in record.message]
    assert len(caplog.records) == 1


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_megatron(tmp_path / "corpus", [[document] for document in random_documents(0, 300)], code=4)


def test_batches_are_those_of_a_prepared_folder(tmp_path, tokenizer, corpus):
    """Loader, resume, workers, a mixture with a prepared folder, and validation."""
    documents = random_documents(0, 300)
    made = make_set(tmp_path / "prepared", tokenizer, [[len(document) for document in documents]])
    write_megatron(tmp_path / "same", [[document] for document in made])
    options = {"reset_state_at_documents": True, "seed": 3}
    ours, theirs = (
        build_loader(Data(paths=[str(path)], **options), **SIZES, tokenizer_path=tokenizer)
        for path in (tmp_path / "prepared", tmp_path / "same")
    )
    for (a, labels_a), (b, labels_b), _ in zip(ours, theirs, range(60), strict=False):
        assert torch.equal(labels_a, labels_b) and all(torch.equal(a[key], b[key]) for key in a)
    both = Data(paths=[str(tmp_path / "prepared"), str(corpus)], weights=[1, 3], num_workers=1, **options)
    mixed = build_loader(both, **SIZES, tokenizer_path=tokenizer)
    first = [labels for (_, labels), _ in zip(mixed, range(20), strict=False)]
    assert "300 documents" in mixed.describe() and mixed.source.tokenizer_path == str(tmp_path / "prepared/tokenizer")
    later = build_loader(both, **SIZES, tokenizer_path=tokenizer)
    later.load_state_dict({**mixed.state_dict(), "sample": 40})
    assert torch.equal(next(iter(later))[1], first[10])
    held_out = held_out_text([str(corpus)], seq_len=16, local_batch_size=4, tokenizer_path=tokenizer)
    labels = torch.cat([labels.flatten() for _, labels in held_out])
    assert labels[labels >= 0].tolist() == sum(documents, [])
    assert held_out.source.token_bytes[0] == 0 and held_out.source.token_bytes.dtype == torch.float64
    # A run that goes on with other tokens in the files is refused.
    raw = bytearray(Path(f"{corpus}.bin").read_bytes())
    raw[0] ^= 1
    write_megatron(tmp_path / "other", [[document] for document in documents], code=4)
    (tmp_path / "other.bin").write_bytes(raw)
    changed = Data(**{**vars(both), "paths": [both.paths[0], str(tmp_path / "other")]})
    with pytest.raises(DataError, match="another sequence of samples"):
        build_loader(changed, **SIZES, tokenizer_path=tokenizer).load_state_dict(mixed.state_dict())


def test_our_shards_are_a_megatron_corpus(tmp_path, tokenizer):
    documents = make_set(tmp_path / "prepared", tokenizer, [[5, 1, 70], [9] * 600])
    shards = [read_megatron(tmp_path / f"prepared/shards/{number:05d}") for number in range(2)]
    assert shards[0] + shards[1] == documents
    assert whole(open_stream(tmp_path / "prepared/shards", tokenizer)) == joined(documents)


def test_the_settings_of_a_run(tmp_path, tokenizer, corpus):
    """[model] names tokenizer and vocabulary, [data] eos the separator."""
    toml = tmp_path / "run.toml"
    toml.write_text(f'[data]\npaths = ["{corpus}"]\n[model]\nvocab_size = 400\n[training]\nseq_len = 16\n')

    def load(*options):
        return load_config(["--job.config_file", str(toml), *options], Environment())

    with pytest.raises(ConfigError, match="does not name their tokenizer\nset model.hf_assets_path"):
        check_data(load())
    named = f"--model.hf_assets_path={tokenizer}"
    (identity,) = check_data(load(named))
    config = load(named, "--data.eos=!")
    bang = load_tokenizer(tokenizer).inner.token_to_id("!")
    # Tokens 0 are no separators then: others are put in.
    assert check_data(config) != [identity] and separator_id(config.data, config.model.hf_assets_path) == bang
    with pytest.raises(ConfigError, match="token ids up to 399, but model.vocab_size = 300"):
        check_data(load(named, "--model.vocab_size=300"))
    make_set(tmp_path / "prepared", tokenizer, [[50]])
    with pytest.raises(DataError, match="was prepared with token 0 as its separator, not data.eos = '!'"):
        check_data(load(named, f"--data.paths={tmp_path / 'prepared'}", "--data.eos=!"))


def test_show(tokenizer, corpus, capsys):
    show([str(corpus), "--tokenizer", tokenizer, "--document", "7"])
    shown = capsys.readouterr().out
    np.save(corpus.with_name("x.npy"), np.array([5, 6, 0], dtype=np.uint16))
    show([str(corpus.with_name("x.npy")), "--tokenizer", tokenizer])
    without_index = capsys.readouterr().out
    show([str(corpus), "--tokenizer", tokenizer, "--verify"])
    assert f"all {sum(map(len, random_documents(0, 300))):,} tokens are in the vocabulary" in capsys.readouterr().out
    assert "[5, 6, 0]" in without_index and "the first 3 of 3 tokens" in without_index
    assert "read as" in shown and f"document 7, {len(random_documents(0, 300)[7])} tokens" in shown
    assert "tokens on average" in shown and "document" not in without_index
    assert not [row for row in ("text", "left out", "unknown") if f"│ {row} " in shown + without_index]
    with pytest.raises(ConfigError, match="does not name their tokenizer\nset --tokenizer to the folder"):
        show([str(corpus)])
    with pytest.raises(ConfigError, match="--document is 2: .*x.npy has no index"):
        show([str(corpus.with_name("x.npy")), "--tokenizer", tokenizer, "--document", "2"])
    make_set(corpus.with_name("prepared"), tokenizer, [[50]])
    show([str(corpus.with_name("prepared"))])
    prepared = capsys.readouterr().out
    assert "│ unknown " in prepared and "made with" not in shown
    assert "a checksum of the size and 4 blocks of 16 KiB of each file" in " ".join(shown.replace("│", "").split())
    assert "a checksum of all tokens" in prepared


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(("damage", "message"), [
    (lambda c: cut(Path(f"{c}.idx"), 400), "corpus.idx has 400 bytes; its header says"),
    (lambda c: cut(Path(f"{c}.idx"), 20), "is not the index of a Megatron corpus"),
    (lambda c: cut(Path(f"{c}.bin"), 400), "corpus.bin has 400 bytes, which is not what .*corpus.idx says"),
    (lambda c: Path(f"{c}.idx").unlink(), "corpus.idx is not there beside"),
    (lambda c: write_megatron(c, [[[1.0, 0.0]]], code=6), "version 1 and tokens of type 6"),
    (lambda c: write_megatron(c, [[[1, 0]]], version=2), "version 2 and tokens of type 8"),
    (lambda c: write_megatron(c, [[[1, 0]], [[2, 0]], [[3]]]), "(?s)1 of 3 documents looked at .* data.eos"),
    (lambda c: write_megatron(c, [[[1, -7, 0]]], code=4), "holds token -7 at place 1; the vocabulary ends at 399"),
    (lambda c: write_megatron(c, [[[1, -7]]], code=5), "holds token -7 at place 1; the vocabulary ends at 399"),
    (lambda c: write_megatron(c, [[[1, 500, 0]]]), "corpus.bin holds token 500 at place 1; the vocabulary ends at 399"),
])  # fmt: skip
def test_damaged_corpora(tokenizer, corpus, damage, message):
    damage(corpus)
    with pytest.raises(DataError, match=message):
        whole(open_stream(corpus, tokenizer))


@pytest.mark.parametrize("kind", ["with separators", "without", "npy"])
def test_ids_beyond_the_vocabulary(tmp_path, tokenizer, kind, capsys):
    """In the blocks that are looked at a corpus is refused at once; elsewhere where they are read, and by --verify."""
    documents = random_documents(0, 3000, ends=kind != "without")
    tokens, inside = sum(documents, []), 15_000
    assert 8192 < inside < (len(tokens) - 8192) // 3 and len(documents[0]) > 6
    for place in (5, len(tokens) - 3, inside):
        wrong = np.array(tokens, dtype=np.uint16)
        wrong[place] = 500
        cut = np.split(wrong, np.cumsum([len(document) for document in documents])[:-1])
        path = write_megatron(tmp_path / "x", [[document.tolist()] for document in cut])
        if kind == "npy":
            np.save(path := tmp_path / "x.npy", wrong)
        said = rf"x\.(bin|npy) holds token 500 at place {place:,}; the vocabulary ends at 399\nit was not made with"
        if place != inside:
            with pytest.raises(DataError, match=said):
                open_stream(path, tokenizer)
            continue
        stream = open_stream(path, tokenizer)
        with pytest.raises(DataError, match=said):
            whole(stream)
        with pytest.raises(DataError, match=said):
            show([str(path), "--tokenizer", tokenizer, "--verify"])


def test_a_document_that_runs_into_the_next(tmp_path, tokenizer):
    """One of many, which a look at some does not find, is found where states would be reset."""
    documents = random_documents(0, 1000)
    assert 3 not in np.linspace(0, 999, 64, dtype=int)
    documents[3].pop()
    stream = open_stream(write_megatron(tmp_path / "x", [[document] for document in documents]), tokenizer)
    place = sum(map(len, documents[:4]))
    with pytest.raises(DataError, match=f"stands before the document at token {place:,}.*\n.*--append-eod"):
        stream.document_starts(place - 5, place + 5)


@pytest.mark.parametrize(("content", "message"), [
    (b"\1\0\2\0\0", "has 5 bytes, which is no whole number of uint16 tokens"),
    (b"", "holds no tokens"),
    (b"\x93NUMPY\1\0", "is a damaged .npy file"),
])  # fmt: skip
def test_damaged_npy(tmp_path, tokenizer, content, message):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_stream(tmp_path / "x.npy", tokenizer)


def test_what_is_not_read(tmp_path, tokenizer, corpus):
    np.save(tmp_path / "f.npy", np.zeros(3))
    with pytest.raises(DataError, match="holds float64; expected whole numbers"):
        open_stream(tmp_path / "f.npy", tokenizer)
    np.save(tmp_path / "windows.npy", np.ones((3, 4), dtype=np.uint16))
    with pytest.raises(DataError, match=r"(?s)shape \[3, 4\]; expected token ids in one dimension.*reshape\(-1\)"):
        open_stream(tmp_path / "windows.npy", tokenizer)
    np.save(tmp_path / "negative.npy", np.array([3, -7], dtype=np.int32))
    with pytest.raises(DataError, match="negative.npy holds token -7 at place 1;"):
        whole(open_stream(tmp_path / "negative.npy", tokenizer))
    write_megatron(tmp_path / "two/a", [[[1, 0]]], 4), write_megatron(tmp_path / "two/b", [[[1, 0]]], 8)
    with pytest.raises(DataError, match="b holds uint16 and .*a uint32.\nName them as separate paths"):
        open_stream(tmp_path / "two", tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is not a folder made by torchtitan_deltaproduct.data.prepare, nor are there"):
        open_stream(tmp_path / "empty", tokenizer)
    stream = open_stream(corpus, tokenizer)
    cut(Path(f"{corpus}.bin"), 400)
    with pytest.raises(DataError, match="has 400 bytes, and had .* at the start"):
        whole(stream)
    assert read_manifest(make_set(tmp_path / "p", tokenizer, [[3]]) and tmp_path / "p").version == 3
