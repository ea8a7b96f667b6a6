"""The order of the data: exact, the same at any world size, and without memory."""

import itertools
import json
import os

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from trainstack.data.feed import StepSampler, micro_batches
from trainstack.data.order import HASH_BITS, Permutation, samples_hash
from trainstack.data.packing import plans
from trainstack.data.split import EVAL, TRAIN
from trainstack.data.store import TokenStore
from trainstack.data.writer import TokenWriter
from trainstack.prepare.tokenise import is_held_out, spans_of, token_batch


@pytest.mark.parametrize("n", [1, 2, 3, 10, 17, 256, 1000, 65537])
def test_a_permutation_maps_every_index_to_another_one(n):
    assert sorted(Permutation(n, seed=7, epoch=3)(np.arange(n)).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 10, 1000, 10**12])
def test_a_single_index_is_mapped_as_it_is_among_others(n):
    permute = Permutation(n, seed=2**63 - 1, epoch=3)
    indices = np.unique(np.linspace(0, n - 1, 50).astype(np.int64))
    alone = [permute(np.array([index]))[0] for index in indices]
    assert alone == permute(indices).tolist()


def test_every_position_is_as_likely_as_any_other():
    n, epochs = 10, 5000
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), Permutation(n, seed=3, epoch=epoch)(np.arange(n))] += 1
    chi_squared = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert chi_squared < 150, "81 degrees of freedom: above 150 once in 200,000 draws"


def test_epochs_and_seeds_have_unrelated_orders():
    orders = [Permutation(10_000, s, e)(np.arange(10_000)) for s in (1, 2) for e in (0, 1)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_the_order_is_the_same_on_every_machine_and_in_every_release():
    order = Permutation(1000, seed=1234, epoch=0)(np.arange(8)).tolist()
    assert order == GOLDEN, "a changed order breaks the resuming of every run that exists"


GOLDEN = [169, 80, 486, 808, 246, 596, 239, 656]


def test_any_index_of_a_trillion_samples_is_there_at_once():
    sampler = StepSampler(10**12, 512, rank=3, world_size=8, seed=1)
    samples = sampler.samples_at(10**9)
    assert samples.shape == (64,)
    assert samples.min() >= 0
    assert samples.max() < 10**12


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_world_size_consumes_the_same_samples_at_each_step(world_size):
    for step in (0, 1, 12, 13):  # 100 samples: step 12 crosses the end of an epoch
        shares = [StepSampler(100, 8, r, world_size, 1).samples_at(step) for r in range(world_size)]
        whole = StepSampler(100, 8, 0, 1, 1).samples_at(step)
        assert sorted(np.concatenate(shares)) == sorted(whole)
        seen_by_one = StepSampler(100, 8, 0, world_size, 1).all_samples_at(step)
        assert seen_by_one.tolist() == whole.tolist()
        hashes = sum(samples_hash(share) for share in shares) % 2**HASH_BITS
        assert hashes == samples_hash(whole)


def test_an_epoch_uses_every_sample_exactly_once_also_across_a_change_of_world_size():
    used = []
    for step in range(26):  # 26 steps of 8 = 208 = two epochs of 104
        world_size = (1, 2, 4)[step % 3]
        for rank in range(world_size):
            used.extend(StepSampler(104, 8, rank, world_size, 5).samples_at(step))
    assert sorted(used) == sorted([*range(104)] * 2)


def test_it_is_a_distributed_sampler_and_a_data_loader_gives_its_steps_one_after_the_other():
    window = [{"after": 4, "steps": 3}]
    sampler = StepSampler(40, 8, rank=1, world_size=2, seed=0, left_out=window)
    assert isinstance(sampler, DistributedSampler)
    loader = DataLoader(range(40), batch_size=4, sampler=sampler)
    for step, batch in zip(range(20), loader, strict=False):  # the loader does not end
        assert batch.tolist() == sampler.samples_at(step).tolist()


def test_the_hash_sees_a_repeated_a_missing_and_a_swapped_sample():
    samples = np.arange(100, 132)
    seen = samples_hash(samples)
    assert samples_hash(samples[::-1]) == seen
    assert samples_hash(samples[:-1]) != seen
    assert samples_hash(np.append(samples[:-1], 100)) != seen
    assert samples_hash(np.append(samples[:-1], 132)) != seen


def test_labels_are_the_inputs_shifted_by_one(tmp_path):
    store = make_store(tmp_path, [(range(50), None)], 10)
    batches = list(micro_batches(np.array([0, 3, 1]), 2, store.train, torch.device("cpu")))
    assert [inputs.shape[0] for inputs, _ in batches] == [2, 1]
    inputs, labels = batches[0]
    assert inputs[1].tolist() == list(range(30, 40))
    assert labels[1].tolist() == list(range(31, 41))


def test_tokens_that_are_gone_from_under_a_run_are_an_error_not_a_crash(tmp_path):
    store = make_store(tmp_path, [(range(50), None)], 10)
    os.truncate(tmp_path / "store" / "train.bin", 60)
    assert store.train.read(np.array([0]))[0].tolist() == [list(range(10))]
    with pytest.raises(OSError, match="shorter than it was.*train.bin"):
        store.train.read(np.array([3]))


def test_a_store_of_later_code_which_counts_more_is_read(tmp_path):
    make_store(tmp_path, [(range(50), None)], 10)
    path = tmp_path / "store" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "counts": {**meta["counts"], "later": 3}}))
    assert TokenStore(tmp_path / "store", 10).counts.train_tokens == 50


