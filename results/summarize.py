"""
One summary over any number of logs of one recipe, such as those of torchrun's ranks, and the
README's cell for them:

    python results/summarize.py logs/series.rank*.jsonl

Or two such sets compared: the difference of their mean accuracies, its 95% interval, and the p of
Welch's t-test:

    python results/summarize.py logs/mine.jsonl --against results/airbench94/cpu.jsonl

It refuses to mix recipes, precisions or data sets, and to count a seed twice. Two sets may be
trained on different data, as on subsets, but must be tested on the same. It says where the runs are
of several devices, versions of the script or versions of PyTorch. It needs scipy.
"""

import argparse
import json
import math
import statistics
import sys

try:
    from scipy import stats
except ImportError:
    print('summarize: error: there is no scipy: pip install scipy', file=sys.stderr)
    sys.exit(2)

SAME = ('script', 'dtype', 'data')
KEYS = dict(
    header={*SAME, 'hyperparameters', 'device', 'synthetic'},
    run={'seed', 'diverged', 'tta_val_acc', 'seconds'},
)
VERSION = dict(  # keys of a header, and what differs where they do
    device='devices: the mean time is of no single one',
    source='versions of the script',
    torch='versions of PyTorch',
)
# By the paper: accuracy in percent, PFLOPs a run; and seconds on an A100, for the table of
# processors
PUBLISHED = {
    'airbench94': ('94.01', '0.36', '3.83 s'),
    'airbench94_compiled': ('94.01', '0.36', '3.29 s'),
    'airbench94_muon': ('', '', ''),
    'airbench95': ('95.01', '1.4', '10.4 s'),
    'airbench96': ('96.05', '7.5', '46.3 s'),
}


def read_logs(paths):
    """
    The last header and the runs of these logs, each with what VERSION names. ValueError where they
    do not go together.
    """
    header, recipe, runs, seeds = None, {}, [], {}
    for path in paths:
        try:
            with open(path) as file:
                records = []
                for line in file:
                    try:
                        records.append(json.loads(line))
                    except ValueError:
                        # Without its end it was cut off with its run, or is being written.
                        if line.endswith('\n'):
                            raise
            known = records[0]['type'] == 'header' and all(
                KEYS[record['type']] <= set(record) for record in records
            )
        except (ValueError, TypeError, LookupError):
            known = False
        if not known:
            raise ValueError(f'{path} is not a log of the scripts')
        for record in records:
            if record['type'] == 'header':
                # Logs can be older than a hyperparameter. It is compared where they have it.
                mine = {key: record[key] for key in SAME} | record['hyperparameters']
                for key, value in mine.items():
                    if recipe.setdefault(key, value) != value:
                        # The data are hashes, which say nothing to a reader.
                        values = '' if key == 'data' else f': {value}, not {recipe[key]}'
                        raise ValueError(f'{path} differs from {paths[0]} in {key}{values}')
                header = record
            else:
                if record['seed'] in seeds:
                    raise ValueError(
                        f'seed {record["seed"]} stands in {seeds[record["seed"]]} '
                        f'and again in {path}'
                    )
                seeds[record['seed']] = path
                runs.append(record | {key: header.get(key) for key in VERSION})
    return header, runs


def summarize(runs):
    """
    A dict of what the summary says; spread, interval and the like are None where n does not allow
    them.
    """
    finished = [run for run in runs if not run['diverged']]
    accuracies = [run['tta_val_acc'] for run in finished]
    n = len(accuracies)
    summary = dict(
        n=n,
        accuracies=accuracies,
        diverged=len(runs) - n,
        mean=None,
        std=None,
        stderr=None,
        interval=None,
        seconds=None,
        fastest=None,
        pflops=None,
    )
    if n:
        summary |= dict(
            mean=statistics.fmean(accuracies),
            seconds=statistics.fmean(run['seconds'] for run in finished),
            fastest=min(finished, key=lambda run: run['seconds']),
            # None where a log lacks it.
            pflops=finished[0].get('pflops') if all('pflops' in run for run in finished) else None,
        )
    if n > 1:
        std = statistics.stdev(accuracies)
        stderr = std / math.sqrt(n)
        if std > 0:
            low, high = stats.t.interval(0.95, n - 1, loc=summary['mean'], scale=stderr)
        else:
            low = high = summary['mean']
        summary |= dict(std=std, stderr=stderr, interval=(float(low), float(high)))
    return summary


