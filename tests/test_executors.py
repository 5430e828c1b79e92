"""The executor's three stages: order, limits, errors and cancellation, with plain functions."""

from __future__ import annotations

import threading

import pytest

from service.errors import Cancelled
from service.run.executors import ThreadExecutor, Timing
from tests.kits.patience import PATIENCE


class Fault(Exception):
    pass


def failing_at(item, do=lambda value: value):
    def stage(value):
        if value == item:
            raise Fault(f"at {item}")
        return do(value)

    return stage


def run(items, *, read=lambda i: i, infer=lambda v: v, write=lambda i, a: None, **more):
    return ThreadExecutor().run(items, read=read, infer=infer, write=write, **more)


def test_every_item_goes_through_in_order():
    written = []
    run(
        range(50),
        read=lambda i: i * 10,
        infer=lambda v: v + 1,
        write=lambda i, a: written.append((i, a)),
    )
    assert written == [(i, i * 10 + 1) for i in range(50)]


def test_a_run_without_items_calls_no_stage():
    assert run([]) == Timing()


@pytest.mark.parametrize("stage", ["read", "infer", "write"])
def test_an_error_of_a_stage_stops_the_others_and_is_raised_unchanged(stage):
    begun, written = [], []
    stages = {
        "read": lambda i: begun.append(i) or i,
        "infer": lambda v: v,
        "write": lambda i, a: written.append(i),
    }
    ok = stages[stage]

    def broken(item, *rest):
        if item == 5:
            raise Fault("at 5")
        return ok(item, *rest)

    with pytest.raises(Fault, match="at 5"):
        run(range(1000), **{**stages, stage: broken})
    # Items that were inferred but not yet written are dropped.
    assert written == list(range(len(written)))
    assert 5 not in written
    # At most the items between two stages were read without being written.
    assert len(begun) < 20


def test_the_number_of_items_between_stages_is_limited():
    lock, alive, most = threading.Lock(), 0, 0

    def read(item):
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        return item

    def write(item, result):
        nonlocal alive
        with lock:
            alive -= 1

    run(range(300), read=read, write=write)
    assert alive == 0
    assert most <= 6


def test_the_next_item_is_read_while_an_item_is_inferred():
    read_second = threading.Event()

    def infer(item):
        # If the stages did not overlap, the second item would never be read during this wait.
        return item == 0 and read_second.wait(PATIENCE)

    results = []
    run(
        [0, 1],
        read=lambda i: i if i == 0 else (read_second.set(), i)[1],
        infer=infer,
        write=lambda i, a: results.append(a),
    )
    assert results[0] is True


def test_a_cancelled_run_stops_after_the_current_item():
    cancelled, written = threading.Event(), []

    def infer(item):
        if item == 3:
            cancelled.set()
        return item

    with pytest.raises(Cancelled):
        run(range(100), infer=infer, write=lambda i, a: written.append(i), cancelled=cancelled)
    assert written == list(range(len(written)))
    assert len(written) <= 4


def test_a_run_cancelled_before_its_start_reads_no_item():
    cancelled, read = threading.Event(), []
    cancelled.set()
    with pytest.raises(Cancelled):
        run(range(3), read=read.append, cancelled=cancelled)
    assert read == []


def test_the_threads_of_a_run_end_with_it():
    before = set(threading.enumerate())
    with pytest.raises(Fault):
        run(range(10), infer=failing_at(2))
    run(range(10))
    # Threads of other tests may end in the meantime.
    assert set(threading.enumerate()) <= before


def test_timings_are_added_by_stage():
    total = Timing(read=1, infer=2, write=3) + Timing(write=4)
    assert total == Timing(read=1, infer=2, write=7)
    measured = run([0], infer=lambda v: threading.Event().wait(0.05))
    assert measured.infer > 0
