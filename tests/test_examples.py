"""examples/, scaled down."""

import json
import runpy
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, write_split
from test_results import CIFAR10
from test_summarize import summarize

import airbench94
import airbench94_muon


def test_data_selection(tmp_path, monkeypatch, capsys):
    write_split(tmp_path / 'train.pt', 1800, seed=0)
    write_split(tmp_path / 'test.pt', 50, seed=1)
    monkeypatch.setitem(airbench94.hyp, 'widths', (8, 8, 8))
    monkeypatch.setattr(airbench94, 'set_up_process', lambda device: None)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'data_selection.py',
            '--data',
            str(tmp_path),
            '--epochs',
            '1',
            '--seed',
            '5',
            '--log',
            str(tmp_path / 'log.jsonl'),
        ],
    )
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / 'examples' / 'data_selection.py'), run_name='__main__')
    assert stop.value.code == 0
    header, *results = [
        json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()
    ]
    assert header['arguments']['seed'] == '5' and 'least confident' in header['source']
    assert [result['images'] for result in results] == [1800, 1080, 1080]
    table = capsys.readouterr().out.splitlines()[-3:]
    for line, result in zip(table, results, strict=True):
        assert line.startswith(result['name']) and line.endswith(f'{result["tta_val_acc"]:.4f}')


def test_data_selection_without_data(tmp_path):
    (tmp_path / 'train.pt').write_text('no data')
    done = subprocess.run(
        [sys.executable, ROOT / 'examples' / 'data_selection.py', '--data', tmp_path],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and 'train.pt' in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ['train.pt']


def run_example(name, words, monkeypatch):
    monkeypatch.setattr(sys, 'path', sys.path[:])
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, words)])
    monkeypatch.setattr(signal, 'signal', lambda number, handler: None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / 'examples' / f'{name}.py'), run_name='__main__')
    return stop.value.code


FLAGS = ['--data', 'synthetic', '--epochs', '1', '--widths', '(4, 4, 4)', '--batch_size', '500']
FLAGS += ['--dtype', 'float32']


@pytest.fixture
def small(monkeypatch):
    """Synthetic data of a tenth, and no change of how the tests' process allocates."""
    real = airbench94.synthetic_split
    less = {train: {key: value[:1000 if train else 100] for key, value in real(train).items()}
            for train in (True, False)}  # fmt: skip
    for module in (airbench94, airbench94_muon):
        monkeypatch.setattr(module, 'synthetic_split', lambda train: less[train])
        monkeypatch.setattr(module, 'set_up_process', lambda device: None)


def test_ablations(tmp_path, monkeypatch, small):
    words = ['--runs', 2, '--folder', tmp_path, '--save', tmp_path / 'nets', *FLAGS]
    assert run_example('ablations', words, monkeypatch) == 0
    logs = {arm: summarize.read_logs([tmp_path / f'{arm}.jsonl'])
            for arm in ('baseline', 'random_flip', 'no_lookahead')}  # fmt: skip
    header, runs = logs['baseline']
    assert [run['seed'] for run in runs] == [0, 1]
    saved = {arm: [file.name for file in (tmp_path / 'nets' / arm).iterdir()] for arm in logs}
    assert all(len(files) == 2 for files in saved.values())
    for arm, change in (('random_flip', 'altflip'), ('no_lookahead', 'lookahead')):
        other, runs = logs[arm]
        assert [run['seed'] for run in runs] == [0, 1]
        changed = {key for key, value in other['hyperparameters'].items()
                   if header['hyperparameters'][key] != value}  # fmt: skip
        assert changed == {change} and other['hyperparameters'][change] is False


