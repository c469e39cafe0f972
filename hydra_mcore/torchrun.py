# Copyright 2026 the hydra_mcore authors.
# SPDX-License-Identifier: Apache-2.0
"""Run torchrun without its traceback: a rank that ends has said why, and 50 lines behind it would hide that.

Its five lines at the start, that each rank has one thread, are left out, too. ``python -m hydra_mcore.torchrun`` takes
torchrun's flags. The exit status is that of the first rank that failed, or 128 and the number of the signal that ended
it.
"""

from __future__ import annotations

import logging
import sys

SIGNALLED = 128  # added to the number of a signal, as shells do


def main() -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.run").addFilter(lambda record: "OMP_NUM_THREADS" not in record.msg)
    try:
        torchrun()
    except ChildFailedError as failed:
        status = failed.get_first_failure()[1].exitcode  # torch has logged it, with the rank: one line
        sys.exit(status if status > 0 else SIGNALLED - status)
    except SignalException as stopped:
        sys.exit(SIGNALLED + stopped.sigval)


if __name__ == "__main__":
    main()
