"""What results/search_95_muon/airbench95_muon.diff makes of airbench94_muon.py."""

import copy
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import CIFAR10, ROOT

import airbench94_muon

FOLDER = ROOT / 'results' / 'search_95_muon'


@pytest.fixture(scope='module')
def script(tmp_path_factory):
    """The script, as a module, made by the command on the page."""
    if shutil.which('patch') is None:
        pytest.skip('the program patch is not installed')
    page = (FOLDER / 'README.md').read_text()
    (command,) = re.findall(r'^    (patch .*)$', page, re.MULTILINE)
    file = tmp_path_factory.mktemp('script') / 'airbench95_muon.py'
    words = [
        str(file) if word == '/tmp/airbench95_muon.py' else word for word in shlex.split(command)
    ]
    assert str(file) in words
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    # It is of the present airbench94_muon.py, so that no part of it had to be moved.
    assert done.returncode == 0 and 'offset' not in done.stdout and 'fuzz' not in done.stdout
    spec = importlib.util.spec_from_file_location('airbench95_muon', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert max(map(len, file.read_text().splitlines())) <= 100
    return module


def loader_of(module, n, **options):
    """A loader of n images whose red is their number in the top left, black in the top right."""
    loader = module.CifarLoader('synthetic', device='cpu', **options)
    loader.images = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    loader.images[:, 0, 0, 0] = torch.arange(1, n + 1) / 1000
    loader.images[:, 0, 0, -1] = 0
    loader.labels = loader.labels[:n]
    loader.mean, loader.std = torch.zeros(3), torch.ones(3)
    return loader


def numbers_of(inputs):
    return (inputs[:, 0, 0, [0, -1]].amax(1) * 1000).round().long() - 1


def small(**options):
    return (
        dict(
            widths=(8, 16, 16),
            aug=dict(flip=True, translate=2),
            dtype=torch.float32,
            compile=False,
            verbose=False,
            seed=1,
        )
        | options
    )


def test_without_its_changes_it_trains_as_airbench94_muon_does(script):
    nets = []
    for module in (airbench94_muon, script):
        loader = loader_of(module, 60, batch_size=20)
        options = {} if module is airbench94_muon else dict(easy_share=0.0)
        nets.append(module.train(loader, epochs=5, **small(), **options).state_dict())
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])


def test_its_recipe_is_that_of_the_search(script, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'results' / 'search_94_muon')
    candidates = importlib.import_module('candidates')
    search = importlib.import_module('search')
    changes = dict(budget=0.70, translate=4, cutout=8, prune=[0.35, 0.4])
    h = search.settings(candidates.BASE_95 | changes)
    net = script.Net(script.hyp)
    assert [block.conv2.out_channels for block in net.blocks] == h.widths
    assert [block.conv1.out_channels for block in net.blocks] == h.mids
    assert script.hyp['aug'] == dict(flip=True, translate=h.translate, cutout=h.cutout)
    assert [script.hyp['easy_start'], script.hyp['easy_share']] == h.prune
    steps = round(script.hyp['epochs'] * 25)
    assert script.count_pflops(script.hyp, steps, 10_000) == pytest.approx(h.budget, rel=1e-3)
    same = 'muon_lr muon_momentum label_smoothing bn_momentum whiten_bias_epochs'.split()
    assert all(script.hyp[key] == getattr(h, key) for key in same)


def test_an_image_is_mirrored_every_other_time_that_it_is_seen(script):
    n = 40
    loader = loader_of(script, n, batch_size=10, aug=dict(flip=True))
    mirrored = {number: [] for number in range(n)}
    for epoch in range(6):
        loader.skipped = torch.arange(n) < (20 if epoch % 2 == 1 else 0)
        for inputs, _ in loader:
            numbers = numbers_of(inputs)
            assert torch.equal(numbers, loader.indices)
            for number, value in zip(numbers.tolist(), inputs[:, 0, 0, 0], strict=True):
                mirrored[number].append(value.item() == 0)
    assert {len(times) for number, times in mirrored.items() if number < 20} == {3}
    assert {len(times) for number, times in mirrored.items() if number >= 20} == {6}
    assert {times[0] for times in mirrored.values()} == {False, True}
    for times in mirrored.values():
        assert times == [times[0] ^ (i % 2 == 1) for i in range(len(times))]


def test_it_leaves_out_the_images_that_had_the_least_loss(script, monkeypatch):
    n, share = 100, 0.4
    loader = loader_of(script, n, batch_size=10)
    last, seen, left_out = torch.full((n,), torch.inf), [], []
    train_step, easy_images = script.train_step, script.easy_images

    def watched_step(net, optimizers, inputs, labels, label_smoothing):
        loss, logits = train_step(net, optimizers, inputs, labels, label_smoothing)
        numbers = numbers_of(inputs)
        losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction='none')
        assert losses.sum() == pytest.approx(loss.item())
        last[numbers] = losses
        seen.append(numbers)
        return loss, logits

    def watched(losses, skipped, share):
        assert torch.equal(losses, last)
        easy = easy_images(losses, skipped, share)
        left_out.append((len(seen), easy))
        return easy

    monkeypatch.setattr(script, 'train_step', watched_step)
    monkeypatch.setattr(script, 'easy_images', watched)
    rows = []
    options = small(aug={}, sizes=(), epochs=6, easy_share=share, easy_start=0.5)
    script.train(loader, loader, callback=lambda net, row: rows.append(row), **options)
    steps = [row['steps'] for row in rows[:-1]]
    assert steps[:3] == [10, 20, 30] and steps[-1] == len(seen) == 60  # each step has a batch
    assert [step for step, _ in left_out] == steps[2:-1]
    before = torch.zeros(n, dtype=torch.bool)
    for (start, easy), end in zip(left_out, steps[3:], strict=True):
        assert not (easy & before).any()
        trained = torch.cat(seen[start:end])
        assert not easy[trained].any() and len(trained.unique()) == len(trained)
        if end < 60:
            assert len(trained) == (~easy).sum() // 10 * 10
        before = easy
    assert left_out[0][1].sum() == share * n


