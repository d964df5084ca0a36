from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from tbf.data.loader import BatchLoader, EvaluationRows, PackedDataset
from tbf.data.masking import EMPTY, MaskSpec
from tbf.data.sharding import prepare
from tbf.data.shards import ShardIndex
from tbf.data.tokenizer import SpanishSPMTokenizer
from tbf.errors import ConfigError, DataError

from .conftest import OPTIONS, spanish_texts, write_jsonl

WIDTH = 64


@pytest.fixture(scope="module")
def dataset(shards):
    return PackedDataset(shards, seq_len=WIDTH, seed=3, validation_share=0.1)


@pytest.fixture(scope="module")
def spec(tokenizer):
    return MaskSpec.for_tokenizer(tokenizer, 0.3, seed=11)


def take(loader, steps):
    iterator = iter(loader)
    taken = [next(iterator) for _ in range(steps)]
    iterator.close()
    return taken


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def split_texts(dataset, tokenizer):
    """Every segment of a split as text."""
    found = []
    for start in range(dataset.rows_per_epoch):
        row = dataset.row(start)
        for segment in range(1, int(row["segment_ids"].max()) + 1):
            found.append(tokenizer.decode(row["input_ids"][row["segment_ids"] == segment]))
    return found


def test_rows_are_well_formed(dataset, tokenizer):
    for position in range(dataset.rows_per_epoch):
        row = dataset.row(position)
        ids, segments = row["input_ids"], row["segment_ids"]
        assert ids.shape == segments.shape == (WIDTH,)
        assert np.array_equal(ids == 0, segments == 0)
        last = int(segments.max())
        for segment in range(1, last + 1):
            (places,) = np.nonzero(segments == segment)
            assert (np.diff(places) == 1).all()
            assert ids[places[0]] == tokenizer.cls_id
            assert ids[places[-1]] == tokenizer.sep_id
            assert ids[places[1:-1]].min() > tokenizer.mask_id
        filled = int((segments > 0).sum())
        assert (segments[:filled] > 0).all()  # padding only at the end
        assert (np.diff(segments[:filled]) >= 0).all()
    assert dataset.packing_efficiency > 0.95


def test_an_epoch_holds_every_token_once_and_splits_do_not_overlap(shards, dataset, tokenizer, texts):
    held_out = PackedDataset(shards, seq_len=WIDTH, split="validation", validation_share=0.1)
    train, validation = split_texts(dataset, tokenizer), split_texts(held_out, tokenizer)
    whole = {text for text in texts if len(tokenizer.encode_ids([text])[0]) <= WIDTH - 2}
    assert len(whole) > 20
    assert whole <= set(train) | set(validation)
    assert not whole & set(train) & set(validation)
    # Each document ends with its own number, so a row that mixed documents would show.
    assert sum(len(t.split()) for t in train + validation) == pytest.approx(sum(len(t.split()) for t in texts), rel=0.1)
    assert held_out.rows_per_epoch > 5


def test_epochs_are_different_orders_of_the_same_rows(dataset):
    count = dataset.rows_per_epoch
    epochs, rows = dataset.locate(np.arange(3 * count))
    assert epochs.tolist() == [0] * count + [1] * count + [2] * count
    orders = rows.reshape(3, count)
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(count), (3, 1)))
    assert (orders[0] == orders[1]).mean() < 0.2
    other = PackedDataset(dataset.index.folder, seq_len=WIDTH, seed=4, validation_share=0.1)
    assert (other.locate(np.arange(count))[1] == orders[0]).mean() < 0.2


def test_validation_is_the_same_in_every_epoch_with_fixed_masks(shards, spec):
    dataset = PackedDataset(shards, seq_len=WIDTH, split="validation", validation_share=0.1)
    count = dataset.rows_per_epoch
    assert dataset.row(2)["row"] == dataset.row(2 + 5 * count)["row"]
    loader = BatchLoader(dataset, spec, micro_batch=1)
    steps = take(loader, 2 * count)
    assert all(same(a[0], b[0]) for a, b in zip(steps[:count], steps[count:]))


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 4, 2), (2, 2, 2), (4, 2, 1), (2, 1, 4), (8, 1, 1)])
def test_the_same_rows_and_masks_on_any_topology(dataset, spec, world, micro, accumulation):
    """A step of 8 rows is the same 8 rows in the same order whoever reads them."""
    reference = take(BatchLoader(dataset, spec, micro_batch=8), 5)
    loaders = [
        BatchLoader(dataset, spec, micro_batch=micro, accumulation=accumulation, rank=r, world_size=world)
        for r in range(world)
    ]
    steps = [take(loader, 5) for loader in loaders]
    assert all(loader.cursor == 40 for loader in loaders)
    for number in range(5):
        assert all(len(steps[r][number]) == accumulation for r in range(world))
        order = [steps[r][number][a] for a in range(accumulation) for r in range(world)]
        for name, whole in reference[number][0].items():
            assert torch.equal(torch.cat([batch[name] for batch in order]), whole), name


