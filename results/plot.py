"""
Draws two figures from logs, as SVG, without an argument from those in results/:

    python results/plot.py                  # or: python results/plot.py FILE... --out FOLDER

accuracy.svg: accuracy against the PFLOPs of a run, ours and what others have published.
distribution.svg: the final accuracies of airbench94.py, with their mean and its 95%
interval. It needs matplotlib and scipy: pip install matplotlib scipy.
"""

import argparse
import math
import sys
from pathlib import Path

import summarize

HERE = Path(__file__).parent
# Okabe and Ito's colours, which the colour-blind can tell apart, some of them darkened: all stand
# out from a white page and from a dark one, each by a contrast of 3 to 1 or more.
COLORS = {
    'airbench94': '#0072b2',
    'airbench94_compiled': '#009e73',
    'airbench94_muon': '#a37c00',
    'airbench95': '#d55e00',
    'airbench96': '#c26d9a',
}
GREY = '#7a7a7a'
# By the paper, hlb-CIFAR10 and ResNet-18 included, the original project's README later, and Hiverge
# (2025). PFLOPs, accuracy in percent, name, and where it stands relative to the point, in points of
# type.
PUBLISHED = [
    (0.36, 94.01, 'the paper', (6, -14)),
    (1.4, 95.01, 'the paper', (4, -13)),
    (7.5, 96.05, 'the paper', (9, -3)),
    (0.29, 94.01, "the paper's project,\nwith Muon", (-6, -42)),
    (4.9, 96.03, '', (0, 0)),
    (3.1, 96.00, "the paper's project, later", (-78, -17)),
    (0.27, 94.0, 'Hiverge', (-32, -15)),
    (0.59, 94.0, 'hlb-CIFAR10', (8, -12)),
    (32.3, 96.0, 'ResNet-18,\nstandard training', (-30, -32)),
]
# Of the recipe that airbench94_muon.py had before: the other end of the frontier.
BEFORE = HERE / 'airbench94_muon' / 'crops' / 'h200.jsonl'
# Where the name of a script stands. airbench94_compiled.py, the recipe of airbench94.py, is left
# out.
OURS = {
    'airbench94': (6, 9),
    'airbench94_muon': (-14, 22),
    'airbench95': (-46, 10),
    'airbench96': (8, 6),
}


def new_axes(plt, size):
    plt.rcParams.update(
        {
            'svg.hashsalt': 'airbench',
            'font.size': 11,
            'text.color': GREY,
            'axes.edgecolor': GREY,
            'axes.labelcolor': GREY,
            'xtick.color': GREY,
            'ytick.color': GREY,
        }
    )
    figure, axes = plt.subplots(figsize=size, layout='constrained')
    axes.spines[['top', 'right']].set_visible(False)
    return figure, axes


def points_of(logs):
    """PFLOPs a run and mean accuracy, in percent, of each log that is drawn."""
    return [
        (runs[0]['pflops'], 100 * summarize.summarize(runs)['mean'])
        for header, runs in logs
        if header['script'] in OURS
    ]


def plot_accuracy(plt, logs):
    """
    Accuracy against compute: ours filled, with 95% intervals, and hollow what others published.

    logs: a header and its finished runs for each script, and for each other recipe of it.
    """
    figure, axes = new_axes(plt, (8, 4.5))
    points = points_of(logs)
    axes.set(
        xscale='log',
        xlabel='PFLOPs a run, training and evaluation',
        ylabel='accuracy on the test images, %',
        # Wider where there are points far from the published ones.
        xlim=(min([0.14, *(x / 1.3 for x, _ in points)]), max([60, *(2 * x for x, _ in points)])),
        ylim=(
            min([93.4, *(y - 0.6 for _, y in points)]),
            max([96.6, *(y + 0.4 for _, y in points)]),
        ),
    )
    for pflops, accuracy, name, offset in PUBLISHED:
        axes.plot(pflops, accuracy, 'D', color=GREY, markersize=8, fillstyle='none')
        axes.annotate(name, (pflops, accuracy), offset, textcoords='offset points', fontsize=9)
    drawn = {}
    for header, runs in logs:
        script = header['script']
        if script not in OURS:
            continue
        color = COLORS[script]
        summary = summarize.summarize(runs)
        x, y = runs[0]['pflops'], 100 * summary['mean']
        if summary['interval']:
            low, high = (100 * end for end in summary['interval'])
            axes.plot([x, x], [low, high], '-', color=color)
        axes.plot(x, y, 'o', color=color, markersize=8)
        if script in drawn:  # of another recipe, which has its name already
            axes.plot(*zip(drawn[script], (x, y), strict=True), '--', color=color)
            continue
        drawn[script] = x, y
        axes.annotate(
            f'{script}.py',
            (x, y),
            OURS[script],
            textcoords='offset points',
            color=color,
            weight='bold',
        )
    ticks = (0.2, 0.5, 1, 2, 5, 10, 20, 50)
    axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks((94, 95, 96))
    axes.grid(axis='y', color=GREY, alpha=0.3)
    return figure


