"""The process that calls: where it computes, and what a long call changes of it comes back as it was."""

import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data._utils import signal_handling


def best_device() -> str:
    """Where commands run unless told: cuda where torch finds one, as in training, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def as_found() -> Iterator[None]:
    """Leave the caller's process as it was, also where the block raises; as a decorator, `@as_found()`.

    That is the random state of torch, numpy and Python, torch's number of threads, accelerate's state, warnings filters
    and signal handlers. A process group that was started stays for the next call: the processes of torchrun do not find
    each other twice.
    """
    randomness = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    threads = torch.get_num_threads()
    shared = {id(state): dict(state) for state in _shared()}
    handlers = _handlers()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.set_rng_state(randomness[0])
        np.random.set_state(randomness[1])
        random.setstate(randomness[2])
        if torch.cuda.is_initialized():
            if cuda is None:  # first used in the block: from the seed that it would have had
                torch.cuda.manual_seed_all(torch.initial_seed())
            else:
                torch.cuda.set_rng_state_all(cuda)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for state in _shared():
            before = shared.get(id(state), {})  # nothing where the block was the first to import accelerate
            state.clear()
            state.update(before)
        for number, handler in _handlers().items():
            if handler != handlers.get(number, handler):
                signal.signal(number, handlers[number])
                if number == signal.SIGCHLD:
                    signal_handling._SIGCHLD_handler_set = False  # or torch's loaders would set theirs no more


def serve(_: int = 0) -> None:
    """Of a process that decodes for another: what stops that one is told by it alone, and it ends this one.

    Ctrl+C and many a SIGTERM go to both at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))  # a second one ends it
    told = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
        if not isinstance(error, ConnectionError | EOFError):  # of who stopped listening
            told(kind, error, place)

    sys.excepthook = tell


def _shared() -> list[dict[str, Any]]:
    """What accelerate, where it is imported, knows of the process: a dictionary for all instances of each kind."""
    module: Any = sys.modules.get("accelerate.state")
    if module is None:
        return []
    return [kind._shared_state for kind in (module.PartialState, module.AcceleratorState, module.GradientState)]


def _handlers() -> dict[int, Any]:
    """By signal, those that Python can set again; none but in the main thread, which alone may set them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return {number: handler for number, handler in found.items() if handler is not None}
