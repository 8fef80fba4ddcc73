"""Check hosts before a run: `python launch/check.py --hostfile hosts --config x.yaml [...]`.

Queries all hosts at once over ssh for what the ranks would compare at start-up, their free GPUs and
their network interface to the first host. Compiles the operators where they are missing. Exits with
code 2 (ExitCode.MISTAKE) and one line per problem, which names the host.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree's irpe_ds, whatever is installed

from irpe_ds.cli import run
from irpe_ds.errors import ExitCode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hostfile", type=Path, required=True, metavar="FILE")
    parser.add_argument("--config", required=True, metavar="YAML", help="the run's configuration")
    parser.add_argument("--here", metavar="FIRST", help=argparse.SUPPRESS)  # queried over ssh
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()

    from irpe_ds.cluster.hostfile import read_hostfile
    from irpe_ds.config import load_config

    config = load_config(args.config, args.overrides)  # before the imports that take seconds
    hosts = [] if args.here else read_hostfile(args.hostfile)

    from irpe_ds.cluster import preflight

    if args.here:
        from irpe_ds.training.run import input_facts

        preflight.print_report(config, args.here, input_facts)
        return
    reports = preflight.query_hosts(hosts, [sys.executable, *sys.argv, "--here", hosts[0].name])
    print(preflight.table(hosts, reports))
    problems = preflight.problems(hosts, reports)
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    sys.exit(ExitCode.MISTAKE if problems else ExitCode.DONE)


if __name__ == "__main__":
    run(main)
