"""Before a run on many hosts: `python launch/check.py --hostfile hosts --config x.yaml [...]`.

Asks every host over ssh, all at once, for what the ranks would compare at their start, and for its
GPUs and its way to the first host. The operators are compiled where they are missing. Exit code 2
and one line for every fault, which names the host.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hostfile", type=Path, required=True, metavar="FILE")
    parser.add_argument("--config", required=True, metavar="YAML", help="the run's configuration")
    parser.add_argument("--here", metavar="FIRST", help=argparse.SUPPRESS)  # asked over ssh
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()

    from irpe_ds.cluster.hostfile import read_hostfile
    from irpe_ds.config import load_config

    config = load_config(args.config, args.overrides)  # before the imports that take seconds
    hosts = [] if args.here else read_hostfile(args.hostfile)

    from irpe_ds.cluster import preflight

    if args.here:
        from irpe_ds.training.run import input_facts

        preflight.report(config, args.here, input_facts)
        return
    found = preflight.ask(hosts, [sys.executable, *sys.argv, "--here", hosts[0].name])
    print(preflight.table(hosts, found))
    faults = preflight.faults(hosts, found)
    for fault in faults:
        sys.stderr.write(f"error: {fault}\n")
    sys.exit(2 if faults else 0)


if __name__ == "__main__":
    run(main)
