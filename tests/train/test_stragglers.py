"""A slow rank is named once, with its machine; equal ones and a single slow step are not."""

import logging

import torch

from tbf.train.stragglers import WINDOW, StragglerWatch

CPU = torch.device("cpu")


def test_the_slowest_of_many_is_named_with_its_machine_and_not_again_at_once(caplog):
    watch = StragglerWatch(["a", "a", "b", "b"], CPU)
    with caplog.at_level(logging.WARNING, logger="tbf"):
        named = [watch.judge([0.10, 0.11, 0.10, 0.20]) for _ in range(3 * WINDOW)]
    assert named == [None] * (WINDOW - 1) + [3] + [None] * (2 * WINDOW)
    assert "rank 3 on b is slow: 200 ms a step" in caplog.text and "take 100 ms" in caplog.text


def test_one_slow_step_and_small_differences_name_nobody():
    watch = StragglerWatch(["a", "b"], CPU)
    steps = [[0.1, 0.14]] * (WINDOW - 1) + [[0.1, 0.3]]
    assert [watch.judge(step) for step in steps * 3] == [None] * (3 * WINDOW)


def test_own_time_is_what_passes_between_two_calls():
    watch = StragglerWatch(["a", "b"], CPU)
    watch.waited(0.5)
    with watch.alone():
        sum(range(100_000))
    assert 0.5 < watch.take() < 5.0 and watch.take() == 0.0


def test_a_single_rank_is_never_slow():
    watch = StragglerWatch(["a"], CPU)
    assert [watch.judge([9.0]) for _ in range(WINDOW)] == [None] * WINDOW
