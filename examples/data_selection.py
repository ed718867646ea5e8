"""
Are the examples that a network is least sure of worth more than random ones?

A network is trained without label smoothing, which would blur its confidence, and ranks the
training images by it. Then one network is trained on a random 60% of them and another on the least
confident 60%, for 16 epochs each.

    python examples/data_selection.py --data DIR --seed S --log FILE
"""

import argparse
import copy
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # to run from a checkout as it stands
from airbench import CifarLoader, infer, train94, warmup94  # noqa: E402
from airbench94 import check_data, device_name, hyp  # noqa: E402


def subset(loader, indices):
    """A loader of these images alone; the given one stays as it is."""
    # In their old order: the first 5,000 images decide how the network whitens, and are not to be
    # those of the least confidence.
    indices = indices.sort().values.to(loader.images.device)
    loader = copy.copy(loader)
    loader.images = loader.images[indices]
    loader.labels = loader.labels[indices]
    return loader


def check_log(path):
    """Raises ValueError unless the file is of this program, or is not there or empty."""
    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        is_own = 'arguments' in json.loads(path.read_text().splitlines()[0])
    except (ValueError, TypeError):
        is_own = False
    if not is_own:
        raise ValueError(f'{path} is not a log of this program: name another file with --log')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--data', metavar='DIR', help='as for airbench94.py (default: $AIRBENCH_DATA, else cifar10)'
    )
    parser.add_argument('--seed', type=int, default=0, help='(default: %(default)s)')
    parser.add_argument(
        '--epochs',
        type=float,
        default=16.0,
        help='of the trainings on 60%% of the images; that on all images has as many, but at most '
        f'{hyp["epochs"]} (default: %(default)s)',
    )
    parser.add_argument(
        '--log',
        type=Path,
        default=Path('logs', 'data_selection.jsonl'),
        help='JSON lines, appended to (default: %(default)s)',
    )
    args = parser.parse_args()
    if not 0 < args.epochs < math.inf:
        parser.error('--epochs must be more than 0')
    if not 0 <= args.seed < 2**62:
        parser.error(f'--seed must be from 0 to below 2**62, not {args.seed}')
    try:
        train_loader = CifarLoader(
            args.data, train=True, batch_size=1024, aug=dict(flip=True, translate=2)
        )
        test_loader = CifarLoader(args.data, train=False)
        check_data(train_loader, test_loader)
        n = int(0.6 * len(train_loader.images))
        if n < train_loader.batch_size:
            raise ValueError(f'60% of the images are {n}, less than a batch')
        check_log(args.log)
        args.log.parent.mkdir(parents=True, exist_ok=True)
        log = open(args.log, 'a', buffering=1)
    except (OSError, ValueError) as error:
        first_line = str(error).partition('\n')[0]
        print(f'data_selection: error: {first_line}', file=sys.stderr)
        return 2

    print(
        json.dumps(
            dict(
                type='header',
                arguments={name: str(value) for name, value in vars(args).items()},
                torch=torch.__version__,
                device=device_name(train_loader.images.device),
                threads=torch.get_num_threads(),
                data=dict(train=train_loader.sha256, test=test_loader.sha256),
                source=Path(__file__).read_text(),
            )
        ),
        file=log,
    )
    results = []
    warmup94(train_loader, test_loader)

    def run(name, loader, **options):
        print(f'\n{name}: {len(loader.images)} images')
        rows = []
        net = train94(
            loader,
            test_loader,
            seed=args.seed,
            callback=lambda net, row: rows.append(row),
            **options,
        )
        results.append(
            dict(
                type='run',
                name=name,
                images=len(loader.images),
                seed=args.seed,
                **options,
                val_acc=[row['val_acc'] for row in rows[:-1]],
                seconds=rows[-1]['time_seconds'],
                tta_val_acc=rows[-1]['tta_val_acc'],
            )
        )
        print(json.dumps(results[-1]), file=log)
        return net

    try:
        net = run(
            'all, without label smoothing',
            train_loader,
            epochs=min(hyp['epochs'], args.epochs),
            label_smoothing=0,
        )
        confidence = infer(net, train_loader).softmax(1).amax(1)
        generator = torch.Generator().manual_seed(args.seed)
        at_random = torch.randperm(len(confidence), generator=generator)[:n]
        run('random 60%', subset(train_loader, at_random), epochs=args.epochs)
        least = confidence.argsort()[:n]
        run('least confident 60%', subset(train_loader, least), epochs=args.epochs)
    except FloatingPointError as error:  # it diverged
        print(f'data_selection: error: {error}', file=sys.stderr)
        return 1

    print(f'\n{"trained on":30}{"images":>8}{"epochs":>8}{"tta_val_acc":>13}')
    for result in results:
        print(
            f'{result["name"]:30}{result["images"]:8}{result["epochs"]:8}'
            f'{result["tta_val_acc"]:13.4f}'
        )
    return 0


if __name__ == '__main__':
    sys.exit(main())
