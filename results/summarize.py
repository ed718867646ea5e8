"""
One summary over any number of logs of one recipe, such as those of torchrun's ranks:

    python results/summarize.py logs/series.rank*.jsonl

It refuses to mix recipes, precisions or data sets, and to count a seed twice. It needs the standard library alone.
"""

import json
import math
import statistics
import sys

SAME = ('script', 'hyperparameters', 'dtype', 'data')


def incomplete_beta(a, b, x):
    """The regularised incomplete beta function, by its continued fraction (DLMF 8.17.22, Lentz's method)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    if x <= 0:
        return 0.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 1000):
        for numerator in (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
                          -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))):
            c, d = 1 + numerator / c, 1 / (1 + numerator * d)
            fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * fraction


def t_two_sided(t, df):
    """The probability that Student's t with df degrees of freedom lies beyond -|t| or |t|."""
    return incomplete_beta(df / 2, 0.5, df / (df + t * t))


def t_quantile(df, confidence=0.95):
    """The |t| that Student's t with df degrees of freedom stays within with this probability."""
    low, high = 0.0, 1.0
    while t_two_sided(high, df) > 1 - confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, df) > 1 - confidence else (low, middle)
    return high


def read_logs(paths):
    """The last header and all the runs of these logs. Raises ValueError where they do not go together."""
    header, runs, seeds = None, [], {}
    for path in paths:
        try:
            with open(path) as file:
                # A line without its end was torn by a run that was cut off, or is being written.
                records = [json.loads(line) for line in file if line.endswith('\n')]
            known = records[0]['type'] == 'header'
        except (ValueError, TypeError, LookupError):
            known = False
        if not known:
            raise ValueError(f'{path} is not a log of these scripts')
        for record in records:
            if record['type'] == 'header':
                for key in SAME:
                    if header and header[key] != record[key]:
                        raise ValueError(f'{path} holds runs of another {key} than {paths[0]}: '
                                         f'{record[key]}, not {header[key]}')
                header = record
            else:
                if record['seed'] in seeds:
                    raise ValueError(f'seed {record["seed"]} stands in {seeds[record["seed"]]} and again in {path}')
                seeds[record['seed']] = path
                runs.append(record)
    return header, runs


def summarize(runs):
    """A dict of what the summary says; spread, interval and the like are None where n does not allow them."""
    finished = [run for run in runs if not run['diverged']]
    accuracies = [run['tta_val_acc'] for run in finished]
    n = len(accuracies)
    summary = dict(n=n, diverged=len(runs) - n, mean=None, std=None, stderr=None, interval=None, seconds=None,
                   pflops=None)
    if n:
        summary |= dict(mean=statistics.fmean(accuracies), pflops=finished[0]['pflops'],
                        seconds=statistics.fmean(run['seconds'] for run in finished))
    if n > 1:
        std = statistics.stdev(accuracies)
        half = t_quantile(n - 1) * std / math.sqrt(n)
        summary |= dict(std=std, stderr=std / math.sqrt(n), interval=(summary['mean'] - half, summary['mean'] + half))
    return summary


def main(paths):
    if not paths or paths[0] in ('-h', '--help'):
        print(__doc__.strip())
        return 0 if paths else 2
    try:
        header, runs = read_logs(paths)
    except (OSError, ValueError) as error:
        print(f'summarize: error: {error}', file=sys.stderr)
        return 2
    s = summarize(runs)
    print(f'{header["script"]}: {len(runs)} runs in {len(paths)} logs, {header["dtype"]}'
          + (', SYNTHETIC data' if header['synthetic'] else ''))
    print(f'n                  {s["n"]}')
    if s['n']:
        print(f'mean tta_val_acc   {s["mean"]:.4f}')
    if s['n'] > 1:
        print(f'std                {s["std"]:.4f}')
        print(f'stderr             {s["stderr"]:.4f}')
        print(f'95% interval       {s["interval"][0]:.4f} to {s["interval"][1]:.4f}  (of the mean, Student\'s t)')
    if s['n']:
        print(f'mean seconds       {s["seconds"]:.2f}')
        print(f'PFLOPs a run       {s["pflops"]:.3g}')
    print(f'diverged           {s["diverged"]}')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
