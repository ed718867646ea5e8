"""The README's table, recomputed from the logs in results/."""

import importlib
import json
import re

import pytest
from conftest import ROOT
from test_summarize import summarize

# SHA-256 of CIFAR-10, images as uint8 (N, 32, 32, 3) and labels as int64, in the data set's order.
CIFAR10 = dict(
    train=dict(images='47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a',
               labels='f5cfe00b0f00968c0cc5ff3b1d2de51b10e33efa277c2986f4e0fa63e58c9f4f'),
    test=dict(images='f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04',
              labels='cbb7365de8ed11f05cc4c3a1e7f78144127c5e851efd83762fb18202461230bb'))
LOGS = sorted((ROOT / 'results').glob('airbench*.jsonl'))


def table():
    """The README's rows, as dicts by script."""
    rows = re.findall(r'^\| `(airbench\w+)\.py` \|(.*)\|$', (ROOT / 'README.md').read_text(), re.MULTILINE)
    columns = ('accuracy', 'stderr', 'n', 'pflops', 'seconds')
    return {script: dict(zip(columns, [cell.strip() for cell in cells.split('|')], strict=False))
            for script, cells in rows}


def check_row(row, header, runs, hyp):
    """Raises AssertionError where this row of the table is not what the log says."""
    summary = summarize.summarize(runs)
    assert row['accuracy'] == f'{100 * summary["mean"]:.2f}'
    assert row['stderr'] == ('' if summary['n'] < 2 else f'{100 * summary["stderr"]:.2f}')
    assert row['n'] == str(summary['n']) and summary['diverged'] == 0
    assert row['pflops'] == f'{summary["pflops"]:.2f}'
    assert row['seconds'] in {f'{run["seconds"]:.0f}' for run in runs}
    assert header['data'] == CIFAR10 and not header['synthetic']
    assert header['hyperparameters'] == json.loads(json.dumps(hyp))


def test_every_log_has_its_row_and_every_row_its_log():
    assert LOGS and sorted(table()) == [log.stem for log in LOGS]


@pytest.mark.parametrize('log', LOGS, ids=lambda log: log.stem)
def test_the_row_follows_from_the_log(log):
    header, runs = summarize.read_logs([log])
    assert header['script'] == log.stem
    check_row(table()[log.stem], header, runs, importlib.import_module(log.stem).hyp)


@pytest.mark.parametrize('change', [dict(accuracy='95.99'), dict(n='1000'), dict(pflops='0.10'), dict(seconds='1')])
def test_a_wrong_row_is_found(change):
    header, runs = summarize.read_logs([LOGS[0]])
    with pytest.raises(AssertionError):
        check_row({**table()[LOGS[0].stem], **change}, header, runs, importlib.import_module(LOGS[0].stem).hyp)


def test_each_log_is_explained():
    explained = (ROOT / 'results' / 'README.md').read_text()
    assert all(f'`{log.name}`' in explained for log in LOGS)


def test_ci_calls_the_readmes_test_command():
    command, = re.findall(r'^    (pip install .*pytest)$', (ROOT / 'README.md').read_text(), re.MULTILINE)
    assert command in (ROOT / '.ci' / 'run').read_text()
