"""What every script does with a mistake of its user."""

import os
import sys
from collections.abc import Callable

from irpe_ds.errors import ConfigError


def run(main: Callable[[], None]) -> None:
    """Call main; a ConfigError becomes one message on stderr and exit code 2, no traceback."""
    try:
        main()
    except ConfigError as error:
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
        rank = f"[rank {os.environ['RANK']}] " if several else ""
        sys.stderr.write(f"{rank}error: {error}\n")
        sys.stderr.flush()
        sys.exit(2)