def test_its_run_follows_from_its_log(script):
    (header,), (run,) = script.read_log(FOLDER / 'script.jsonl')
    page = (FOLDER / 'README.md').read_text()
    (row,) = re.findall(r'^\| (.*) \| \[by the script\]\(script.jsonl\) \|$', page, re.MULTILINE)
    assert header['script'] == 'airbench95_muon' and header['data'] == CIFAR10
    assert header['hyperparameters'] == json.loads(json.dumps(script.hyp))
    accuracy = f'{100 * run["tta_val_acc"]:.2f}'
    cells = [f'{run["pflops"]:.2f}', accuracy, '', '1', str(run['seed']), 'AMD EPYC, AVX2']
    assert [cell.strip() for cell in row.split('|')] == cells
    assert header['device'] == 'AMD EPYC (AVX2)'
    assert run['pflops'] == script.count_pflops(script.hyp, run['steps'][-1], 10_000)


def test_the_easy_images_are_those_of_the_least_loss(script):
    losses = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    nothing = torch.zeros(5, dtype=torch.bool)
    first = script.easy_images(losses, nothing, 0.5)
    assert first.tolist() == [False, True, False, True, False]
    assert not script.easy_images(losses, first, 0.5).any()
    assert not script.easy_images(losses, nothing, 0.0).any()
    never_seen = torch.full((5,), torch.inf)
    assert not script.easy_images(never_seen, nothing, 0.5).any()


def test_it_blanks_a_square_of_each_image(script):
    loader = loader_of(script, 40, batch_size=40, aug=dict(cutout=8))
    loader.images = loader.images.clamp(min=0.1)
    ((inputs, _),) = loader
    blank = (inputs == 0).all(1)
    assert (blank.sum((1, 2)) == 64).all()
    assert (blank.any(1).sum(1) == 8).all() and (blank.any(2).sum(1) == 8).all()
    assert len(blank.unique(dim=0)) > 20


def test_it_trains_from_the_command_line(script, tmp_path):
    command = [sys.executable, script.__file__, '--data', 'synthetic', '--epochs', '3']
    command += ['--widths', '(4, 8, 8)', '--batch_size', '500', '--log', str(tmp_path / 'log')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and 'SYNTHETIC data: 1 runs, 0 diverged' in done.stdout
    _, (run,) = script.read_log(tmp_path / 'log')
    h = script.hyp | dict(widths=(4, 8, 8), batch_size=500)
    assert run['steps'][-1] == 30 and run['pflops'] == script.count_pflops(h, 30, 1000)


@pytest.mark.parametrize('options', [dict(easy_share=1), dict(easy_share=-1), dict(easy_start=2)])
def test_values_that_make_no_sense_are_refused(script, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        script.merge(options)


def test_loaders_that_do_not_fit_are_refused(script):
    """To test on, that of another script will do."""
    other = loader_of(airbench94_muon, 60, batch_size=20)
    with pytest.raises(TypeError, match='CifarLoader of this script.*airbench94_muon.CifarLoader'):
        script.train(other, **small())
    loader = loader_of(script, 60, batch_size=20)
    script.train(loader, other, epochs=1, callback=lambda net, row: None, **small())
    with pytest.raises(TypeError, match='test_loader must be a CifarLoader'):
        script.train(loader, [], epochs=1, callback=lambda net, row: None, **small())
    loader.skipped = torch.zeros(50, dtype=torch.bool)
    with pytest.raises(ValueError, match=r'a mask of the 60 images, not \(50,\)'):
        next(iter(loader))


def test_copies_of_a_loader_mirror_on_their_own(script):
    loader = loader_of(script, 40, batch_size=40, aug=dict(flip=True), shuffle=False)
    ((first, _),) = loader
    ((other, _),) = copy.copy(loader)
    ((second, _),) = loader
    assert torch.equal(other, second) and not torch.equal(first, second)


def test_images_left_out_leave_no_smaller_last_batch(script):
    """Which would be compiled anew in each epoch."""
    loader = loader_of(script, 50, batch_size=20, drop_last=False)
    assert [len(inputs) for inputs, _ in loader] == [20, 20, 10]
    loader.skipped = torch.arange(50) < 3
    assert [len(inputs) for inputs, _ in loader] == [20, 20]


def test_compiled_it_trains_alike(script, monkeypatch):
    """As CapturedStep does it, with a compiler that changes nothing."""
    monkeypatch.setattr(torch, 'compile', lambda function, **_: function)
    nets = []
    for is_compiled in (False, True):
        loader = loader_of(script, 60, batch_size=20)
        options = small(epochs=6, compile=is_compiled)
        nets.append(script.train(loader, **options).state_dict())
    for key in nets[0]:
        torch.testing.assert_close(nets[0][key], nets[1][key])