def test_optimizers(tmp_path, monkeypatch, small, capsys):
    real = airbench94_muon.make_optimizer
    monkeypatch.setattr(airbench94_muon, 'make_optimizer', real)  # put back afterwards
    words = ['--runs', 2, '--folder', tmp_path, '--save', tmp_path / 'nets', *FLAGS]
    assert run_example('optimizers', words, monkeypatch) == 0
    assert len(list(tmp_path.glob('nets/*/airbench94_muon-seed*.pt'))) == 6
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ['sgd', 'muon', 'adamw']
    assert all('n 2, mean 0.' in line and '95% interval' in line for line in lines)
    losses = [summarize.read_logs([tmp_path / f'optimizer_{name}.jsonl'])[1][0]['train_loss']
              for name in ('sgd', 'muon', 'adamw')]  # fmt: skip
    assert len({loss for (loss,) in losses}) == 3  # of the second step, after one of each

    # torchrun's second process, whose output goes nowhere, adds a run of its own.
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '3')
    monkeypatch.setattr(sys, 'stdout', sys.stdout)  # put back afterwards
    folder = tmp_path / 'ranks'
    words = ['--runs', 2, '--seed', 10, '--folder', folder, *FLAGS]
    assert run_example('optimizers', words, monkeypatch) == 0
    header, runs = summarize.read_logs([folder / 'optimizer_adamw.rank1.jsonl'])
    assert header['seed'] == 10 and [run['seed'] for run in runs] == [11]


def test_a_changed_optimizer_needs_another_folder(tmp_path, monkeypatch, small, capsys):
    """Its logs would not tell it from the one before, and nothing would be run."""
    kept = tmp_path / 'optimizers.py'
    source = (ROOT / 'examples' / 'optimizers.py').read_text()
    kept.write_text(source.replace('lr=2e-3', 'lr=4e-3'))
    words = ['--runs', 1, '--folder', tmp_path, *FLAGS]
    assert run_example('optimizers', words, monkeypatch) == 2
    assert f'{kept} differs from this program: name another --folder' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['optimizers.py']


@pytest.mark.parametrize('name', ['ablations', 'optimizers'])
def test_an_example_of_no_runs(name, tmp_path, monkeypatch, capsys):
    assert run_example(name, ['--runs', 0, '--folder', tmp_path], monkeypatch) == 2
    assert '--runs must be at least 1, not 0' in capsys.readouterr().err


def test_an_examples_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    words = ['--folder', tmp_path, '--data', tmp_path / 'none.pt', '--lr', 'fast']
    assert run_example('ablations', words, monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('airbench94: error: lr must be a number above 0')


@pytest.mark.parametrize('arm', ['random_flip', 'no_lookahead'])
def test_the_ablations_results_follow_from_the_logs(arm):
    baseline, other = (
        summarize.read_logs([ROOT / 'results' / 'examples' / f'ablation_{name}.jsonl'])
        for name in ('baseline', arm)
    )
    assert baseline[0]['data'] == other[0]['data'] == CIFAR10
    a, b = (summarize.summarize(runs) for _, runs in (baseline, other))
    test = summarize.welch(a, b)
    row = (
        f'| {100 * a["mean"]:.2f} | {100 * b["mean"]:.2f} | {a["n"]}, {b["n"]} '
        f'| {100 * test["difference"]:+.2f} | '
        f'{100 * test["interval"][0]:+.2f} to {100 * test["interval"][1]:+.2f} | {test["p"]:.2g} |'
    )
    assert row in (ROOT / 'results' / 'examples' / 'README.md').read_text()


def test_the_data_selection_follows_from_its_log():
    lines = (ROOT / 'results' / 'examples' / 'data_selection.jsonl').read_text().splitlines()
    header, *runs = [json.loads(line) for line in lines]
    assert header['data'] == CIFAR10 and len(runs) == 3
    for run in runs:
        accuracy = 100 * run['tta_val_acc']
        row = f'| {run["name"]} | {run["images"]:,} | {run["epochs"]:g} | {accuracy:.2f} |'
        assert row in (ROOT / 'results' / 'examples' / 'README.md').read_text()
