"""A test in a process of its own, for what would not leave the tests after it as they were."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest


def in_a_process_of_its_own(test: Callable[..., None]) -> Callable[..., None]:
    """A decorator of tests whose backward passes start threads, as compiled ones do: a process that has some can no
    longer be forked by another test that trains."""

    @wraps(test)
    def forked(**given: Any) -> None:
        if not hasattr(os, "fork"):
            pytest.skip("needs a system that forks processes")
        context = multiprocessing.get_context("fork")
        told, tell = context.Pipe(duplex=False)

        def run() -> None:
            try:
                test(**given)
            except BaseException:
                tell.send(traceback.format_exc())
            else:
                tell.send("")

        process = context.Process(target=run)
        process.start()
        tell.close()
        said = told.recv()
        process.join()
        assert not said, said

    return pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")(forked)
