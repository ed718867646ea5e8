"""results/summarize.py: its statistics against published tables, its sums, and what it refuses to add up."""

import importlib.util
import json

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location('summarize', ROOT / 'results' / 'summarize.py')
summarize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(summarize)


@pytest.mark.parametrize('df, confidence, t', [  # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2
    (1, 0.95, 12.706), (2, 0.95, 4.303), (7, 0.95, 2.365), (10, 0.95, 2.228), (30, 0.95, 2.042), (100, 0.95, 1.984),
    (1, 0.80, 3.078), (5, 0.99, 4.032), (20, 0.998, 3.552), (60, 0.90, 1.671),
])
def test_t_table(df, confidence, t):
    assert summarize.t_quantile(df, confidence) == pytest.approx(t, abs=6e-4)
    assert summarize.t_two_sided(t, df) == pytest.approx(1 - confidence, rel=2e-3)


def write_log(path, runs, **header):
    header = dict(type='header', script='airbench94', hyperparameters=dict(lr=11.5), dtype='bfloat16', data='x',
                  synthetic=False, **header)
    path.write_text('\n'.join(map(json.dumps, [header, *runs])) + '\n')
    return str(path)


def a_run(seed, accuracy):
    return dict(type='run', seed=seed, diverged=accuracy is None, tta_val_acc=accuracy, seconds=10.0 * (seed + 1),
                pflops=0.36)


def test_one_summary_over_several_logs(tmp_path, capsys):
    logs = [write_log(tmp_path / 'a', [a_run(0, 0.93), a_run(2, 0.95)]),
            write_log(tmp_path / 'b', [a_run(1, 0.94), a_run(3, None)])]
    with open(logs[1], 'a') as file:
        file.write('{"type": "ru')
    assert summarize.main(logs) == 0
    out = capsys.readouterr().out
    # 0.93, 0.94, 0.95: std 0.01, stderr 0.01 / sqrt(3) = 0.00577, t(2) = 4.303, half the interval 0.0248
    for line in ('4 runs in 2 logs', 'n                  3\n', 'acc   0.9400\n', 'std                0.0100\n',
                 '0.0058\n', '0.9152 to 0.9648', 'seconds       20.00\n', '0.36\n', 'diverged           1\n'):
        assert line in out, line


def test_one_run_has_no_spread(tmp_path, capsys):
    assert summarize.main([write_log(tmp_path / 'a', [a_run(0, 0.93)])]) == 0
    out = capsys.readouterr().out
    assert '0.9300' in out and 'std' not in out and 'nan' not in out


def test_what_does_not_go_together_is_refused(tmp_path, capsys):
    first = write_log(tmp_path / 'a', [a_run(0, 0.93)])
    other = write_log(tmp_path / 'b', [a_run(1, 0.93)])
    (tmp_path / 'b').write_text((tmp_path / 'b').read_text().replace('11.5', '10.0'))
    (tmp_path / 'c').write_text('notes\n')
    for paths, word in (([first, other], 'hyperparameters'), ([first, first], 'seed 0'),
                        ([str(tmp_path / 'c')], 'not a log'), ([str(tmp_path / 'none')], 'none')):
        assert summarize.main(paths) == 2
        out, err = capsys.readouterr()
        assert out == '' and len(err.splitlines()) == 1 and word in err
