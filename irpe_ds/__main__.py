"""The console command `irpe-ds`, also `python -m irpe_ds`: runs a script in this process."""

import argparse
import re
import runpy
import sys
from pathlib import Path

from irpe_ds.cli import run
from irpe_ds.files import SHIPPED

EPILOG = """
`irpe-ds COMMAND --help` says more. A YAML or JSON that is not found at a relative path is looked
for in the package: launch/configs/quickstart.yaml, ds_configs/zero1.json. To start several ranks:

  deepspeed --module irpe_ds train --config x.yaml
  torchrun --nproc_per_node 8 -m irpe_ds train --config x.yaml
"""


def scripts() -> dict[str, Path]:
    """The commands, and the files that they run."""
    files = [path for folder in ("launch", "data_prep") for path in (SHIPPED / folder).glob("*.py")]
    found = {path.stem: path.resolve() for path in files if "\n    run(main)\n" in path.read_text()}
    return dict(sorted({**found, "ops": Path(__file__).parent / "ops/__main__.py"}.items()))


def summary(script: Path) -> str:
    """What a script does: its docstring up to the first full stop or colon."""
    return re.split(r'[.:][\s"]', script.read_text().removeprefix("r")[3:], maxsplit=1)[0]


def main() -> None:
    """Run the script that the command line names, with the arguments that follow."""
    found = scripts()
    listed = "\n".join(f"  {name:<11}{summary(path)}" for name, path in found.items())
    parser = argparse.ArgumentParser(
        prog="irpe-ds",
        usage="irpe-ds COMMAND ...",
        description=f"Commands:\n{listed}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher puts it here
    parser.add_argument("command", choices=found, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help=argparse.SUPPRESS)
    args = parser.parse_args()
    script = str(found[args.command])
    sys.argv = [script, *args.rest]
    runpy.run_path(script, run_name="__main__")


def console() -> None:
    """`irpe-ds`."""
    run(main)


if __name__ == "__main__":
    console()
