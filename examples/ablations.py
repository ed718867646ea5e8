"""
What do the alternating flip and the Lookahead contribute to airbench94.py?

Three recipes take turns, a run each: the script's own, one with a random flip, and one without
Lookahead. So what disturbs the machine disturbs all three alike. The logs are those of
airbench94.py. The same command continues them.

    python examples/ablations.py --data DIR --runs 50 --folder logs
    python results/summarize.py logs/baseline.jsonl --against logs/random_flip.jsonl

About 50 runs a side tell an effect of 0.1 points from chance. All other flags are passed on to
airbench94.py: --epochs 3 --widths "(32, 128, 128)" takes an eleventh of its compute. Its runs
scatter more, and what it finds holds for that.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # to run from a checkout as it stands
import airbench94  # noqa: E402

ARMS = {
    'baseline': [],
    'random_flip': ['--altflip', 'False'],
    'no_lookahead': ['--lookahead', 'False'],
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--runs', type=int, default=50, help='of each (default: %(default)s)')
    parser.add_argument('--folder', type=Path, default=Path('logs'), help='(default: logs)')
    parser.add_argument(
        '--save', type=Path, help='for the trained networks, a folder for each (default: none)'
    )
    args, passed_on = parser.parse_known_args()
    if args.runs < 1:
        parser.error(f'--runs must be at least 1, not {args.runs}')
    for runs in range(1, args.runs + 1):
        for arm, changes in ARMS.items():
            log = args.folder / f'{arm}.jsonl'
            words = [*passed_on, *changes, '--log', str(log), '--runs', str(runs)]
            if args.save:
                words += ['--save', str(args.save / arm)]
            sys.argv = ['airbench94.py', *words]
            code = airbench94.main()  # adds the run that the log lacks
            if code != 0:
                return code
    return 0


if __name__ == '__main__':
    sys.exit(main())
