"""Which groups make a batch: worked by hand, and for any sizes at all."""

from hypothesis import given, settings
from hypothesis import strategies as st

from syncline.trajectory.batches import Candidate, choose, fill, sequences_promised


def chosen(sizes, batch_size, *, owners=None, minima=None, with_oldest=False):
    owners = owners or "a" * len(sizes)
    candidates = [Candidate(owner, size) for owner, size in zip(owners, sizes, strict=True)]
    return choose(candidates, batch_size, minima=minima or {}, with_oldest=with_oldest)


def test_the_oldest_choice_that_fits_exactly_and_else_the_largest_below():
    assert chosen([4, 4, 4], 8) == [0, 1]
    assert chosen([6, 4, 4], 8) == [1, 2]
    assert chosen([6, 4, 2], 8) == [0, 2]
    assert chosen([5, 4, 6], 8) == [2]
    assert chosen([3, 3, 3], 8) == [0, 1]
    assert chosen([6, 4, 4], 8, with_oldest=True) == [0]


def test_promised_sequences_come_first_as_far_as_they_fit():
    assert chosen([2, 2, 2, 2], 4, owners="aabb", minima={"b": 2}) == [0, 2]
    assert chosen([2, 2, 2, 2], 4, owners="aabb", minima={"b": 3}) == [2, 3]
    assert chosen([2, 2, 8], 4, owners="aab", minima={"b": 2}) == [0, 1]
    assert chosen([2, 2, 2], 4, owners="abb", minima={"b": 4}, with_oldest=True) == [0, 1]


def test_promises_above_the_whole_are_scaled_down():
    assert sequences_promised({"a": 0.25, "b": 0.5}, 8) == {"a": 2, "b": 4}
    assert sequences_promised({"a": 1.0, "b": 1.0}, 8) == {"a": 4, "b": 4}


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 12), max_size=10), room=st.integers(0, 40))
def test_no_choice_of_any_sizes_comes_closer(sizes, room):
    sums = {0}
    for size in sizes:
        sums |= {total + size for total in sums}
    indices = fill(sizes, room)
    assert indices == sorted(set(indices))
    assert sum(sizes[i] for i in indices) == max(total for total in sums if total <= room)


@settings(deadline=None)
@given(exponents=st.lists(st.integers(0, 3), min_size=1, max_size=40), factor=st.integers(1, 3))
def test_sizes_that_divide_one_another_and_the_batch_always_fill_it(exponents, factor):
    sizes, batch_size = [2**exponent for exponent in exponents], 8 * factor
    if sum(sizes) >= batch_size:
        assert sum(sizes[i] for i in chosen(sizes, batch_size)) == batch_size
