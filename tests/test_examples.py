"""examples/, scaled down."""

import json
import re
import runpy
import signal
import sys

import pytest
import torch
from conftest import ROOT, write_split
from test_summarize import summarize

import airbench
import airbench94
import airbench94_muon


def run_example(name, words, monkeypatch):
    monkeypatch.setattr(sys, 'path', sys.path[:])
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, words)])
    monkeypatch.setattr(signal, 'signal', lambda number, handler: None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / 'examples' / f'{name}.py'), run_name='__main__')
    return stop.value.code


@pytest.fixture
def selection(tmp_path, monkeypatch):
    """For data_selection.py, 300 images: the loaders it trains on, and its confidence."""
    write_split(tmp_path / 'train.pt', 300, seed=0)
    write_split(tmp_path / 'test.pt', 50, seed=1)
    monkeypatch.setitem(airbench94.hyp, 'widths', (8, 8, 8))
    confidence = torch.rand(300, generator=torch.Generator().manual_seed(0))
    loaders, real_loader, real_train = [], airbench.CifarLoader, airbench.train94

    def loader(*args, batch_size=500, **options):
        return real_loader(*args, batch_size=batch_size // 20, **options)

    def train(loader, *args, **options):
        loaders.append(loader)
        return real_train(loader, *args, **options)

    def infer(net, loader):
        return torch.cat((confidence[:, None], torch.zeros(300, 9)), 1)

    for name, value in (('CifarLoader', loader), ('train94', train), ('infer', infer)):
        monkeypatch.setattr(airbench, name, value)
    return loaders, confidence


def test_data_selection(tmp_path, monkeypatch, capsys, selection):
    words = ['--data', tmp_path, '--epochs', 1, '--seed', 5, '--log', tmp_path / 'log.jsonl']
    assert run_example('data_selection', words, monkeypatch) == 0
    header, *results = [
        json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()
    ]
    assert header['arguments']['seed'] == '5' and 'least confident' in header['source']
    assert [result['images'] for result in results] == [300, 180, 180]
    assert results[0]['label_smoothing'] == 0 and 'label_smoothing' not in results[1]
    table = capsys.readouterr().out.splitlines()[-3:]
    for line, result in zip(table, results, strict=True):
        assert line.startswith(result['name']) and line.endswith(f'{result["tta_val_acc"]:.4f}')


def test_the_subsets_of_data_selection(tmp_path, monkeypatch, selection):
    words = ['--data', tmp_path, '--epochs', 0.2, '--log', tmp_path / 'log.jsonl']
    assert run_example('data_selection', words, monkeypatch) == 0
    (whole, at_random, least), confidence = selection
    images = whole.images.flatten(1)
    indices = [torch.cdist(loader.images.flatten(1), images).argmin(1)
               for loader in (at_random, least)]  # fmt: skip
    assert torch.equal(indices[1], confidence.argsort()[:180].sort().values)  # in their old order
    assert torch.equal(indices[0], indices[0].sort().values)
    assert (
        len(indices[0].unique()) == 180
        and 90 < len(set(indices[0].tolist()) & set(indices[1].tolist())) < 130
    )
    for loader, of_loader in zip((at_random, least), indices, strict=True):
        assert torch.equal(loader.images, whole.images[of_loader])
        assert torch.equal(loader.labels, whole.labels[of_loader])


def test_the_random_subset_of_data_selection_is_that_of_its_seed(tmp_path, monkeypatch, selection):
    loaders, _ = selection
    words = ['--data', tmp_path, '--epochs', 0.2, '--log', tmp_path / 'log.jsonl', '--seed']
    for seed in (3, 4, 3):
        assert run_example('data_selection', [*words, seed], monkeypatch) == 0
    first, other, again = (loader.images for loader in loaders[1::3])
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_data_selection_trains_on_all_images_no_longer_than_the_recipe(
    tmp_path, monkeypatch, selection
):
    epochs = []

    def train(loader, test_loader, callback, **options):
        epochs.append(options['epochs'])
        callback(None, dict(time_seconds=1.0, tta_val_acc=0.5))

    monkeypatch.setattr(airbench, 'train94', train)
    words = ['--data', tmp_path, '--log', tmp_path / 'log.jsonl']
    assert run_example('data_selection', words, monkeypatch) == 0
    assert epochs == [airbench94.hyp['epochs'], 16, 16]


def test_data_selection_that_diverges(tmp_path, monkeypatch, capsys, selection):
    def train(*args, **options):
        raise FloatingPointError('the training diverged')

    monkeypatch.setattr(airbench, 'train94', train)
    words = ['--data', tmp_path, '--log', tmp_path / 'log.jsonl']
    assert run_example('data_selection', words, monkeypatch) == 1
    assert capsys.readouterr().err == 'data_selection: error: the training diverged\n'


def test_data_selection_for_no_epochs(monkeypatch, capsys):
    assert run_example('data_selection', ['--epochs', 0], monkeypatch) == 2
    assert '--epochs must be more than 0' in capsys.readouterr().err


@pytest.mark.parametrize('text', ['notes\n', '{"type": "header", "script": "airbench94"}\n', '7\n'])
def test_data_selection_adds_to_no_log_of_others(tmp_path, monkeypatch, capsys, text, selection):
    log = tmp_path / 'log.jsonl'
    log.write_text(text)
    words = ['--data', tmp_path, '--log', log]
    assert run_example('data_selection', words, monkeypatch) == 2 and log.read_text() == text
    said = f'{log} is not a log of this program: name another file with --log\n'
    assert capsys.readouterr().err == f'data_selection: error: {said}'


@pytest.mark.parametrize('seed', (-1, 2**64))
def test_data_selection_of_a_seed_that_is_none(monkeypatch, capsys, seed):
    assert run_example('data_selection', ['--seed', seed], monkeypatch) == 2
    assert f'--seed must be from 0 to below 2**62, not {seed}' in capsys.readouterr().err


def test_data_selection_of_less_than_a_batch(tmp_path, monkeypatch, capsys, selection):
    """Said before the first training."""
    loaders, _ = selection
    for name in ('train', 'test'):
        write_split(tmp_path / f'{name}.pt', 80, seed=0)
    words = ['--data', tmp_path, '--log', tmp_path / 'log.jsonl']
    assert run_example('data_selection', words, monkeypatch) == 2
    err = capsys.readouterr().err
    assert err == 'data_selection: error: 60% of the images are 48, less than a batch\n'
    assert loaders == [] and not (tmp_path / 'log.jsonl').exists()


def test_data_selection_with_other_classes_to_test_on(tmp_path, monkeypatch, capsys, selection):
    write_split(tmp_path / 'test.pt', 80, seed=0)
    data = torch.load(tmp_path / 'test.pt')
    torch.save(data | dict(labels=data['labels'] + 1, classes=list('0123456789a')),
               tmp_path / 'test.pt')  # fmt: skip
    words = ['--data', tmp_path, '--log', tmp_path / 'log.jsonl']
    assert run_example('data_selection', words, monkeypatch) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and 'test_loader.labels must be from 0 to 9' in err


def test_data_selection_without_data(tmp_path, monkeypatch, capsys):
    (tmp_path / 'train.pt').write_text('no data')
    monkeypatch.chdir(tmp_path)
    assert run_example('data_selection', ['--data', tmp_path], monkeypatch) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and 'train.pt' in err
    assert [path.name for path in tmp_path.iterdir()] == ['train.pt']


FLAGS = ['--data', 'synthetic', '--epochs', '1', '--widths', '(4, 4, 4)', '--batch_size', '50']
FLAGS += ['--dtype', 'float32']


@pytest.fixture
def small(monkeypatch):
    """A few of the synthetic data."""
    real = airbench94.synthetic_split
    less = {train: {key: value[:100 if train else 40] for key, value in real(train).items()}
            for train in (True, False)}  # fmt: skip
    for module in (airbench94, airbench94_muon):
        monkeypatch.setattr(module, 'synthetic_split', lambda train: less[train])


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
    words = ['--runs', 1, '--folder', tmp_path / 'one', *FLAGS]
    assert run_example('optimizers', words, monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert all(re.fullmatch(r'\w+ +n 1, mean 0\.\d{4}', line) for line in lines)
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

    log = folder / 'optimizer_sgd.rank1.jsonl'
    (folder / 'optimizer_sgd.rank7.jsonl').write_text(log.read_text())
    capsys.readouterr()
    assert run_example('optimizers', words, monkeypatch) == 2
    assert 'optimizers: error: seed 11 stands in ' in capsys.readouterr().err


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


def test_the_share_of_the_compute_that_ablations_names():
    text = (ROOT / 'examples' / 'ablations.py').read_text()
    assert '--epochs 3 --widths "(32, 128, 128)" takes an eleventh of its compute' in text
    whole, part = (
        airbench94.count_pflops(h, steps=round(48.1 * h['epochs']), test_size=10_000)
        for h in (airbench94.hyp, airbench94.hyp | dict(epochs=3, widths=(32, 128, 128)))
    )
    assert round(whole / part) == 11


def test_an_examples_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    words = ['--folder', tmp_path, '--data', tmp_path / 'none.pt', '--lr', 'fast']
    assert run_example('ablations', words, monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('airbench94: error: lr must be a number above 0')
