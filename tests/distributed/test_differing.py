"""Processes of one run that were given other values of the same sizes: an error on each, which
names what differs.
"""

import differing
import processes

SHOULD = "should be the same on every process, got another on some"
WANTED = {
    "alike": None,
    "model alike": None,
    "alike, drafted by parts of weights": None,
    "generate sampler": f"generate: sampler {SHOULD}",
    "stream sampler": f"stream: sampler {SHOULD}",
    "speculate sampler": f"speculate: sampler {SHOULD}",
    "speculate drafter": f"speculate: drafter {SHOULD}",
    "best_of sampler": f"best_of: sampler {SHOULD}",
    "enter sampler": f"enter: sampler {SHOULD}",
    "another call": f"the call and its values {SHOULD}",
    "generate prompt": f"generate: prompt {SHOULD}",
    "generate prompt of another size": f"generate: prompt {SHOULD}",
    "generate key": f"generate: key {SHOULD}",
    "generate in a batch": f"generate: key {SHOULD}",
    "speculate key": f"speculate: key {SHOULD}",
    "beam_search prompt": f"beam_search: prompt {SHOULD}",
    "best_of key": f"best_of: key {SHOULD}",
    "loss under grad": f"loss: tokens {SHOULD}",
    "shard": "shard: embedding and layers.0.q and layers.0.k and layers.0.v and layers.0.o and "
    "layers.0.gate",
    "shard a large leaf": f"shard: w {SHOULD}",
    "shard another tree": f"the call and its values {SHOULD}",
    "model generate key": f"generate: key {SHOULD}",
    "model hidden": f"shard_map: tokens {SHOULD}",
}


def test_processes_that_differ_are_told():
    first, second = processes.run(differing.differing, 2)
    # the same on both
    assert first == second | {"another call": second["another call"].replace("score", "loss", 1)}
    for name, told in first.items():
        wanted = WANTED.get(name, SHOULD)
        assert told is None if wanted is None else wanted in (told or ""), (name, told)


def test_rows_of_data_may_differ_and_a_difference_elsewhere_is_told_to_all():
    for found in processes.run(differing.rows_differ, 4):
        assert found["by data"] is None
        assert SHOULD in found["one of four"]
