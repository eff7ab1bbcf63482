"""Streaming: the same global batches for any number of ranks, exact resume, epochs and shuffled blocks."""

import json
import random

import pyarrow
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from torchtitan_deltaproduct.config.job import Data
from torchtitan_deltaproduct.data import build_loader
from torchtitan_deltaproduct.data.text.tokenizer import load_tokenizer
from torchtitan_deltaproduct.errors import ConfigError, DataError

from .test_loader import take

datasets = pytest.importorskip("datasets")
T, GLOBAL, DOCUMENTS = 32, 8, 700


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """700 documents in three files, two of them without text, and their folder."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("rows")
    texts = [f"document {n} " + "x y " * rng.randint(0, 12) for n in range(DOCUMENTS)]
    texts[7], texts[300] = None, ""
    for number, part in enumerate((texts[:100], texts[100:350], texts[350:])):
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder, [text for text in texts if text]


def loader(rows, tokenizer, local=GLOBAL, rank=0, world=1, **options):
    config = Data(kind="streaming", dataset=str(rows[0]), reset_state_at_documents=True, **options)
    return build_loader(
        config,
        seq_len=T,
        local_batch_size=local,
        global_batch_size=GLOBAL,
        dp_rank=rank,
        dp_world_size=world,
        tokenizer_path=tokenizer,
    )


def stream_by_hand(texts, tokenizer):
    return [token for ids in load_tokenizer(tokenizer).encode_batch(texts) for token in [*ids, 0]]


def test_file_order_is_the_concatenation_epoch_after_epoch(rows, tokenizer, caplog):
    expected = stream_by_hand(rows[1], tokenizer) * 3
    steps = len(expected) // (T * GLOBAL)
    one = loader(rows, tokenizer)
    batches = take(one, steps)
    labels = batches[..., -1].flatten().tolist()
    assert labels == expected[: len(labels)]
    assert batches[..., 0].flatten().tolist() == [0, *expected[: len(labels) - 1]]
    # A label opens a document where the input is the separator; a window's first position is marked as well.
    marks = batches[..., 1].flatten(0, 1).bool()
    assert torch.equal(marks[:, 1:], batches[..., 0].flatten(0, 1)[:, 1:] == 0) and marks[:, 0].all()
    assert one.epochs() == {str(rows[0]): 2.0}
    assert "epoch 2 of" in caplog.text and "1 rows of" in caplog.text


@pytest.mark.parametrize("buffer", [0, 300])
def test_ranks_and_resume(rows, tokenizer, buffer):
    epoch = len(stream_by_hand(rows[1], tokenizer)) // (T * GLOBAL)
    whole, steps = loader(rows, tokenizer, shuffle_buffer=buffer), 2 * epoch + 10
    expected = take(whole, steps)
    assert whole.epochs() == {str(rows[0]): 2.0}
    ranks = [loader(rows, tokenizer, 2, rank, 2, shuffle_buffer=buffer) for rank in range(2)]
    merged = torch.stack([take(rank, 40) for rank in ranks], dim=1).reshape(20, GLOBAL, T, 3)
    assert torch.equal(merged, expected[:20])
    assert ranks[0].state_dict() == ranks[1].state_dict()
    # Resumed again and again, at other ranks, across the ends of blocks and epochs.
    state, position = json.loads(json.dumps(ranks[0].state_dict())), 20
    for stop in (21, 37, epoch - 1, epoch, epoch + 1, epoch + 40, 2 * epoch + 2, steps):
        one = loader(rows, tokenizer, shuffle_buffer=buffer)
        one.load_state_dict(state)
        assert torch.equal(take(one, stop - position), expected[position:stop])
        state, position = json.loads(json.dumps(one.state_dict())), stop
    assert len(json.dumps(state)) < 2000


def test_shuffled_blocks_hold_every_document_once(rows, tokenizer):
    total = len(stream_by_hand(rows[1], tokenizer))
    epochs = []
    labels = take(loader(rows, tokenizer, shuffle_buffer=200), 2 * total // (T * GLOBAL) + 1)[..., -1].flatten()
    for epoch in range(2):
        text = load_tokenizer(tokenizer).decode(labels[epoch * total : (epoch + 1) * total].tolist())
        epochs.append(text.split("<|endoftext|>")[:-1])
        assert sorted(epochs[-1]) == sorted(rows[1]) and epochs[-1] != rows[1]
        assert set(epochs[-1][:150]) < set(rows[1][:200])
    assert epochs[0] != epochs[1]


def test_one_worker_changes_nothing(rows, tokenizer):
    plain, parallel = loader(rows, tokenizer), loader(rows, tokenizer, num_workers=1)
    assert torch.equal(take(plain, 60), take(parallel, 60))
    assert plain.state_dict() == parallel.state_dict()


def test_parquet_and_saved_datasets(rows, tokenizer, tmp_path):
    expected = take(loader(rows, tokenizer), 5)
    data = datasets.Dataset.from_dict({"text": rows[1]})
    data.to_parquet(str(tmp_path / "x.parquet"))
    data.save_to_disk(str(tmp_path / "disk"))
    for name in ("x.parquet", "disk"):
        one = loader((tmp_path / name, rows[1]), tokenizer)
        assert torch.equal(take(one, 3), expected[:3])
        two = loader((tmp_path / name, rows[1]), tokenizer)
        two.load_state_dict(one.state_dict())
        assert torch.equal(take(two, 2), expected[3:])


def test_user_errors(rows, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="model.hf_assets_path is empty"):
        loader(rows, "")
    with pytest.raises(ConfigError, match="0 or 1 worker"):
        loader(rows, tokenizer, num_workers=2)
    with pytest.raises(DataError, match="has no column 'body'; it has: text"):
        next(iter(loader(rows, tokenizer, text_field="body")))
    with pytest.raises(DataError, match="cannot be opened"):
        next(iter(loader((tmp_path, []), tokenizer)))
    with pytest.raises(DataError, match="shuffle_buffer: was 0, is 5"):
        loader(rows, tokenizer, shuffle_buffer=5).load_state_dict(loader(rows, tokenizer).state_dict())
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="has no text in it"):
        next(iter(loader((tmp_path / "none.jsonl", []), tokenizer)))


def with_bad_lines(folder, rows):
    """The rows of the fixture, some lines between them that cannot be read, in one file."""
    lines = [json.dumps({"text": text}) for text in rows[1]]
    for place, bad in ((3, '{"text": "cut'), (260, '{"text": "\\ud83d"}'), (500, '{"text": 7}')):
        lines.insert(place, bad)
    (folder / "bad.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "bad.jsonl", rows[1]


@pytest.mark.parametrize("buffer", [0, 300])
def test_bad_lines_are_counted_named_and_passed_over(rows, tokenizer, tmp_path, buffer, caplog):
    bad = with_bad_lines(tmp_path, rows)
    epoch = len(stream_by_hand(rows[1], tokenizer)) // (T * GLOBAL)
    whole = loader(bad, tokenizer, shuffle_buffer=buffer)
    expected = take(whole, epoch + 8)
    if not buffer:
        flat = expected[..., -1].flatten().tolist()
        assert flat == (stream_by_hand(rows[1], tokenizer) * 2)[: len(flat)]
    assert "3 rows of" in caplog.text and "cannot be read and are left out, such as" in caplog.text
    # The last one of each block is named.
    named = ["line 261", "line 501"] if buffer else ["line 4: invalid JSON", "line 501"]
    assert all(line in caplog.text for line in named)
    # Resumed in the middle, in another process: the position counts what was left out.
    one = loader(bad, tokenizer, shuffle_buffer=buffer)
    take(one, epoch // 2)
    two = loader(bad, tokenizer, shuffle_buffer=buffer)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert torch.equal(take(two, epoch + 8 - epoch // 2), expected[epoch // 2 :])


def test_a_local_file_is_read_as_prepare_reads_it(rows, tokenizer, tmp_path):
    """Under any suffix, and a text file as one document."""
    (tmp_path / "a.JSONLINES").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows[1]))
    assert torch.equal(take(loader((tmp_path / "a.JSONLINES", []), tokenizer), 5), take(loader(rows, tokenizer), 5))
    (tmp_path / "book.txt").write_text("\n".join(rows[1]))
    flat = take(loader((tmp_path / "book.txt", []), tokenizer), 2)[..., -1].flatten().tolist()
    assert flat == stream_by_hand(["\n".join(rows[1])], tokenizer)[: len(flat)]


def test_the_separator_of_the_table(rows, tokenizer):
    one = loader(rows, tokenizer, eos="!")
    bang = load_tokenizer(tokenizer).inner.token_to_id("!")
    flat = take(one, 3)[..., -1].flatten().tolist()
    assert one.source.eos_id == bang and flat == [bang if i == 0 else i for i in flat] and bang in flat
    with pytest.raises(DataError, match="has no token '<none>'.*\n.*data.eos"):
        loader(rows, tokenizer, eos="<none>")
    with pytest.raises(DataError, match="tokenizer: was"):
        loader(rows, tokenizer).load_state_dict(one.state_dict())


def test_text_that_the_tokenizer_cannot_write_is_said(rows, tmp_path, caplog):
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "document": 1, "x": 2, "y": 3}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    take(loader(rows, str(tmp_path)), 3)
    said = [record.getMessage() for record in caplog.records if "unknown" in record.getMessage()]
    # The number of each document, of the first 256 of which two are missing.
    assert len(said) == 1 and f"of {rows[0]} are unknown to the tokenizer" in said[0] and "data: 255 of" in said[0]


def test_a_dataset_that_cannot_be_read_on_is_one_error(tokenizer, tmp_path, monkeypatch):
    """What `datasets` raises in the middle of a dataset of its own names the row it came to."""
    from torchtitan_deltaproduct.data.text import arrow

    class Broken:
        def load_state_dict(self, state): ...

        def state_dict(self):
            return {}

        def with_format(self, name):
            assert name == "arrow"
            return self

        def __iter__(self):
            yield from (pyarrow.table({"text": ["fine " * 50]}) for _ in range(300))
            raise datasets.exceptions.DatasetGenerationError("an error while generating")

    monkeypatch.setattr(arrow, "open_dataset", lambda *_, **__: Broken())
    with pytest.raises(DataError, match="cannot be read on after row 300: an error while generating"):
        take(loader(("nobody/set", []), tokenizer), 1000)
