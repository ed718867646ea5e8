"""
Draws two figures from logs, as SVG, without an argument from those in results/:

    python results/plot.py                  # or: python results/plot.py FILE... --out FOLDER

accuracy.svg: validation accuracy against the PFLOPs spent, a line a script, beside what others have
published. distribution.svg: the final accuracies of airbench94.py, with their mean and its 95%
interval. It needs matplotlib: pip install matplotlib.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import summarize

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
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
    (0.36, 94.01, 'the paper, 94', (-6, 6)),
    (1.4, 95.01, 'the paper, 95', (-6, 6)),
    (7.5, 96.05, 'the paper, 96', (4, 6)),
    (0.29, 94.01, 'its project later,\nwith Muon', (-6, -6)),
    (4.9, 96.03, 'its project later', (-6, -6)),
    (3.1, 96.00, '', (0, 0)),
    (0.27, 94.0, 'Hiverge', (-6, 14)),
    (0.59, 94.0, 'hlb-CIFAR10', (0, 6)),
    (32.3, 96.0, 'ResNet-18,\nstandard training', (0, -6)),
]
TICKS = (60, 70, 80, 85, 90, 92, 94, 95, 96)
IMAGES, TEST_IMAGES, VIEWS = 50_000, 10_000, (1, 2, 6)


def pflops_by_epoch(header, run):
    """
    The PFLOPs that a run had spent on training by the end of each epoch: of its total, what is not
    evaluation.
    """
    hyp = header['hyperparameters']
    steps_an_epoch = IMAGES // hyp['batch_size']
    steps = math.ceil(hyp['epochs'] * steps_an_epoch)
    if 'crops' in hyp:  # a step costs by the size of its images
        import airbench94_muon as script

        of_size = {
            size: script.count_pflops(hyp | dict(crops=((size, 1.0),)), 1, 0)
            for size in {32, *(size for size, _ in hyp['crops'])}
        }
        costs = [of_size[script.image_size(step, steps, hyp)] for step in range(steps)]
        training = run['pflops'] - script.count_pflops(hyp, 0, TEST_IMAGES)
    else:
        costs = [1] * steps
        views = (
            3 * steps * hyp['batch_size']
        )  # a training image costs three forward passes, a test image one a view
        training = run['pflops'] * views / (views + VIEWS[hyp['tta_level']] * TEST_IMAGES)
    done = run.get(
        'steps', [(i + 1) * steps_an_epoch for i in range(len(run['val_acc']))]
    )  # older logs have none
    return [
        training * sum(costs[:steps]) / sum(costs)
        for steps, _ in zip(done, run['val_acc'], strict=False)
    ]


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


def plot_accuracy(plt, logs):
    """logs: a header and its finished runs for each script."""
    figure, axes = new_axes(plt, (8, 5))
    axes.set(
        xscale='log', yscale='log', xlabel='PFLOPs spent', ylabel='accuracy on the test images, %'
    )
    for header, runs in logs:
        color = COLORS.get(header['script'], GREY)
        x = pflops_by_epoch(header, runs[0])
        errors = [
            [100 - 100 * accuracy for accuracy in epoch]
            for epoch in zip(*(run['val_acc'] for run in runs), strict=True)
        ]
        axes.plot(
            x,
            [statistics.fmean(epoch) for epoch in errors],
            color=color,
            linewidth=1.5,
            linestyle='--' if 'compiled' in header['script'] else '-',
            label=f'{header["script"]}.py, {len(runs)} run{"s" if len(runs) > 1 else ""}',
        )
        axes.fill_between(
            x,
            [min(epoch) for epoch in errors],
            [max(epoch) for epoch in errors],
            color=color,
            alpha=0.25,
            linewidth=0,
        )
        axes.plot(
            runs[0]['pflops'],
            100 - 100 * statistics.fmean(run['tta_val_acc'] for run in runs),
            'o',
            color=color,
        )
    for pflops, accuracy, name, offset in PUBLISHED:
        axes.plot(pflops, 100 - accuracy, 'D', color=GREY, markersize=5, fillstyle='none')
        axes.annotate(
            name,
            (pflops, 100 - accuracy),
            offset,
            textcoords='offset points',
            fontsize=9,
            ha=('center', 'left', 'right')[(offset[0] > 0) - (offset[0] < 0)],
            va='bottom' if offset[1] > 0 else 'top',
        )
    axes.plot([], [], 'o', color=GREY, label='final, with test-time augmentation')
    axes.plot([], [], 'D', color=GREY, markersize=5, fillstyle='none', label='published')
    axes.legend(loc='lower right', frameon=False)
    # Logarithmic in the error, as in the compute: each step towards 100% is drawn by the share of
    # errors it removes.
    axes.set_ylim(axes.get_ylim()[1], 3.5)
    axes.set_yticks([100 - tick for tick in TICKS], TICKS)
    axes.minorticks_off()
    ticks = [
        tick
        for tick in (0.03, 0.1, 0.3, 1, 3, 10, 30)
        if axes.get_xlim()[0] < tick < axes.get_xlim()[1]
    ]
    axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
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
    try:
        import matplotlib

        matplotlib.use('svg')
        import matplotlib.pyplot as plt
    except ImportError:
        print('plot: error: there is no matplotlib: pip install matplotlib', file=sys.stderr)
        return 2
    try:
        scripts = {}
        of_scripts = sorted(
            HERE.glob('airbench*.jsonl')
        )  # or rather those of the same on a GPU, which have more runs
        for path in args.logs or [
            max(HERE / f'gpu_{path.name}', path, key=Path.exists) for path in of_scripts
        ]:
            header = summarize.read_logs([path])[0]
            scripts.setdefault(header['script'], []).append(path)
        logs = []
        for script in sorted(scripts):
            header, runs = summarize.read_logs(scripts[script])
            if header['synthetic']:
                raise ValueError(
                    f'{scripts[script][0]} is of synthetic data, whose accuracies mean nothing'
                )
            if not all({'pflops', 'val_acc'} <= set(run) for run in runs):
                raise ValueError(f'{scripts[script][0]} is not a log of the scripts')
            runs = [run for run in runs if not run['diverged']]
            if runs:
                logs.append((header, runs))
        if not logs:
            raise ValueError('no log holds a finished run')
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
