"""What every script does with a mistake of its user."""

import os
import sys
from collections.abc import Callable

from irpe_ds.errors import ConfigError, TrainingError


def run(main: Callable[[], None]) -> None:
    """Call main; errors meant for the user become one message on stderr, without a traceback.

    The exit code is 2 for a ConfigError, 1 for a TrainingError.
    """
    try:
        main()
    except (ConfigError, TrainingError) as error:
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
        rank = f"[rank {os.environ['RANK']}] " if several else ""
        sys.stderr.write(f"{rank}error: {error}\n")
        sys.stderr.flush()
        sys.exit(2 if isinstance(error, ConfigError) else 1)
