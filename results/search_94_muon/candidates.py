"""
What the searches for 94%, 95% and 96% by Muon are to try next, and what came of it.

    python results/search_94_muon/candidates.py queue 94 SEED RUNS >> QUEUE
    python results/search_94_muon/candidates.py effects 94 LOG [LOG ...]

A single run scatters too much to show 0.1 points, so no change is tried alone. In each run about
half of the changes are on, so that every run tells something of each of them: 32 runs measure
16 changes as well as 32 runs would measure one (a fractional factorial design; D. C. Montgomery,
"Design and Analysis of Experiments", chapter 8). That supposes that the effects add up. Fewer runs
say less. The fewest that say anything are two more than there are changes, and the first of a queue
are chosen so that these suffice. But then a single run is left over to tell the scatter, and the
intervals are wide: plan for ten more.

queue prints lines for search.py, each run with its own seed. effects prints what each change added
to the accuracy, by least squares, with 95% intervals; runs with other changes are left out, and so
are runs that diverged. With --half both are of the runs on half of the data. `python results/gpu.py
search` does both on a GPU.
"""

import argparse
import json
import math
import random

import numpy as np
from scipy import linalg, stats

# R: V, an earlier recipe of airbench94_muon.py, with whole images reduced, and at less compute.
R_94 = dict(
    budget=0.19,
    moved_crops=True,
    one_bias_lr=True,
    pool_first=[0, 0, 1],
    tta_share=0.125,
    mids=[48, 144, 384],
    widths=[72, 288, 384],
    kernels=[[2, 2], [3, 3], [3, 3]],
    stages=[[0.4, 24, 'bilinear'], [0.3, 28, 'bilinear'], [0.3, 32, 'none']],
)

# The same without needless products, which makes other sizes cheap.
CHEAP = dict(budget=0.17, trim=True, small_maps=True)
SIZES_26_30 = [[0.4, 26, 'bilinear'], [0.3, 30, 'bilinear'], [0.3, 32, 'none']]
SIZES_24_28 = [[0.3, 24, 'bilinear'], [0.3, 28, 'bilinear'], [0.4, 32, 'none']]
SIZES_22_26 = [[0.3, 22, 'bilinear'], [0.3, 26, 'bilinear'], [0.4, 32, 'none']]

# W, the recipe of airbench94_muon.py, at less compute.
BASE_94 = R_94 | CHEAP | dict(stages=SIZES_22_26, early_pool=True, tail=[0.04, 0.05])

# W with 1.33 times the channels, a translation by 3, and a compute that gives it 24 epochs
# (results/search_95_muon).
BASE_95 = BASE_94 | dict(
    budget=0.45, mids=[48, 192, 512], widths=[96, 384, 512], translate=3, head_scale=384
)

# W with 2.2 times the channels, for 44 epochs, and airbench96.py's augmentation.
BASE_96 = BASE_94 | dict(
    budget=2.2,
    mids=[48, 320, 832],
    widths=[160, 640, 832],
    translate=4,
    cutout=12,
    head_scale=384,
)

# What runs before seed 2050 had besides: of no use, or part of BASE_94 now.
TRIED_94 = {
    'E: 26 px and 30 px': CHEAP | dict(stages=SIZES_26_30),
    'E: 22 px and 26 px': CHEAP | dict(stages=SIZES_22_26),
    'a tail of the lr': dict(tail=[0.04, 0.05]),
    "block 3's pool before the norm": dict(early_pool=True),
    'cutout 6': dict(cutout=6),
    'each filter normalised': dict(row_norm=True),
    'label smoothing 0.15': dict(label_smoothing=0.15),
    '20 px at first': dict(
        stages=[[0.4, 20, 'bilinear'], [0.3, 28, 'bilinear'], [0.3, 32, 'none']]
    ),
}

# What BASE_94 has of these, taken away.
WITHOUT = {
    'no tail': dict(tail=None),
    "block 3's pool after the norm": dict(early_pool=False),
    '26 px and 30 px': dict(stages=SIZES_26_30),
}