@pytest.mark.parametrize("length", [2, 10, 11, 12, 21, 25])
def test_every_held_out_token_is_a_target_exactly_once(tmp_path, length):
    held_out = make_store(tmp_path, [(range(length), None)], 10, split=EVAL).eval
    labels = held_out.read(np.arange(held_out.num_samples))[1]
    assert labels[labels != -100].tolist() == list(range(1, length))


def make_store(folder, documents, seq_len, packing=None, split=TRAIN, too_long="split"):
    """A store of documents, each ids and flags, as prepare would write it."""
    writer = TokenWriter(folder / "new", 300)
    writer.append(split, token_batch([(np.array(i), f) for i, f in documents], writer.dtype))
    for name, sealed in writer.seal(seq_len).items():
        if packing:
            made = plans(sealed.stops, sealed.targets_in, seq_len, packing, too_long)
            writer.lay_out(name, sealed, made)
    writer.publish(folder / "store", {})
    return TokenStore(folder / "store", seq_len)


def random_documents(seed, number=60, is_masked=True):
    """Documents of 5 to 45 random ids, and flags of which some are set."""
    generator = np.random.default_rng(seed)
    documents = []
    for _ in range(number):
        flags = generator.random(generator.integers(5, 46)) < 0.4
        flags[-1] = True
        documents.append((generator.integers(0, 300, len(flags)), flags if is_masked else None))
    return documents


@pytest.mark.parametrize("seed", range(4))
def test_with_concat_a_token_is_a_target_where_its_flag_says_so(tmp_path, seed):
    documents = random_documents(seed)
    split = make_store(tmp_path, documents, 16).train
    ids, flags = (np.concatenate(arrays) for arrays in zip(*documents, strict=True))
    inputs, labels = split.read(np.arange(split.num_samples))
    used = split.num_samples * 16
    assert inputs.reshape(-1).tolist() == ids[:used].tolist()
    expected = np.where(flags, ids, -100)[1 : used + 1]
    assert labels.reshape(-1).tolist() == expected.tolist()
    counted = [split.target_tokens(np.array([i])) for i in range(split.num_samples)]
    assert counted == (labels != -100).sum(axis=1).tolist()


@pytest.mark.parametrize("packing", ["none", "best_fit"])
@pytest.mark.parametrize("is_masked", [True, False])
def test_a_packed_sample_holds_whole_documents_and_no_target_crosses_a_border(
    tmp_path, packing, is_masked
):
    documents = random_documents(7, is_masked=is_masked)
    split = make_store(tmp_path, documents, 50, packing).train
    inputs, labels, positions = split.read(np.arange(split.num_samples))
    expected = []
    for ids, flags in documents:
        flags = np.ones(len(ids), bool) if flags is None else flags
        expected.append((ids[:-1].tolist(), np.where(flags, ids, -100)[1:].tolist()))
    found = []
    for row in range(split.num_samples):
        borders = [*np.flatnonzero(positions[row] == 0), 50]
        for first, last in itertools.pairwise(borders):
            assert positions[row, first:last].tolist() == list(range(last - first))
            document = inputs[row, first:last].tolist(), labels[row, first:last].tolist()
            if document[1] != [-100]:  # else it fills the sample up
                found.append(document)
    assert sorted(found) == sorted(expected)
    assert split.row_targets.tolist() == (labels != -100).sum(axis=1).tolist()
    assert split.target_tokens(np.array([1, 0])) == (labels[:2] != -100).sum()


def test_flags_are_kept_as_runs_of_tokens():
    flags = np.array([1, 1, 0, 1, 0, 0, 1], bool)
    assert spans_of(flags).tolist() == [[0, 2], [3, 4], [6, 7]]
    assert spans_of(np.zeros(3, bool)).tolist() == []


def test_the_same_text_always_falls_on_the_same_side_of_the_split():
    texts = [f"document {i}" for i in range(20_000)]
    held_out = [text for text in texts if is_held_out(text, 0.05)]
    assert 0.04 < len(held_out) / len(texts) < 0.06
    assert all(is_held_out(text, 0.10) for text in held_out)
    assert not any(is_held_out(text, 0.0) for text in texts)