def welch(a, b):
    """
    Welch's t-test of two summaries.

    Returns a dict of the difference of the means, its 95% interval, t, the degrees of freedom and
    the two-sided p. Raises ValueError where they have no spread to go by.
    """
    if a['n'] < 2 or b['n'] < 2:
        raise ValueError('to compare two sets, each must have two runs or more')
    if a['std'] == b['std'] == 0:
        raise ValueError(
            'all runs of a set have the same accuracy: there is no spread to compare by'
        )
    test = stats.ttest_ind(a['accuracies'], b['accuracies'], equal_var=False)
    low, high = test.confidence_interval(0.95)
    return dict(
        difference=a['mean'] - b['mean'],
        interval=(float(low), float(high)),
        t=float(test.statistic),
        df=float(test.df),
        p=float(test.pvalue),
    )


def readme_cell(summary):
    """
    The cell of the README's table of results: the mean, its standard error and the number of runs.
    """
    spread = '' if summary['stderr'] is None else f' ± {100 * summary["stderr"]:.2f}'
    return f'{100 * summary["mean"]:.2f}{spread} ({summary["n"]})'


def readme_time(run):
    """
    A run's cell in the README's table of processors: seconds, with two decimals below 10 s, one
    below 100 s and none above, and TFLOP/s.
    """
    seconds, rate = run['seconds'], 1000 * run['pflops'] / run['seconds']
    return f'{seconds:.{max(0, 2 - int(math.log10(seconds)))}f} s, {rate:.{2 if rate < 10 else 0}f}'


def print_summary(paths, header, runs, s):
    print(
        f'{header["script"]}: {len(runs)} runs in {len(paths)} logs, {header["dtype"]}'
        + (', SYNTHETIC data' if header['synthetic'] else '')
    )
    print(f'n                  {s["n"]}')
    if s['n']:
        print(f'mean tta_val_acc   {s["mean"]:.4f}')
    if s['n'] > 1:
        print(f'std                {s["std"]:.5f}')
        print(f'stderr             {s["stderr"]:.5f}')
        low, high = s['interval']
        print(f"95% interval       {low:.5f} to {high:.5f}  (of the mean, Student's t)")
    if s['n']:
        fastest = s['fastest']['seconds']
        print(f'seconds            {s["seconds"]:.2f} in the mean, {fastest:.2f} the fastest')
    if s['pflops']:
        print(f'PFLOPs a run       {s["pflops"]:.3g}')
        print(f'fastest run        {readme_time(s["fastest"])} TFLOP/s, {s["fastest"]["device"]}')
    print(f'diverged           {s["diverged"]}')
    for key, what in VERSION.items():
        found = len({run[key] for run in runs})
        if found > 1:
            print(f'note               the runs are of {found} {what}')


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('logs', nargs='+', metavar='FILE')
    parser.add_argument('--against', nargs='+', metavar='OTHER', help='the logs to compare with')
    args = parser.parse_args(arguments)
    try:
        sets = [(paths, *read_logs(paths)) for paths in (args.logs, args.against) if paths]
        summaries = [summarize(runs) for _, _, runs in sets]
        first, last = (sets[i][1]['data'] for i in (0, -1))
        if first['test'] != last['test']:
            raise ValueError('the two sets were tested on different data: no comparison')
        test = welch(*summaries) if args.against else None
    except (OSError, ValueError) as error:
        print(f'summarize: error: {error}', file=sys.stderr)
        return 2
    for one, summary in zip(sets, summaries, strict=True):
        print_summary(*one, summary)
        print()
    if test:
        if first['train'] != last['train']:
            print('note               the two sets were trained on different data')
        print(f'difference         {test["difference"]:+.5f}  (the first less the second)')
        print(f'95% interval       {test["interval"][0]:+.5f} to {test["interval"][1]:+.5f}')
        print(
            f"Welch's t-test     t {test['t']:.3f}, {test['df']:.2f} degrees of freedom, "
            f'p {test["p"]:.2g}'
        )
    elif summaries[0]['pflops'] and not sets[0][1]['synthetic']:
        print(f'README             {readme_cell(summaries[0])}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
