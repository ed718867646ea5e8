"""`import airbench`: what it offers, what it costs, and that the README's Python snippets run."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, keep

import airbench
import airbench94
import airbench94_muon
import airbench95
import airbench96

SMALL = dict(widths=(8, 8, 8), dtype=torch.float32, verbose=False)


def test_it_only_re_exports():
    own = [
        name
        for name, value in vars(airbench).items()
        if getattr(value, '__module__', None) == 'airbench'
    ]
    assert own == ['load_net']
    assert airbench.train94 is airbench94.train and airbench.warmup94 is airbench94.warmup
    assert (
        airbench.train94_muon is airbench94_muon.train
        and airbench.warmup94_muon is airbench94_muon.warmup
    )
    assert airbench.train95 is airbench95.train and airbench.warmup95 is airbench95.warmup
    assert airbench.train96 is airbench96.train and airbench.warmup96 is airbench96.warmup
    assert airbench.CifarLoader is airbench96.CifarLoader
    assert airbench.infer is airbench96.infer and airbench.evaluate is airbench96.evaluate


def test_importing_it_prints_nothing_and_reads_no_data(tmp_path):
    code = 'import sys, airbench; assert "torchvision" not in sys.modules'
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ
        | {'PYTHONPATH': str(ROOT), 'PYTHONDONTWRITEBYTECODE': '1', 'AIRBENCH_DATA': '/nowhere'},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    assert list(tmp_path.iterdir()) == []


def test_the_package_holds_all_modules():
    tomllib = pytest.importorskip('tomllib', reason='it came with Python 3.11')
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    assert project['tool']['setuptools']['py-modules'] == sorted(
        path.stem for path in ROOT.glob('airbench*.py')
    )
    assert (
        sorted(project['project']['dependencies'])
        == (ROOT / 'requirements.txt').read_text().split()
    )
    commands = ('airbench94', 'airbench94-compiled', 'airbench94-muon', 'airbench95', 'airbench96')
    assert project['project']['scripts'] == {
        command: f'{command.replace("-", "_")}:main' for command in commands
    }


def test_whole_numbers_of_pixels_may_be_floats(tiny):
    """As JSON and configuration files write them."""
    batches = []
    for aug in (dict(translate=2, cutout=8), dict(translate=2.0, cutout=8.0)):
        torch.manual_seed(0)
        batches.append(
            next(iter(airbench.CifarLoader(tiny, train=True, batch_size=100, aug=aug)))[0]
        )
    assert torch.equal(*batches)


@pytest.mark.parametrize('train', [airbench.train94, airbench.train94_muon, airbench.train96])
def test_each_training_takes_the_one_loader(train, tiny):
    """
    A subset of the caller's, of one batch, or without augmentation: trained on as it stands, and
    not changed.
    """
    loader = airbench.CifarLoader(
        tiny, train=True, batch_size=100, aug=dict(flip=True, translate=2, cutout=8)
    )
    loader.images, loader.labels = loader.images[:250], loader.labels[:250]
    images = loader.images.clone()
    history = []
    net = train(loader, epochs=3, label_smoothing=0, seed=0, callback=keep(history), **SMALL)
    again = train(loader, epochs=3, label_smoothing=0, seed=0, **SMALL)
    assert history[-1]['steps'] == 6 and torch.equal(loader.images, images) and loader.epoch == 0
    assert torch.equal(net.linear.weight, again.linear.weight)
    assert airbench.infer(net, loader).shape == (250, 10)
    loader.images, loader.labels, loader.aug = loader.images[:100], loader.labels[:100], {}
    train(loader, epochs=1, **SMALL)
    loader.images, loader.labels = loader.images[:99], loader.labels[:99]
    with pytest.raises(ValueError, match='99 images'):
        train(loader, epochs=1, **SMALL)


def test_only_the_images_of_the_loader_are_trained_on(tiny):
    """Images outside the subset, were any used, would spoil the weights: they are not numbers."""
    loader = airbench.CifarLoader(
        tiny, train=True, batch_size=100, aug=dict(flip=True, translate=2)
    )
    loader.images[500:] = float('nan')
    loader.images, loader.labels = loader.images[:500], loader.labels[:500]
    net = airbench.train94(loader, epochs=2, **SMALL)
    assert all(tensor.isfinite().all() for tensor in net.parameters())


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_does_not_grow(tiny):
    loader = airbench.CifarLoader(
        tiny, train=True, batch_size=500, aug=dict(flip=True, translate=2)
    )

    def resident():
        return int(re.search(r'VmRSS:\s+(\d+)', open('/proc/self/status').read())[1])

    for _ in range(5):
        list(loader)
    before = resident()
    for _ in range(50):
        for _ in loader:
            pass
    assert resident() - before < 100_000  # KiB; one epoch's batches take 12,000


def snippets():
    assert len(re.findall('```python', (ROOT / 'README.md').read_text())) == 6
    return re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)


@pytest.mark.parametrize('code', snippets(), ids=range(len(snippets())))
def test_the_readmes_snippets(code, tiny, monkeypatch, tmp_path):
    """As they stand, but for smaller data, batches and networks, and fewer epochs."""
    monkeypatch.setenv('AIRBENCH_DATA', str(tiny))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'cifar10').symlink_to(tiny)
    code = re.sub(r'epochs=[\d.]+', 'epochs=1', code).replace('batch_size=1024', 'batch_size=100')
    for module in (airbench94, airbench94_muon, airbench95, airbench96):
        for name, value in (('widths', (8, 8, 8)), ('epochs', 1), ('batch_size', 100)):
            monkeypatch.setitem(module.hyp, name, value)
    # Put back afterwards what a snippet assigns to the module.
    monkeypatch.setattr(airbench94, 'make_optimizer', airbench94.make_optimizer)
    recipe = dict(script='airbench94', hyperparameters=airbench94.hyp, dtype='float32')
    net = airbench94.Net(airbench94.hyp)
    (tmp_path / 'weights').mkdir()
    airbench94.save_net(
        net, tmp_path / 'weights' / 'airbench94-seed0.pt', dict(recipe, classes=list('0123456789'))
    )
    exec(compile(code, 'README.md', 'exec'), {})
