"""Feed: what a step consumes follows from its number, whichever rank is asked."""

import numpy as np
import pytest
import torch

import tiny
from trainstack.config.batch import IGNORED_LABEL
from trainstack.config.load import load
from trainstack.data.corpus import open_corpus
from trainstack.data.feed import Feed, held_out_batches
from trainstack.data.order import HASH_BITS
from trainstack.distributed import World

LEFT_OUT = [{"after": 4, "steps": 3}]


def feed(home, world_size: int = 1, rank: int = 0, left_out=()) -> Feed:
    config = load(tiny.write_config(home), [])
    world = World(rank, rank, world_size, world_size, torch.device("cpu"))
    corpus = open_corpus(home, config)
    return Feed(config, corpus, config.batch_plan(world_size), world, list(left_out))


@pytest.mark.parametrize("step", [1, 7, 500])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_consume_what_one_process_would(own_home, world_size, step):
    alone = feed(own_home).at(step)
    ranks = [feed(own_home, world_size, rank).at(step) for rank in range(world_size)]
    together = np.concatenate([data.samples for data in ranks])
    assert sorted(together) == sorted(alone.samples)
    assert {data.target_tokens for data in ranks} == {alone.target_tokens}
    assert sum(data.samples_hash for data in ranks) % 2**HASH_BITS == alone.samples_hash
    assert all(len(list(data.batches)) == 8 // world_size // 2 for data in ranks)


def test_a_step_is_the_same_whenever_it_is_asked_for(own_home):
    one, other = feed(own_home), feed(own_home)
    steps = [one.at(step).samples_hash for step in (1, 2, 3, 40)]
    assert [other.at(step).samples_hash for step in (40, 3, 2, 1)] == steps[::-1]


def test_batches_are_inputs_with_the_next_token_as_label(own_home):
    inputs, labels = next(feed(own_home).at(1).batches)
    assert inputs.shape == labels.shape == (2, tiny.SEQ_LEN)
    assert inputs.dtype == labels.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], labels[:, :-1])


def test_data_that_a_rollback_left_out_is_passed_over_from_that_step_on(own_home):
    whole, left_out = feed(own_home), feed(own_home, left_out=LEFT_OUT)
    assert whole.at(4).samples_hash == left_out.at(4).samples_hash
    assert whole.at(5 + 3).samples_hash == left_out.at(5).samples_hash


@pytest.mark.parametrize("most", [None, 7])
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_ranks_together_evaluate_every_held_out_sample_once_in_batches_of_any_world(
    own_home, world_size, most
):
    (store,) = feed(own_home).corpus.stores.values()
    alone = list(held_out_batches(store.eval, most, 2, feed(own_home).world)[0])
    worlds = [World(rank, 0, world_size, 1, torch.device("cpu")) for rank in range(world_size)]
    found = [held_out_batches(store.eval, most, 2, world) for world in worlds]
    batches = [list(own) for own, _ in found]
    assert {rounds for _, rounds in found} == {max(map(len, batches))}
    assert sum(map(len, batches)) == len(alone)
    for number, (inputs, labels) in enumerate(alone):
        own = batches[number % world_size][number // world_size]
        assert torch.equal(own[0], inputs) and torch.equal(own[1], labels)
    targets = sum(int((b[1] != IGNORED_LABEL).sum()) for b in alone)
    assert targets == (7 * tiny.SEQ_LEN if most else len(store.eval.ids) - 1)


def test_one_data_set_has_nothing_to_count(own_home):
    assert feed(own_home).drawn_after(1, None) is None
    assert feed(own_home).by_source(None) == {}
