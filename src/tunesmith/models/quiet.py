"""transformers without what it says besides: nothing that Tunesmith does not say."""

from __future__ import annotations

import logging as standard
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide the bars of loading and saving, which take a fraction of a second, inside the block."""
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


@contextmanager
def without_load_report() -> Iterator[None]:
    """Hide transformers' table of weights that a file has not, inside the block.

    For a model that gets a new head, where they are meant to be missing.
    """
    logger = standard.getLogger("transformers.modeling_utils")
    # A filter and not a level: at a higher level transformers tells of things that do not matter.
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(record: standard.LogRecord) -> bool:
    return record.levelno > standard.WARNING