# At most 16, see `design`.
FACTORS_94 = {
    'NorMuon': dict(normuon=0.95),
    "Hiverge's Muon": dict(
        muon_lr=0.21, muon_momentum=0.655, ns_coefficients=[3.4576, -4.7391, 2.0843]
    ),
    'block 1 frozen after 70%': dict(freeze=0.7),
    'fewer easy images': dict(prune=[0.35, 0.4]),  # every other time
    'groups of channels': dict(groups=[[1, 1], [1, 2], [1, 2]]),
    'narrower': dict(mids=[48, 128, 384], widths=[64, 256, 384]),
    'dropout': dict(dropout=0.1),
    'translation by 3': dict(translate=3),
    'normalised by 500': dict(ghost=500),
    'lr by a power of 1.3': dict(lr_power=1.3),
    # Muon's lr by the root of the batch size; the others go by the sum over a batch anyway
    'half as large batches': dict(batch_scale=0.5, block_lrs=[0.7, 0.7, 0.7], bn_momentum=0.225),
} | WITHOUT

FACTORS_95 = {
    '0.55 PFLOPs': dict(budget=0.55),
    'wider, for fewer epochs': dict(mids=[48, 224, 576], widths=[112, 448, 576]),
    '24 px and 28 px': dict(stages=SIZES_24_28),
    'translation by 4': dict(translate=4),
    'cutout 8': dict(cutout=8),
    'Muon lr 0.2': dict(muon_lr=0.2),
    'label smoothing 0.15': dict(label_smoothing=0.15),
    'a third convolution in block 3': dict(extra=[0, 0, 2]),
} | {
    name: FACTORS_94[name]
    for name in (
        'no tail',
        "block 3's pool after the norm",
        'NorMuon',
        'block 1 frozen after 70%',
        'fewer easy images',
        'groups of channels',
        'dropout',
        'normalised by 500',
    )
}

OF_R = TRIED_94 | {name: FACTORS_94[name] for name in FACTORS_94 if name not in WITHOUT}

FACTORS_96 = {
    # A residual around two convolutions fits into block 3 only: in block 1 the maps shrink, and
    # block 2 ends with a pool.
    'a third convolution in each block': dict(extra=[1, 1, 2]),
    'wider, for fewer epochs': dict(mids=[48, 384, 1008], widths=[192, 768, 1008]),
    '24 px and 28 px': dict(stages=SIZES_24_28),
    'translation by 3': dict(translate=3),
    'cutout 8': dict(cutout=8),
    'Muon lr 0.18': dict(muon_lr=0.18),
    'fewer easy images': FACTORS_94['fewer easy images'],
    'the hardest half by a proxy': dict(proxy=[[32, 64, 64], 0.5, 4]),
}

TARGETS = {
    '94': (BASE_94, FACTORS_94),
    '95': (BASE_95, FACTORS_95),
    '96': (BASE_96, FACTORS_96),
    'R': (R_94, OF_R),  # of runs before seed 2050, only for `effects`
}


def recipe(target, names, half=False):
    """
    The changes of search.py's `base` for a run.

    half: on half of the data, in batches of half the size, with the lr of biases and head doubled
        as they go by the sum over a batch; half the compute, so that steps and epochs are nearly
        the same: they are 3% fewer at 94% and 7% at 96%, mostly as Muon's products do not halve.
    """
    base, factors = TARGETS[target]
    changes = dict(base)
    for name in names:
        changes |= factors[name]
    if half:
        stages = [[*stage, 1000] for stage in changes['stages']]
        # The test does not halve. At 94% it is 0.005 PFLOPs.
        changes |= dict(budget=round(changes['budget'] / 2 + 0.0025, 4), stages=stages)
        changes |= dict(train_images=25000, bias_lr=0.106, head_lr=1.34)
    return changes


def design(names, n_runs, seed):
    """
    For each run, which of up to 16 changes are on: rows of a Hadamard matrix, shuffled.

    There are 16 rows for up to 8 changes, and 32 for more. In all rows together each change is on
    in half of them, and any two changes agree in half of them. The columns are those whose number
    has an odd count of ones in binary. So what two changes do together is not mistaken for what a
    third one does (resolution IV).

    The first len(names) + 1 runs tell the changes apart. But in fewer runs than rows, what two
    changes do together can look like the work of a third.
    """
    n_rows = 16 if len(names) <= 8 else 32
    odd = [column for column in range(n_rows) if column.bit_count() % 2 == 1]
    matrix = linalg.hadamard(n_rows)[:, odd[: len(names)]]
    shuffle = random.Random(seed).shuffle
    runs = []
    while len(runs) < n_runs:
        rows = list(range(n_rows))
        shuffle(rows)
        # Pivoting takes the row next that is furthest from what those before it span.
        with_mean = np.column_stack([np.ones(n_rows), matrix[rows]])
        _, order = linalg.qr(with_mean.T, mode='r', pivoting=True)
        first = [rows[i] for i in order[: len(names) + 1]]
        for row in first + [row for row in rows if row not in first]:
            runs.append([name for name, sign in zip(names, matrix[row], strict=True) if sign < 0])
    return runs[:n_runs]


