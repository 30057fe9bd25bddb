"""Messages and progress bars of other libraries that are left out while something of ours runs, in its thread alone."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ignore_message(logger_name: str, text: str, unless: tuple[str, ...] = ()) -> Iterator[None]:
    """Leave out one logger's messages that contain a text, unless they contain one of others."""
    thread = threading.get_ident()

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return record.thread != thread or text not in message or any(word in message for word in unless)

    logger = logging.getLogger(logger_name)
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


class _NoInnerBars(threading.local):
    """Leaves out transformers' progress bars, one for each model, which break a bar around them."""

    depth = 0
    lock, users, outer = threading.Lock(), 0, None  # of all threads: who uses the hook, and the hook that was there before

    def __enter__(self):
        self.depth += 1
        with self.lock:
            if _NoInnerBars.users == 0:
                _NoInnerBars.outer = _set_transformers_hook(self.hook)
            _NoInnerBars.users += 1

    def __exit__(self, *error):
        self.depth -= 1
        with self.lock:
            _NoInnerBars.users -= 1
            if _NoInnerBars.users == 0:
                _set_transformers_hook(_NoInnerBars.outer)

    def hook(self, make, args, kwargs):
        kwargs = kwargs | {"disable": True} if self.depth else kwargs
        outer = _NoInnerBars.outer
        return make(*args, **kwargs) if outer is None else outer(make, args, kwargs)


def _set_transformers_hook(hook):
    """Sets what makes transformers' progress bars, and returns what did before. transformers 5.0 has no such hook."""
    from transformers.utils import logging  # not before: importing a model shall not import transformers

    set_hook = getattr(logging, "set_tqdm_hook", None)
    return None if set_hook is None else set_hook(hook)


no_inner_bars: _NoInnerBars = _NoInnerBars()  # with no_inner_bars: ...
