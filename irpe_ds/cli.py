"""What every script does with a mistake of its user."""

import os
import sys
from collections.abc import Callable

from irpe_ds.errors import ExitCode, TrainingError, UserError


def run(main: Callable[[], None]) -> None:
    """Call main; errors meant for the user become one message on stderr, without a traceback.

    Exit codes: `irpe_ds.errors.ExitCode`.
    """
    try:
        main()
    except (TrainingError, UserError) as error:
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
        rank = f"[rank {os.environ['RANK']}] " if several else ""
        sys.stderr.write(f"{rank}error: {error}\n")
        sys.stderr.flush()
        sys.exit(ExitCode.MISTAKE if isinstance(error, UserError) else ExitCode.FAILED)
