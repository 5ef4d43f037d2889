"""torch held to one thread, and what other threads get meanwhile."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pliant.runtime.threads import threads, torch_on_all, torch_on_one

pytestmark = pytest.mark.usefixtures("two_threads")


def counts():
    """Threads of torch and of the kernels."""
    return torch.get_num_threads(), threads()


def elsewhere():
    """The same in a thread that begins now."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(counts).result()


def test_torch_is_held_to_one_thread_and_the_kernels_are_not():
    with torch_on_one():
        assert counts() == (1, 2)
        with torch_on_all():
            assert counts() == (2, 2)
        assert counts() == (1, 2)
        with torch_on_one():
            assert counts() == (1, 2)
        assert counts() == (1, 2)
    assert counts() == (2, 2)
    with torch_on_all():
        assert counts() == (2, 2)


def test_a_thread_that_begins_meanwhile_has_all():
    """torch gives a thread, when it is first used there and for good, what was set last in any other."""
    with torch_on_one():
        assert elsewhere() == (2, 2)
        with torch_on_all():
            assert elsewhere() == (2, 2)
        with torch_on_one():
            assert elsewhere() == (2, 2)
        assert elsewhere() == (2, 2)
    assert elsewhere() == (2, 2)


def test_threads_are_given_back_after_an_error():
    with pytest.raises(ZeroDivisionError), torch_on_one(), torch_on_all():
        _ = 1 / 0
    assert counts() == elsewhere() == (2, 2)
