"""
SGD, Muon and AdamW on the network and the schedule of airbench94_muon.py.

Trains with each in turn, so that what disturbs the machine disturbs all alike, and prints the mean
accuracies with their 95% intervals. The logs are those of airbench94_muon.py, a file for each
optimizer. The same command continues them. As they do not tell what an optimizer was, the folder
also gets a copy of this program, and a changed program must have another folder.

    python examples/optimizers.py --data DIR --runs 50 --folder logs

Muon has the recipe's hyperparameters. Those of the other two below are a start: tune them before
you conclude anything. All other flags are passed on to airbench94_muon.py. The PFLOPs are counted
with Muon's products, some 3%, which the other two do not have.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'results')]  # to run from a checkout as it stands
import summarize  # noqa: E402

import airbench94_muon  # noqa: E402

real_make_optimizer = airbench94_muon.make_optimizer


def sgd(net, h):
    """Of the recipe's two optimizers the SGD stays. Another trains the filters, without decay."""
    for_head_and_biases, muon = real_make_optimizer(net, h)
    filters = muon.param_groups[0]['params']
    for_filters = torch.optim.SGD(filters, lr=2e-3, momentum=0.85, nesterov=True)
    return [for_head_and_biases, for_filters]


def adamw(net, h):
    for_head_and_biases, muon = real_make_optimizer(net, h)
    filters = muon.param_groups[0]['params']
    for_filters = torch.optim.AdamW(filters, lr=2e-3, eps=1e-4, weight_decay=0.0)
    return [for_head_and_biases, for_filters]


OPTIMIZERS = {'sgd': sgd, 'muon': real_make_optimizer, 'adamw': adamw}


def keep_source(folder):
    """Copies this program to the folder. Raises ValueError if the folder has another version."""
    source = Path(__file__).read_bytes()
    copy = folder / 'optimizers.py'
    if copy.exists() and copy.read_bytes() != source:
        raise ValueError(f'{copy} differs from this program: name another --folder')
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f'optimizers.py.{os.getpid()}'  # as torchrun's processes write at once
    part.write_bytes(source)
    part.replace(copy)


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
    try:
        keep_source(args.folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for runs in range(1, args.runs + 1):
        for name, make_optimizer in OPTIMIZERS.items():
            airbench94_muon.make_optimizer = make_optimizer
            log = args.folder / f'optimizer_{name}.jsonl'
            words = [*passed_on, '--log', str(log), '--runs', str(runs)]
            if args.save:
                words += ['--save', str(args.save / name)]
            sys.argv = ['airbench94_muon.py', *words]
            code = airbench94_muon.main()  # adds the run that the log lacks
            if code != 0:
                return code
    for name in OPTIMIZERS:
        # torchrun's processes have a log each, optimizer_sgd.rank0.jsonl for example.
        logs = sorted(args.folder.glob(f'optimizer_{name}.*jsonl'))
        try:
            _, logged = summarize.read_logs(logs)
        except ValueError as error:  # as of a seed that ran both with torchrun and without
            print(f'optimizers: error: {error}', file=sys.stderr)
            return 2
        summary = summarize.summarize(logged)
        line = f'{name:6} n {summary["n"]}'
        if summary['diverged'] > 0:
            line += f', {summary["diverged"]} diverged'
        if summary['n'] > 0:
            line += f', mean {summary["mean"]:.4f}'
        if summary['n'] > 1:
            low, high = summary['interval']
            line += f', its 95% interval {low:.4f} to {high:.4f}'
        print(line)
    return 0


if __name__ == '__main__':
    sys.exit(main())
