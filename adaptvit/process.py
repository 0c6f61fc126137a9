"""The process that calls: where it computes, and what a long call changes of it comes back as it was."""

import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data._utils import signal_handling

T = TypeVar("T")
STOPS = (signal.SIGINT, signal.SIGTERM)


def best_device() -> str:
    """Where commands run unless told, as in training: an accelerator where torch finds one, else cpu.

    Apple's, which lacks some operators, is taken where it is asked for by name.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None or found.type == "mps" else found.type


def pins(device: torch.device) -> bool:
    """Whether batches are to be laid where a device copies them from while others are computed."""
    return device.type not in ("cpu", "mps")


def in_float64(t: Tensor) -> Tensor:
    """A tensor in float64: on the host where the device has none, as Apple's."""
    return (t.cpu() if t.device.type == "mps" else t).double()


def widest(device: torch.device) -> torch.dtype:
    """The widest floating point of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def as_found() -> Iterator[None]:
    """Leave the caller's process as it was, also where the block raises; as a decorator, `@as_found()`.

    That is the random state of torch, numpy and Python, torch's number of threads, accelerate's state, warnings filters
    and signal handlers. A process group that was started stays for the next call: the processes of torchrun do not find
    each other twice.
    """
    randomness = torch.get_rng_state(), np.random.get_state(), random.getstate()
    devices = torch.get_device_module()
    drawn = _drawn(devices)
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
        if _drawn(devices) is not None:
            if drawn is None:  # first used in the block: from the seed that it would have had
                devices.manual_seed_all(torch.initial_seed())
            else:
                devices.set_rng_state_all(drawn)
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


@contextmanager
def stopped_later() -> Iterator[Callable[[], None]]:
    """What Ctrl+C and SIGTERM raise, where Python handles them, is raised by what this gives; a second one's, at once.

    Of processes that wait for each other none may leave the others waiting.
    """
    before = _handlers()
    handlers: dict[int, Any] = {number: before[number] for number in STOPS if callable(before.get(number))}
    came: list[Callable[[], object]] = []

    def hold(number: int, frame: object) -> None:
        signal.signal(number, handlers[number])
        came.append(partial(handlers[number], number, frame))

    def tell() -> None:
        while came:
            came.pop()()

    child: int = getattr(signal, "SIGCHLD", 0)
    known = signal_handling._SIGCHLD_handler_set
    if child in before:  # torch raises of a dead worker in the midst of anything; who waits for it is told all the same
        signal.signal(child, signal.SIG_DFL)
        signal_handling._SIGCHLD_handler_set = True
    for number in handlers:
        signal.signal(number, hold)
    try:
        yield tell
    finally:
        for one in {*handlers, child} & {*before}:
            signal.signal(one, before[one])
        signal_handling._SIGCHLD_handler_set = known
    tell()  # of what came too late to be asked for


def place() -> tuple[int, int]:
    """Number of this process among those that train, and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def from_all(work: Callable[[], T]) -> list[T]:
    """What `work` gives in each process of a group, in their order; where it fails in one, it does in all.

    Raises:
        ChildProcessError: it failed in another process.
        What `work` raises.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return [work()]
    made, failure = None, None
    try:
        made = work()
    except Exception as error:
        failure = error
    told: list[Any] = [None] * place()[1]
    distributed.all_gather_object(told, (made, None if failure is None else fault(failure)))
    if failure is not None:
        raise failure
    for rank, (_, why) in enumerate(told):
        if why is not None:
            raise ChildProcessError(f"process {rank} failed: {why}")
    return [one for one, _ in told]


def fault(error: BaseException) -> str:
    """An error in words, for those who see it from outside."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


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


def _drawn(devices: Any) -> list[Tensor] | None:
    """The random states of accelerators, by the module that torch has for their kind; None where none was used."""
    used = hasattr(devices, "get_rng_state_all") and devices.is_initialized()
    return devices.get_rng_state_all() if used else None


def _handlers() -> dict[int, Any]:
    """By signal, those that Python can set again; none but in the main thread, which alone may set them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return {number: handler for number, handler in found.items() if handler is not None}
