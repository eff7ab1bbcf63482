"""Which sequences are read: long documents or packed ones, from prepared folders, files and datasets; and errors."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.unit.data.conftest import make_corpus, make_set, tokenizer  # noqa: F401 (a fixture)
from torchtitan_deltaproduct.data.packing import read_window
from torchtitan_deltaproduct.data.shards.shards import TokenStream
from torchtitan_deltaproduct.data.text.tokenizer import find_eos_id, load_tokenizer
from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.evaluation import sample
from torchtitan_deltaproduct.evaluation.sample import Wanted
from torchtitan_deltaproduct.evaluation.texts import open_texts, spread


def rows_of(texts):
    found = texts.read(0, texts.sequences, 0, texts.length + 1)
    assert np.array_equal(found, np.load(texts.folder / "tokens.npy")) and found.dtype == np.int64
    return found.tolist()


@pytest.fixture
def prepared(tmp_path, tokenizer):  # noqa: F811
    """A folder of three shards, and its documents."""
    shards = [[30, 5, 80], [50], [49, 51, 7, 200, 3, 60]]
    return tmp_path / "set", make_set(tmp_path / "set", tokenizer, shards)


def test_results_inside_of_the_text_that_is_read(tmp_path):
    """The next evaluation would read them."""
    (tmp_path / "a.txt").write_text("a text")
    with pytest.raises(DataError, match=f"^{tmp_path}/out lies in its own input {tmp_path}.\nChoose a folder outside"):
        open_texts(Wanted(str(tmp_path), 50, 1), tmp_path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_spread():
    assert spread(5, 9, 0).tolist() == [0, 1, 2, 3, 4] and spread(0, 4, 0).tolist() == []
    picks = spread(1000, 10, 3)
    assert (picks // 100 == np.arange(10)).all() and not np.array_equal(picks, spread(1000, 10, 4))
    assert np.array_equal(picks, spread(1000, 10, 3))


def test_long_documents(prepared, tmp_path, tokenizer):  # noqa: F811
    """Each begins by reading the separator; the last label of a document as long as asked is its separator."""
    folder, documents = prepared
    texts = open_texts(Wanted(str(folder), 50, 9, "long"), None, tmp_path / "texts")
    expected = [[0, *document[:50]] for document in documents if len(document) >= 50]
    assert len(expected) == 5 and rows_of(texts) == expected
    assert [row[-1] for row in expected].count(0) == 1
    about = texts.about
    assert (about["kind"], about["sequences"], about["long_documents"], about["documents"]) == ("long", 5, 5, 10)
    assert about["documents_a_sequence"] == 1 and about["largest_id"] == max(map(max, expected))
    assert "5 sequences of 50 tokens (all there are; 9 were asked for): the starts" in texts.describe()


def test_long_documents_are_spread(prepared, tmp_path):
    folder, documents = prepared
    seen = set()
    for seed in range(20):
        texts = open_texts(Wanted(str(folder), 50, 2, seed=seed), None, tmp_path / "texts")
        assert texts.about["kind"] == "long"
        rows = rows_of(texts)
        long = [[0, *document[:50]] for document in documents if len(document) >= 50]
        assert long.index(rows[0]) in (0, 1) and long.index(rows[1]) in (2, 3, 4)
        seen |= {long.index(row) for row in rows}
    assert seen == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("length", [7, 50, 100])
def test_packed_windows(prepared, tmp_path, length):
    """As `packing.read_window` reads them for training."""
    folder, documents = prepared
    texts = open_texts(Wanted(str(folder), length, 99, "packed"), None, tmp_path / "texts")
    stream, expected, entered = TokenStream(folder), [], 0
    for window in range(stream.tokens // length):
        inputs, labels, starts = (np.empty(length, kind) for kind in (np.int64, np.int64, bool))
        read_window(stream, window, inputs, labels, starts)
        expected.append([*inputs.tolist(), int(labels[-1])])
        entered += starts.sum()
    assert rows_of(texts) == expected and len(expected) == sum(map(len, documents)) // length
    assert texts.about["documents_a_sequence"] == entered / len(expected)


def test_auto(prepared, tmp_path):
    folder, _ = prepared
    kinds = [open_texts(Wanted(str(folder), 50, n), None, tmp_path / "texts").about["kind"] for n in (1, 5, 6)]
    assert kinds == ["long", "long", "packed"]
    texts = open_texts(Wanted(str(folder), 200, 2), None, tmp_path / "texts")
    assert "packed documents, 4.5 in each (long enough: 1 of 10 documents)" in texts.describe()


def test_kept_and_made_again(prepared, tmp_path):
    folder, _ = prepared
    wanted, out = Wanted(str(folder), 50, 4), tmp_path / "texts"
    texts = open_texts(wanted, None, out)
    before = (texts.folder / "tokens.npy").stat().st_mtime_ns
    assert open_texts(wanted, None, out) == texts and before == (texts.folder / "tokens.npy").stat().st_mtime_ns
    (texts.folder / "tokens.npy").write_bytes((texts.folder / "tokens.npy").read_bytes()[:-2])
    assert open_texts(wanted, None, out).about == texts.about and rows_of(texts)
    assert open_texts(Wanted(str(folder), 50, 4, seed=1), None, out).folder != texts.folder


def test_nothing_long_enough(prepared, tmp_path):
    few = "535 tokens, less than one sequence of 600"
    cases = (("long", 201, "no document has 201 tokens"), ("packed", 600, few), ("auto", 600, few))
    for documents, length, said in cases:
        with pytest.raises(DataError, match=said):
            open_texts(Wanted(str(prepared[0]), length, 4, documents), None, tmp_path / "texts")
    assert not list((tmp_path / "texts").glob("*/about.json"))


def test_a_prepared_folder_that_was_changed(prepared, tmp_path):
    folder, _ = prepared
    (tmp_path / "outer").mkdir()
    folder = folder.rename(tmp_path / "outer/train")
    with pytest.raises(DataError, match="has no manifest.json, but these have: .*outer/train"):
        open_texts(Wanted(str(tmp_path / "outer"), 50, 4), None, tmp_path / "texts")
    tokenizer_file = folder / "tokenizer/tokenizer.json"
    tokenizer_file.write_text(tokenizer_file.read_text() + " ")
    with pytest.raises(DataError, match="is not the tokenizer that .* was prepared with"):
        open_texts(Wanted(str(folder), 50, 4), None, tmp_path / "texts")


# Text.


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "files", 30, seed=5)


def tokens_by_hand(folder, tokenizer):  # noqa: F811
    inner, eos = load_tokenizer(tokenizer), find_eos_id(tokenizer)
    texts = [path.read_bytes().decode() for path in sorted(folder.iterdir())]
    return [[*ids, eos] for ids in inner.encode_batch(texts)], eos


def test_text_files(corpus, tmp_path, tokenizer):  # noqa: F811
    documents, eos = tokens_by_hand(corpus, tokenizer)
    lengths = sorted(map(len, documents))
    length = lengths[-4]
    texts = open_texts(Wanted(str(corpus), length, 4), tokenizer, tmp_path / "texts")
    assert texts.about["kind"] == "long"
    assert rows_of(texts) == [[eos, *document[:length]] for document in documents if len(document) >= length]
    texts = open_texts(Wanted(str(corpus), length, 5), tokenizer, tmp_path / "texts")
    stream = [eos, *(token for document in documents for token in document)]
    assert texts.about["kind"] == "packed" and texts.about["long_documents"] == 4 and texts.about["all_seen"]
    assert rows_of(texts) == [stream[n * length : (n + 1) * length + 1] for n in range(5)]
    assert sorted(path.name for path in texts.folder.iterdir()) == ["about.json", "tokens.npy"]
    everything = open_texts(Wanted(str(corpus), 10, 10**6, "packed"), tokenizer, tmp_path / "texts")
    assert everything.sequences == (len(stream) - 1) // 10 and everything.about["long_documents"] is None


def test_the_search_ends_when_there_is_enough(corpus, tmp_path, tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sample, "UNIT_BYTES", 100)
    seen = set()
    for seed in range(3):
        texts = open_texts(Wanted(str(corpus), 50, 2, seed=seed), tokenizer, tmp_path / "texts")
        assert texts.about["kind"] == "long" and texts.sequences == 2
        assert texts.about["documents"] < 10 and not texts.about["all_seen"]
        assert f"2 of the first {texts.about['documents']} documents" in texts.describe()
        seen.add(str(rows_of(texts)))
    assert len(seen) == 3
    few = open_texts(Wanted(str(corpus), 50, 1000, search_bytes=2000), tokenizer, tmp_path / "texts")
    assert few.about["kind"] == "packed" and few.about["documents"] < 15 and not few.about["all_seen"]
    with pytest.raises(DataError, match="the first 0 MiB"):
        open_texts(Wanted(str(corpus), 10**5, 1, "long", search_bytes=2000), tokenizer, tmp_path / "texts")


def test_no_more_text_is_prepared_than_is_of_use(tmp_path, tokenizer, monkeypatch):  # noqa: F811
    """What fills the packed sequences, and then what may be long; a short document costs no tokenisation."""
    long = "".join(f"line {n} of a book\n" for n in range(400))
    documents = [*(f"{n} is short " * 8 for n in range(300)), long, *(f"{n} is never seen" for n in range(50))]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    lines, prepare = [], sample.prepare

    def counting(settings, **options):
        lines.append(len((tmp_path / settings.input[0]).read_text().splitlines()))
        return prepare(settings, **options)

    monkeypatch.setattr(sample, "prepare", counting)
    texts = open_texts(Wanted(str(tmp_path / "x.jsonl"), 300, 1), tokenizer, tmp_path / "texts")
    assert texts.about["kind"] == "long" and texts.about["documents"] == 301 and not texts.about["all_seen"]
    ids, eos = load_tokenizer(tokenizer).encode_batch([long])[0], find_eos_id(tokenizer)
    assert rows_of(texts) == [[eos, *ids[:300]]] and 20 < lines[0] < 40
    assert [path.name for path in texts.folder.iterdir() if path.is_dir()] == []


def test_datasets_and_json(corpus, tmp_path, tokenizer, caplog):  # noqa: F811
    import datasets

    documents, eos = tokens_by_hand(corpus, tokenizer)
    texts = [path.read_bytes().decode() for path in sorted(corpus.iterdir())]
    parts = {"train": ["short"], "test": texts}
    splits = {name: datasets.Dataset.from_dict({"body": part}) for name, part in parts.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    lines = [json.dumps({"body": text}) for text in texts]
    (tmp_path / "x.jsonl").write_text("\n".join([lines[0], "{broken", *lines[1:]]) + "\n")
    length = sorted(map(len, documents))[-3]
    expected = [[eos, *document[:length]] for document in documents if len(document) >= length]
    for data in ("d", "x.jsonl"):
        wanted = Wanted(str(tmp_path / data), length, 3, split="test", text_field="body")
        assert rows_of(open_texts(wanted, tokenizer, tmp_path / "texts")) == expected
    assert "1 records cannot be read and are left out, such as" in caplog.text and "line 2" in caplog.text
    with pytest.raises(DataError, match="has no column 'text'; it has: body"):
        open_texts(Wanted(str(tmp_path / "d"), length, 3), tokenizer, tmp_path / "texts")


def test_unknown_tokens_are_said(tmp_path, caplog):
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "x.txt").write_text("a b a c " * 20)
    open_texts(Wanted(str(tmp_path / "x.txt"), 10, 2), tmp_path, tmp_path / "texts")
    assert "x.txt: 40 of 80 tokens are unknown to the tokenizer" in caplog.text


def test_what_cannot_be_read(corpus, tmp_path, tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for data, said in (
        (str(tmp_path / "none"), "no file or folder"), ("./none.txt", "no file or folder"), ("none.jsonl", "no file"),
        ("a/b/c", "no file or folder"), ("nobody/nothing:x", "As a dataset:\nThe dataset 'nobody/nothing'"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said):
            open_texts(Wanted(data, 10, 1), tokenizer, tmp_path / "texts")
    with pytest.raises(DataError, match="--tokenizer"):
        open_texts(Wanted(str(corpus), 10, 1), None, tmp_path / "texts")
    with pytest.raises(DataError, match="no token '<none>'"):
        open_texts(Wanted(str(corpus), 10, 1, eos="<none>"), tokenizer, tmp_path / "texts")
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).touch()
        with pytest.raises(DataError, match="0 tokens, less than one sequence of 10"):
            open_texts(Wanted(str(tmp_path / name), 10, 1), tokenizer, tmp_path / "texts")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no files"):
        open_texts(Wanted(str(tmp_path / "empty"), 10, 1), tokenizer, tmp_path / "texts")
