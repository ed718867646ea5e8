"""
results/summarize.py: its statistics against published tables, its sums, and what it refuses to add
up.
"""

import importlib.util
import json
import statistics

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location('summarize', ROOT / 'results' / 'summarize.py')
summarize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(summarize)


def test_the_interval_is_students_t():
    """By the table of the NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2."""
    for n, t in ((2, 12.706), (3, 4.303), (8, 2.365), (31, 2.042)):
        runs = [a_run(seed, 0.9 + 0.001 * (-1) ** seed) for seed in range(n)]
        summary = summarize.summarize(runs)
        low, high = summary['interval']
        assert (high - low) / 2 == pytest.approx(t * summary['stderr'], rel=1e-3)


def write_log(path, runs, **header):
    header = (
        dict(
            type='header',
            script='airbench94',
            hyperparameters=dict(lr=11.5),
            dtype='bfloat16',
            data=dict(train='x', test='y'),
            device='a CPU',
            synthetic=False,
        )
        | header
    )
    path.write_text('\n'.join(map(json.dumps, [header, *runs])) + '\n')
    return str(path)


def a_run(seed, accuracy):
    return dict(
        type='run',
        seed=seed,
        diverged=accuracy is None,
        tta_val_acc=accuracy,
        seconds=10.0 * (seed + 1),
        pflops=0.36,
    )


def test_a_hyperparameter_is_compared_among_the_logs_that_have_it(tmp_path):
    """Also where a log without it stands between them."""
    young = dict(lr=11.5, altflip=True)
    logs = [
        write_log(tmp_path / 'a', [a_run(0, 0.93)], hyperparameters=young),
        write_log(tmp_path / 'b', [a_run(1, 0.93)]),
        write_log(tmp_path / 'c', [a_run(2, 0.93)], hyperparameters=young),
    ]
    assert len(summarize.read_logs(logs)[1]) == 3
    write_log(tmp_path / 'c', [a_run(2, 0.93)], hyperparameters=young | dict(altflip=False))
    with pytest.raises(ValueError, match='differs from .*a in altflip: False, not True'):
        summarize.read_logs(logs)


def test_one_summary_over_several_logs(tmp_path, capsys):
    logs = [
        write_log(tmp_path / 'a', [a_run(0, 0.93), a_run(2, 0.95)]),
        write_log(tmp_path / 'b', [a_run(1, 0.94), a_run(3, None)]),
    ]
    with open(logs[1], 'a') as file:
        file.write('{"type": "ru')
    assert summarize.main(logs) == 0
    out = capsys.readouterr().out
    # 0.93, 0.94, 0.95: std 0.01, stderr 0.01 / sqrt(3) = 0.00577, t(2) = 4.303, half the interval
    # 0.0248
    for line in (
        '4 runs in 2 logs',
        'n                  3\n',
        'acc   0.9400\n',
        'std                0.01000\n',
        '0.00577\n',
        '0.91516 to 0.96484',
        '20.00 in the mean, 10.00 the fastest\n',
        '0.36\n',
        'fastest run        10.0 s, 36 TFLOP/s, a CPU\n',
        'diverged           1\n',
        'README             94.00 ± 0.58 (3)\n',
    ):
        assert line in out, line


def test_runs_of_two_machines_are_said_to_be(tmp_path, capsys):
    first = write_log(tmp_path / 'a', [a_run(0, 0.93)], source='x', torch='2.11')
    second = write_log(tmp_path / 'b', [a_run(1, 0.93)], source='x', torch='2.11')
    assert summarize.main([first, second]) == 0
    assert 'note' not in capsys.readouterr().out
    changes = dict(device='a GPU', source='y', torch='2.14')
    third = write_log(tmp_path / 'c', [a_run(2, 0.93)], **changes)
    assert summarize.main([first, second, third]) == 0
    out = capsys.readouterr().out
    for what in ('devices: ', 'versions of the script\n', 'versions of PyTorch\n'):
        assert f'note               the runs are of 2 {what}' in out, what


def test_logs_with_and_without_pflops(tmp_path, capsys):
    with_pflops = write_log(tmp_path / 'a', [a_run(1, 0.93)])
    run = a_run(0, 0.93)  # the faster one
    del run['pflops']
    without = write_log(tmp_path / 'b', [run])
    assert summarize.main([with_pflops, without]) == 0
    out = capsys.readouterr().out
    assert '15.00 in the mean, 10.00 the fastest' in out and 'PFLOPs' not in out


def test_synthetic_data_are_said_to_be(tmp_path, capsys):
    log = write_log(tmp_path / 'a', [a_run(0, 0.93), a_run(1, 0.94)], synthetic=True)
    assert summarize.main([log]) == 0
    out = capsys.readouterr().out
    assert 'SYNTHETIC data' in out and 'README' not in out


def test_runs_that_all_diverged_have_no_mean(tmp_path, capsys):
    assert summarize.main([write_log(tmp_path / 'a', [a_run(0, None)])]) == 0
    out = capsys.readouterr().out
    assert 'diverged           1' in out and 'mean' not in out and 'README' not in out


