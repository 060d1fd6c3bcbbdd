"""Silences progress bars and notices of libraries, which hide the lines that matter; logs of roles keep them."""

from __future__ import annotations

import logging

from launch.log_level import LogLevel, log_level


def quiet_libraries() -> None:
    """Call before models are read: errors stay. With log level debug nothing is silenced."""
    if log_level() is LogLevel.debug:
        return
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # DeepSpeed sets its logger's level and handler when transformers imports it: a filter survives that.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