def queue(target, n_runs, seed, half=False):
    """Lines for search.py."""
    runs = design(list(TARGETS[target][1]), n_runs, seed)
    return [
        json.dumps(recipe(target, names, half) | dict(seed=seed + i))
        for i, names in enumerate(runs)
    ]


def changes_on(target, changes, half=False):
    """The names of the changes that a run has. None if it has others too."""
    names = []
    for name, factor in TARGETS[target][1].items():
        alone = recipe(target, [name], half)
        if all(key in changes and changes[key] == alone[key] for key in factor):
            names.append(name)
    return names if recipe(target, names, half) == changes else None


def effects(target, runs, value, half=False):
    """
    Least squares of the accuracy by what is on.

    Returns a list of (name, effect, half-width of its 95% interval, runs that have it), all in
    percentage points, the first with the name '' and the accuracy with nothing on. The intervals
    are infinite where the runs are too few to tell the changes apart. Runs that diverged are left
    out, as their accuracy is that of chance.
    """
    kept = []
    for run in runs:
        on = changes_on(target, run['changes'], half)
        if on is not None and not run.get('diverged'):
            kept.append((on, 100 * run[value]))
    if not kept:
        return []
    names = [name for name in TARGETS[target][1] if any(name in on for on, _ in kept)]
    rows = np.array([[1.0] + [name in on for name in names] for on, _ in kept])
    accuracies = np.array([accuracy for _, accuracy in kept])
    found, _, rank, _ = np.linalg.lstsq(rows, accuracies, rcond=None)
    freedom = len(kept) - rank
    widths = np.full(len(found), np.inf)
    if freedom > 0 and rank == len(found):
        variance = np.square(accuracies - rows @ found).sum() / freedom
        spread = np.sqrt(variance * np.diag(np.linalg.inv(rows.T @ rows)))
        widths = stats.t.ppf(0.975, freedom) * spread
    counts = rows.sum(axis=0).astype(int).tolist()
    return list(zip(['', *names], found.tolist(), widths.tolist(), counts, strict=True))


def report(target, runs, value, half=False):
    """effects as lines of text, the best first."""
    lines = []
    n_diverged = sum(run.get('diverged', False) for run in runs)
    if n_diverged:
        lines.append(f'{n_diverged} runs diverged and are left out')
    found = effects(target, runs, value, half)
    if not found:
        other = 'without' if half else 'with'
        if runs:
            lines.append(f'no run is of this recipe and ended ({other} --half there may be some)')
        return lines
    _, mean, width, n = found[0]
    if math.isinf(width):
        n_changes = len(TARGETS[target][1])
        lines.append(
            f'no effects: {n} runs do not tell {n_changes} changes apart, '
            f'the first {n_changes + 2} of a queue do'
        )
        return lines
    lines.append(f'{mean:.2f} ± {width:.2f} with no change, estimated from all {n} runs')
    for name, effect, width, n in sorted(found[1:], key=lambda row: -row[1]):
        lines.append(f'{effect:+.2f} ± {width:.2f} by {name} ({n} runs)')
    if len(found) > 1:
        lines.append(f'of these {len(found)} intervals one in twenty misses, by chance')
    return lines


def whole_lines(text):
    """The lines of a log, without a last one that was cut off or is being written."""
    return text[: text.rfind('\n') + 1].splitlines()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    for name in ('queue', 'effects'):
        command = commands.add_parser(name)
        command.add_argument('target', choices=('94', '95', '96') if name == 'queue' else TARGETS)
        if name == 'queue':
            command.add_argument('seed', type=int)
            command.add_argument('runs', type=int)
        else:
            command.add_argument('logs', metavar='LOG', nargs='+', type=argparse.FileType())
            accuracies = ('none', 'mirror', 'selective', 'held_out')
            command.add_argument('--value', choices=accuracies, default='selective')
        command.add_argument('--half', action='store_true')
    args = parser.parse_args()
    if args.command == 'queue':
        print('\n'.join(queue(args.target, args.runs, args.seed, args.half)))
    else:
        try:
            runs = [json.loads(line) for log in args.logs for line in whole_lines(log.read())]
            lines = report(args.target, runs, args.value, args.half)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            parser.error(f'these are not logs of search.py, or lack {args.value}: {error!r}')
        print('\n'.join(lines))


if __name__ == '__main__':
    main()
