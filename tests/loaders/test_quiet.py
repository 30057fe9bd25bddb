import io
import logging
import threading

import pytest
from transformers.utils import logging as transformers_logging

from paella_diffusers.loaders.quiet import ignore_message, no_inner_bars


def test_a_message_is_ignored_for_a_while_and_in_one_thread(caplog):
    logger = logging.getLogger("some.library")

    def say():
        logger.warning("it falls back")

    with ignore_message("some.library", "falls back", unless=("MISSING",)):
        say()
        logger.warning("it falls back: MISSING")
        logger.warning("something else")
        thread = threading.Thread(target=say)
        thread.start()
        thread.join()
    say()
    assert [record.message for record in caplog.records] == [
        "it falls back: MISSING",
        "something else",
        "it falls back",
        "it falls back",
    ]
    assert not logger.filters


@pytest.mark.skipif(not hasattr(transformers_logging, "set_tqdm_hook"), reason="an older transformers has no such hook")
def test_bars_come_back_after_errors_and_other_threads_keep_theirs():
    bars = {}

    def bar(name):
        bars[name] = not transformers_logging.tqdm(range(1), file=io.StringIO()).disable

    outer = lambda make, args, kwargs: make(*args, **kwargs)
    before = transformers_logging.set_tqdm_hook(outer)
    try:
        transformers_logging.enable_progress_bar()
        with pytest.raises(ValueError), no_inner_bars, no_inner_bars:
            bar("inside")
            thread = threading.Thread(target=bar, args=("other thread",))
            thread.start()
            thread.join()
            raise ValueError
        bar("after")
        assert bars == {"inside": False, "other thread": True, "after": True}
        assert transformers_logging.set_tqdm_hook(before) is outer
    finally:
        transformers_logging.set_tqdm_hook(before)
        transformers_logging.disable_progress_bar()