def plot_distribution(plt, header, runs):
    """One bar for each twentieth of a percent."""
    figure, axes = new_axes(plt, (8, 3))
    summary = summarize.summarize(runs)
    accuracies = [100 * run['tta_val_acc'] for run in runs]
    low, high = math.floor(20 * min(accuracies) - 1), math.ceil(20 * max(accuracies) + 1)
    color = COLORS.get(header['script'], GREY)
    counts, _, _ = axes.hist(
        accuracies, [(edge - 0.5) / 20 for edge in range(low, high + 2)], color=color, rwidth=0.9
    )
    top, label = max(counts), f'mean {100 * summary["mean"]:.2f}%'
    axes.set_ylim(0, 1.6 * top)
    axes.plot(100 * summary['mean'], 1.2 * top, 'D', color=GREY)
    if summary['interval']:
        interval = [100 * end for end in summary['interval']]
        axes.plot(interval, [1.2 * top] * 2, '-|', color=GREY)
        label += f', its 95% interval {interval[0]:.2f} to {interval[1]:.2f}%'
    axes.annotate(
        label, (100 * summary['mean'], 1.2 * top), (0, 8), textcoords='offset points', ha='center'
    )
    axes.set(
        xlabel='test accuracy with test-time augmentation, %, '
        f'{len(runs)} runs of {header["script"]}.py',
        ylabel='runs',
    )
    axes.yaxis.get_major_locator().set_params(integer=True)
    return figure


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'logs', nargs='*', metavar='FILE', help='(default: those of the scripts in results/)'
    )
    parser.add_argument(
        '--out', type=Path, default=HERE, metavar='FOLDER', help='(default: results/)'
    )
    args = parser.parse_args(arguments)
    if args.logs and args.out.resolve() == HERE.resolve():
        parser.error('name a folder with --out: the figures in results/ are of the logs there')
    try:
        import matplotlib

        matplotlib.use('svg')
        import matplotlib.pyplot as plt
    except ImportError:
        print('plot: error: there is no matplotlib: pip install matplotlib', file=sys.stderr)
        return 2
    try:
        scripts = {}
        # Those of the H200, where there are any.
        found = []
        for folder in sorted(HERE.glob('airbench*')):
            path = folder / 'h200.jsonl'
            found.append(path if path.exists() else folder / 'cpu.jsonl')
        for path in args.logs or found:
            header = summarize.read_logs([path])[0]
            scripts.setdefault(header['script'], []).append(path)
        logs = []
        for script in sorted(scripts):
            header, runs = summarize.read_logs(scripts[script])
            if header['synthetic']:
                raise ValueError(
                    f'{scripts[script][0]} is of synthetic data, whose accuracies mean nothing'
                )
            if not all('pflops' in run for run in runs):
                raise ValueError(f'a log of {script} has runs without PFLOPs')
            runs = [run for run in runs if not run['diverged']]
            if runs:
                logs.append((header, runs))
        if logs and not args.logs:
            logs.append(summarize.read_logs([BEFORE]))
        if not logs:
            raise ValueError('no log holds a finished run')
        if not any(header['script'] in OURS for header, _ in logs):
            raise ValueError(f'no log is of a script that is drawn: {", ".join(OURS)}')
        args.out.mkdir(parents=True, exist_ok=True)
        figures = dict(accuracy=plot_accuracy(plt, logs))
        for header, runs in logs:
            if header['script'] == 'airbench94':
                figures['distribution'] = plot_distribution(plt, header, runs)
        for name, figure in figures.items():
            # Without the date, so that the same logs give the same file.
            figure.savefig(args.out / f'{name}.svg', transparent=True, metadata=dict(Date=None))
            print(args.out / f'{name}.svg')
    except (OSError, ValueError) as error:
        print(f'plot: error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
