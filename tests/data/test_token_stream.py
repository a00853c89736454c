"""Text as one stream: every token in it once, documents apart, rows of equal length, and who sees which."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tokenizer
from torch.utils.data import BatchSampler

from chatrlhf.data import encoder as encoder_module
from chatrlhf.data import token_stream
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.stage_rows import PlainText
from chatrlhf.data.templates import FORMATS
from chatrlhf.data.token_stream import StreamOrder, Windows, write_stream
from chatrlhf.data.tokenization import Tokenization
from chatrlhf.stages import global_batches
from chatrlhf.stages.global_batches import RankBatches

TEXTS = ["the cat sat on the mat", "a hat", "", "the hat of the cat is on the mat " * 9, "end"]
DOCUMENTS = [PlainText(text) for text in TEXTS]


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(tokenizer(), FORMATS["raw"], 64)


def by_hand(encoder: Encoder, texts: list[str]) -> list[int]:
    ids = []
    for text in texts:
        ids += [*encoder.tokenizer(text).input_ids, encoder.tokenizer.eos_token_id]
    return ids


def written(encoder, path, documents=DOCUMENTS, most=10**6) -> tuple[int, list[int]]:
    count = write_stream(documents, encoder, most, path / "tokens")
    return count, np.fromfile(path / "tokens", dtype=np.uint16).tolist()


def rows(windows: Windows, numbers=None) -> list[list[int]]:
    return [windows[i]["input_ids"].tolist() for i in (range(len(windows)) if numbers is None else numbers)]


def test_documents_lie_behind_each_other_each_closed_by_eos(encoder, tmp_path):
    want = by_hand(encoder, TEXTS)
    assert written(encoder, tmp_path) == (len(want), want)
    assert want.count(encoder.tokenizer.eos_token_id) == len(TEXTS)


def test_a_document_that_is_cut_has_no_eos(encoder, tmp_path):
    _, ids = written(encoder, tmp_path, [PlainText("a hat", ends=False), PlainText("a mat")])
    assert ids == by_hand(encoder, ["a hat"])[:-1] + by_hand(encoder, ["a mat"])


def test_what_looks_like_a_special_token_is_text(encoder, tmp_path):
    _, ids = written(encoder, tmp_path, [PlainText("a <|endoftext|> b")])
    assert ids.count(encoder.tokenizer.eos_token_id) == 1 and ids[-1] == encoder.tokenizer.eos_token_id
    assert encoder.tokenizer.decode(ids[:-1]) == "a <|endoftext|> b"


@pytest.mark.parametrize("size", [7, 20, 2**18])
def test_a_long_document_is_tokenised_a_part_at_a_time(encoder, tmp_path, monkeypatch, size):
    monkeypatch.setattr(encoder_module, "PART_OF_TEXT", size)
    sizes = []
    whole = Tokenization.plain_ids
    monkeypatch.setattr(Tokenization, "plain_ids", lambda self, text: sizes.append(len(text)) or whole(self, text))
    assert written(encoder, tmp_path)[1] == by_hand(encoder, TEXTS)  # cut between words it is the same
    assert max(sizes) <= size
    _, ids = written(encoder, tmp_path, [PlainText("x" * 50)])
    assert encoder.tokenizer.decode(ids[:-1]) == "x" * 50


def test_it_reads_no_further_than_it_has_to(encoder, tmp_path):
    asked = []

    def documents():
        for document in DOCUMENTS * 1000:
            asked.append(document)
            yield document

    want = by_hand(encoder, TEXTS)
    for most in (1, 10, len(want)):
        asked.clear()
        assert written(encoder, tmp_path, documents(), most) == (most, want[:most])
        assert len(asked) <= len(TEXTS)


def test_bos_opens_a_document_where_the_tokenizer_opens_texts_with_it(encoder, tmp_path):
    words = tokenizer()
    words.add_special_tokens({"bos_token": "<s>"})
    from tokenizers.processors import TemplateProcessing

    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.bos_token_id)]
    )
    made = Encoder(words, FORMATS["raw"], 64)
    _, ids = written(made, tmp_path, DOCUMENTS[:2])
    assert ids == [i for text in TEXTS[:2] for i in [*words(text).input_ids, words.eos_token_id]]
    assert ids.count(words.bos_token_id) == 2


@pytest.mark.parametrize("vocabulary, kind", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_a_token_takes_as_much_room_as_the_vocabulary_needs(encoder, vocabulary, kind):
    class Large:
        def __len__(self):
            return vocabulary

    assert token_stream._kind(Encoder(Large(), FORMATS["raw"], 64)) is kind


# ----- rows


@pytest.mark.parametrize("length", [8, 10, 41])
def test_rows_are_the_stream_without_gaps_and_without_padding(encoder, tmp_path, length):
    _, ids = written(encoder, tmp_path)
    windows = Windows(tmp_path / "tokens", encoder, length)
    assert len(windows) == len(ids) // length >= 2
    found = rows(windows)
    assert all(len(row) == length for row in found)
    assert sum(found, []) == ids[: len(windows) * length]
    assert all(torch.equal(windows[i]["labels"], windows[i]["input_ids"]) for i in range(len(windows)))


def test_the_stream_goes_on_with_its_beginning(encoder, tmp_path):
    _, ids = written(encoder, tmp_path)
    windows = Windows(tmp_path / "tokens", encoder, 10)
    assert len(ids) % 10  # or passes would be alike
    count = 3 * len(windows) + 2
    assert sum(rows(windows, range(count)), []) == (ids * 5)[: 10 * count]


# ----- which rows, when


def test_each_pass_sees_its_rows_once_in_an_order_of_its_own():
    order = list(StreamOrder(rows=25, a_pass=10, batch_size=5, seed=3))
    passes = [order[:10], order[10:20], order[20:]]
    assert [sorted(each) for each in passes] == [list(range(10)), list(range(10, 20)), list(range(20, 25))]
    assert [i - 10 for i in passes[1]] != passes[0] != sorted(passes[0])
    assert order == list(StreamOrder(25, 10, 5, 3)) != list(StreamOrder(25, 10, 5, 4))


@pytest.mark.parametrize("ranks, micro", [(2, 1), (2, 3), (3, 2)])
def test_ranks_share_the_batches_of_one_process(monkeypatch, ranks, micro):
    order = StreamOrder(rows=24, a_pass=10, batch_size=6, seed=3)
    monkeypatch.setattr(global_batches, "world_size", lambda: ranks)
    shares = []
    for number in range(ranks):
        monkeypatch.setattr(global_batches, "rank", lambda number=number: number)
        shares.append([row for batch in RankBatches(order, micro) for row in batch])
    assert len({len(share) for share in shares}) == 1
    each = 6 // ranks
    for number, batch in enumerate(BatchSampler(order, 6, drop_last=False)):
        assert sorted(row for share in shares for row in share[number * each : (number + 1) * each]) == sorted(batch)
