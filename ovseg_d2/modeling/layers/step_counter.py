"""Which training step it is: what keyed random draws are keyed by."""

from __future__ import annotations

from detectron2.utils.events import get_event_storage


class StepCounter:
    """The iteration of detectron2's event storage; the number of calls so far where there is no storage."""

    def __init__(self) -> None:
        self._calls_without_storage = 0

    def __call__(self) -> int:
        try:
            return get_event_storage().iter
        except AssertionError:
            self._calls_without_storage += 1
            return self._calls_without_storage - 1
