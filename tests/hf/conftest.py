"""What all tests of the Transformers loop have in common."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def single_threaded():
    from tests.hf.helpers import one_thread  # not above: a test whose packages are missing skips, this file cannot

    with one_thread():
        yield