def test_one_run_has_no_spread(tmp_path, capsys):
    assert summarize.main([write_log(tmp_path / 'a', [a_run(0, 0.93)])]) == 0
    out = capsys.readouterr().out
    assert '0.9300' in out and 'std' not in out and 'nan' not in out
    assert 'README             93.00 (1)\n' in out


def sample(values):
    mean, std = statistics.fmean(values), statistics.stdev(values)
    return dict(n=len(values), mean=mean, std=std, accuracies=values)


def sample_of(n, mean, std):
    """Any n values with this mean and standard deviation."""
    values = list(range(n))
    scale = std / statistics.stdev(values)
    return sample([mean + scale * (value - statistics.fmean(values)) for value in values])


# NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.5.3, miles per gallon of American and of
# Japanese cars, the variances not taken as equal: T = -12.94627 with 136.8750 degrees of freedom.
NIST = sample_of(249, 20.14458, 6.41470), sample_of(79, 30.48101, 6.10771)
# Wikipedia, "Welch's t-test", the first example: t = -2.46 with 25.0 degrees of freedom, P = 0.021.
EQUAL = (
    sample(
        [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4]
    ),
    sample(
        [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4]
    ),
)


def test_welchs_t_test_against_published_examples():
    test = summarize.welch(*NIST)
    assert test['t'] == pytest.approx(-12.94627, abs=5e-6) and test['df'] == pytest.approx(
        136.8750, abs=5e-5
    )
    test = summarize.welch(*EQUAL)
    assert test['t'] == pytest.approx(-2.46, abs=5e-3) and test['df'] == pytest.approx(
        25.0, abs=0.05
    )
    assert test['p'] == pytest.approx(0.021, abs=5e-4)
    # The interval is the difference and t(25) = 2.060 (the table of 1.3.6.7.2) standard errors on
    # each side of it.
    low, high = test['interval']
    assert (low + high) / 2 == pytest.approx(test['difference'])
    assert (high - low) / 2 == pytest.approx(2.060 * test['difference'] / test['t'], rel=1e-3)


def test_against(tmp_path, capsys):
    mine = write_log(tmp_path / 'a', [a_run(0, 0.93), a_run(1, 0.95), a_run(2, None)])
    other = write_log(tmp_path / 'b', [a_run(0, 0.90), a_run(1, 0.92)])
    (tmp_path / 'b').write_text((tmp_path / 'b').read_text().replace('11.5', '10.0'))
    assert summarize.main([mine, '--against', other]) == 0
    out = capsys.readouterr().out
    # Equal spreads and n = 2: stderr 0.014142, t 2.121 with 2 degrees of freedom, t(2) = 4.3027, p
    # 0.168
    for line in (
        'mean tta_val_acc   0.9400\n',
        'mean tta_val_acc   0.9100\n',
        'difference         +0.03000',
        '-0.03085 to +0.09085\n',
        't 2.121, 2.00 degrees of freedom, p 0.17\n',
    ):
        assert line in out, line
    assert 'note' not in out
    subset = write_log(
        tmp_path / 'c', [a_run(0, 0.90), a_run(1, 0.92)], data=dict(train='', test='y')
    )
    assert summarize.main([mine, '--against', subset]) == 0
    assert (
        'note               the two sets were trained on different data\n'
        in capsys.readouterr().out
    )
    assert summarize.main([mine, subset]) == 2
    assert capsys.readouterr().err == f'summarize: error: {subset} differs from {mine} in data\n'


@pytest.mark.parametrize(
    'runs, header, word',
    [
        ([a_run(0, 0.9)], {}, 'two runs'),
        ([a_run(0, 0.9), a_run(1, 0.9)], {}, 'spread'),
        ([a_run(0, 0.9), a_run(1, 0.8)], dict(data=dict(train='x', test='z')), 'different data'),
    ],
)
def test_what_cannot_be_compared(runs, header, word, tmp_path, capsys):
    mine = write_log(tmp_path / 'a', [a_run(0, 0.93), a_run(1, 0.93)])
    assert summarize.main([mine, '--against', write_log(tmp_path / 'b', runs, **header)]) == 2
    out, err = capsys.readouterr()
    assert out == '' and len(err.splitlines()) == 1 and word in err


def test_what_does_not_go_together_is_refused(tmp_path, capsys):
    first = write_log(tmp_path / 'a', [a_run(0, 0.93)])
    other = write_log(tmp_path / 'b', [a_run(1, 0.93)])
    (tmp_path / 'b').write_text((tmp_path / 'b').read_text().replace('11.5', '10.0'))
    (tmp_path / 'c').write_text('notes\n')
    write_log(tmp_path / 'd', [dict(type='run', seed=0, name='an example\'s')])
    for paths, word in (
        ([first, other], 'lr'),
        ([first, first], 'seed 0'),
        ([str(tmp_path / 'd')], 'not a log'),
        ([str(tmp_path / 'c')], 'not a log'),
        ([str(tmp_path / 'none')], 'No such file'),
    ):
        assert summarize.main(paths) == 2
        out, err = capsys.readouterr()
        assert out == '' and len(err.splitlines()) == 1 and word in err
