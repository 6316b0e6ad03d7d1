"""A short version of tests.support.kill."""

import pytest

from tests.support.kill import survive


@pytest.mark.long
def test_killed_conversions_go_on_to_the_same_output(tmp_path):
    assert sum(survive(2, 1, tmp_path).values()) == 2


@pytest.mark.slow
def test_fifty_killed_conversions(tmp_path):
    assert sum(survive(50, 0, tmp_path).values()) == 50