def test_batches_have_the_promised_shapes(dataset, spec):
    batch = take(BatchLoader(dataset, spec, micro_batch=3), 1)[0][0]
    slots = round(0.3 * WIDTH)
    assert {name: tuple(t.shape) for name, t in batch.items()} == {
        "input_ids": (3, WIDTH),
        "segment_ids": (3, WIDTH),
        "masked_positions": (3, slots),
        "masked_labels": (3, slots),
    }
    assert {t.dtype for t in batch.values()} == {torch.int64}


def test_workers_change_nothing(dataset, spec):
    here = take(BatchLoader(dataset, spec, micro_batch=2, accumulation=3, cursor=7), 6)
    for workers in (1, 2):
        loader = BatchLoader(dataset, spec, micro_batch=2, accumulation=3, cursor=7, num_workers=workers)
        there = take(loader, 6)
        assert loader.cursor == 7 + 36
        assert all(same(a, b) for x, y in zip(here, there) for a, b in zip(x, y))


def test_resume_equals_straight_also_across_epochs(dataset, spec):
    steps = dataset.rows_per_epoch // 4 + 5
    straight = take(BatchLoader(dataset, spec, micro_batch=4), steps)
    first = BatchLoader(dataset, spec, micro_batch=4)
    start = take(first, steps - 8)
    second = BatchLoader(dataset, spec, micro_batch=2, accumulation=2, cursor=first.cursor)
    rest = [{k: torch.cat([b[k] for b in step]) for k in step[0]} for step in take(second, 8)]
    joined = [step[0] for step in start] + rest
    assert all(same(a[0], b) for a, b in zip(straight, joined, strict=True))


def test_an_iterator_starts_at_the_cursor(dataset, spec):
    loader = BatchLoader(dataset, spec, micro_batch=4)
    steps = take(loader, 3)
    loader.cursor = 4
    assert same(take(loader, 1)[0][0], steps[1][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_start_draws_nothing_from_the_state_that_dropout_uses(dataset, spec, workers):
    """Else a resumed run, which starts an iterator more often, would drop other units than a straight one."""
    before = torch.get_rng_state()
    take(BatchLoader(dataset, spec, micro_batch=2, num_workers=workers), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeking_reads_nothing_on_the_way(dataset, spec):
    position = 10**12
    started = time.perf_counter()
    loader = BatchLoader(dataset, spec, micro_batch=4, cursor=position)
    take(loader, 1)
    assert time.perf_counter() - started < 1.0  # a walk through 10**12 rows would take days
    assert loader.cursor == position + 4


def test_whole_words_and_schedule_reach_the_batches(dataset, tokenizer):
    spec = MaskSpec.for_tokenizer(tokenizer, 0.3, whole_words=True, end_rate=0.15, start_row=8, end_row=16)
    widths = [step[0]["masked_labels"].shape[1] for step in take(BatchLoader(dataset, spec, micro_batch=4), 6)]
    assert widths[:3] == [19, 19, 19]
    assert widths[3] == round(0.22 * WIDTH) or widths[3] == round(0.23 * WIDTH)
    assert widths[4:] == [10, 10]


def test_workers_ignore_signals(dataset, spec):
    loader = BatchLoader(dataset, spec, micro_batch=2, num_workers=1)
    iterator = iter(loader)
    expected = take(BatchLoader(dataset, spec, micro_batch=2), 40)
    next(iterator)
    (worker,) = loader.worker_pids()
    os.kill(worker, signal.SIGTERM)
    os.kill(worker, signal.SIGINT)
    for step in expected[1:]:
        assert same(next(iterator)[0], step[0])
    iterator.close()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_rows_are_each_seen_once(shards, spec, world):
    dataset = PackedDataset(shards, seq_len=WIDTH, split="validation", validation_share=0.1)
    rows = dataset.rows_per_epoch
    parts = [EvaluationRows(dataset, spec, rows=10**6, micro_batch=4, rank=r, world_size=world) for r in range(world)]
    assert len({len(part) for part in parts}) == 1
    batches = [list(part) for part in parts]
    labels = torch.cat([batches[r][i]["masked_labels"] for i in range(len(parts[0])) for r in range(world)])
    ids = torch.cat([batches[r][i]["input_ids"] for i in range(len(parts[0])) for r in range(world)])
    assert not ids[rows:].any()
    assert (labels[rows:] == EMPTY).all()
    one = EvaluationRows(dataset, spec, rows=rows, micro_batch=rows)
    assert torch.equal(next(iter(one))["input_ids"], ids[:rows])
    assert torch.equal(next(iter(one))["masked_labels"], labels[:rows])
    assert all(same(a, b) for a, b in zip(parts[0], parts[0], strict=True))


def test_evaluation_hides_the_same_at_every_step(shards, tokenizer):
    dataset = PackedDataset(shards, seq_len=WIDTH, split="validation", validation_share=0.1)
    still = MaskSpec.for_tokenizer(tokenizer, 0.3)
    moving = MaskSpec.for_tokenizer(tokenizer, 0.3, end_rate=0.15, start_row=-8, end_row=0)
    ours, theirs = (next(iter(EvaluationRows(dataset, spec, rows=4, micro_batch=4))) for spec in (moving, still))
    assert same(ours, theirs)


def test_the_corpus_is_named_by_its_content_and_its_shares(shards, dataset, tmp_path):
    other = tmp_path / "p"
    shutil.copytree(shards, other)
    assert PackedDataset(other, seq_len=64, seed=9).corpus == dataset.corpus
    index = json.loads((other / "index.json").read_text())
    index["sources"][0]["weight"] = 1.0
    (other / "index.json").write_text(json.dumps(index))
    assert PackedDataset(other, seq_len=64).corpus != dataset.corpus


def test_mixture_deals_rows_by_share(tmp_path, tokenizer, sample_texts):
    words = " ".join(sample_texts[:20]).split()
    sources = {
        name: spanish_texts([f"{name}{w}" for w in words[:200]], n, seed=n) for name, n in [("aa", 150), ("bb", 30)]
    }
    paths = {name: write_jsonl(tmp_path / f"{name}.jsonl", texts) for name, texts in sources.items()}
    text = f"{paths['aa']}=0.25,{paths['bb']}=0.75"
    prepare(text, tokenizer, tmp_path / "mix", OPTIONS)
    dataset = PackedDataset(tmp_path / "mix", seq_len=WIDTH, seed=1)
    first = {t.source for t in dataset.row_index.tables["train"]}
    assert first == {str(p) for p in paths.values()}
    border = sum(t.rows for t in dataset.row_index.tables["train"] if t.source == str(paths["aa"]))
    count = dataset.rows_per_epoch
    epochs, rows = dataset.locate(np.arange(4 * count))
    assert abs((rows[:count] < border).mean() - 0.25) < 0.01
    small = rows >= border
    seen = np.bincount(rows[small] - border)
    assert seen.max() - seen.min() <= 1  # repeats go round all rows before any comes again
    assert seen.min() >= 2
    assert len({(int(e), int(r)) for e, r in zip(epochs[small], rows[small])}) == small.sum()  # never the same mask
    big = np.bincount(rows[~small], minlength=border)
    assert big.max() - big.min() <= 1
    for at, chunk in itertools.islice(enumerate(rows[:count].reshape(-1)[: count // 50 * 50].reshape(-1, 50)), 5):
        assert 2 <= (chunk < border).sum() <= 25, at


def test_dataset_errors(tmp_path, shards, tokenizer, sample_texts):
    with pytest.raises(DataError, match=r"index\.json: not found"):
        PackedDataset(tmp_path, seq_len=WIDTH)
    with pytest.raises(ConfigError, match="validation"):
        PackedDataset(shards, seq_len=WIDTH, split="valid")
    other = SpanishSPMTokenizer.train(sample_texts[:5], 500)
    with pytest.raises(DataError, match="prepared with tokenizer"):
        PackedDataset(shards, seq_len=WIDTH, tokenizer=other)
    with pytest.raises(DataError, match="no validation rows"):
        PackedDataset(shards, seq_len=WIDTH, split="validation", validation_share=0.0)
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    dataset = PackedDataset(copy, seq_len=WIDTH)
    for shard in ShardIndex.read(copy).shards:
        path = copy / f"{shard.name}.bin"
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cut short"):
        for position in range(dataset.rows_per_epoch):
            dataset.row(position)
