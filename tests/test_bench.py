"""
tests/bench_step.py on a copy of airbench94.py made small: that what it prints is what it timed.
"""

import json
import statistics
import sys

import bench_step
import pytest
import torch
from conftest import ROOT

import airbench94_compiled
import airbench94_muon


@pytest.fixture
def bench(monkeypatch, capsys):
    """bench_step.py in this process: a function that returns what it prints."""
    monkeypatch.setattr(sys, 'path', sys.path[:])

    def run(*words):
        monkeypatch.setattr(sys, 'argv', ['bench_step.py', *map(str, words)])
        bench_step.main()
        return capsys.readouterr().out

    yield run
    sys.modules.pop('mine', None)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    text = (ROOT / 'airbench94.py').read_text()
    for full, less in (
        ('batch_size=1024', 'batch_size=100'),
        ('widths=(64, 256, 256)', 'widths=(8, 8, 8)'),
        ('5000 if train else 1000', '500 if train else 100'),
    ):
        assert full in text
        text = text.replace(full, less)
    path = tmp_path_factory.mktemp('bench') / 'mine.py'
    path.write_text(text)
    return path


def test_what_bounds_a_step(small, tmp_path, tiny, bench):
    out = bench(small, '--rounds', 3, '--data', tiny, '--json', tmp_path / 'bench.json')
    log = json.loads((tmp_path / 'bench.json').read_text())
    steps = [times for times in log['rounds'] if 'step' in times]
    assert len(steps) == 3 and log['script'] == 'mine'
    for times in steps:
        assert times['step / convolutions'] == times['step'] / times['convolutions']
        assert all(
            times[name] > 0
            for name in ('step', 'convolutions', 'float32 step', 'loader', 'lookahead')
        )
    ratios = [times['step / convolutions'] for times in steps]
    median = statistics.median(ratios)
    low, high = log['summary']['step / convolutions']['quartiles']
    assert min(ratios) <= low <= median <= high <= max(ratios)
    once = [times['evaluation'] for times in log['rounds'] if 'evaluation' in times]
    assert log['summary']['evaluation']['quartiles'] == 2 * once and len(once) == 1
    assert log['summary']['step / convolutions']['median'] == median
    (printed,) = [line for line in out.splitlines() if line.startswith('step / convolutions ')]
    assert f' {median:.3f} ' in printed
    assert log['summary']['evaluation / its convolutions']['median'] > 0
    assert all(
        log['summary'][f'{name}, s']['median'] > 0.1 for name in ('first step', 'import torch')
    )


def test_against_another(small, bench, tmp_path, monkeypatch):
    """Each step is of its own script."""
    other = tmp_path / 'other.py'
    other.write_text(small.read_text())
    timed, real_pieces = [], bench_step.pieces

    def pieces(module, *args):
        functions = real_pieces(module, *args)
        step = functions['step']
        return functions | {'step': lambda: (timed.append(module.__name__), step())}

    monkeypatch.setattr(bench_step, 'pieces', pieces)
    out = bench(small, '--against', other, '--rounds', 3)
    names = [line[:36].strip() for line in out.splitlines()[3:]]
    assert 'step / step of the other' in names and 'convolutions' not in names
    assert timed == 5 * ['mine', 'other']  # two of the rounds warm up
    sys.modules.pop('other')


def test_the_size_of_the_images(monkeypatch, passed_through, bench, tmp_path):
    """The step's images have it, and the FLOPs are those of it."""
    seen = []
    text = (ROOT / 'airbench94_muon.py').read_text()
    for full, less in (
        ('batch_size=2000', 'batch_size=100'),
        ('widths=(72, 288, 384)', 'widths=(8, 8, 8)'),
        ('5000 if train else 1000', '500 if train else 100'),
    ):
        assert full in text
        text = text.replace(full, less)
    script = tmp_path / 'mine.py'
    script.write_text(text)
    real_load = bench_step.load

    def load(path):
        module = real_load(path)
        real_step = module.train_step

        def step(net, optimizers, inputs, *args):
            seen.append(inputs.shape[2:])
            return real_step(net, optimizers, inputs, *args)

        monkeypatch.setattr(module, 'train_step', step)
        return module

    monkeypatch.setattr(bench_step, 'load', load)
    bench(script, '--size', 24, '--rounds', 3, '--json', tmp_path / 'bench.json')
    assert set(seen[-6:]) == {(24, 24)}
    (times, *_) = json.loads((tmp_path / 'bench.json').read_text())['rounds']
    h = dict(airbench94_muon.hyp, widths=(8, 8, 8), batch_size=100, sizes=((24, 1.0),))
    pflops = airbench94_muon.count_pflops(h, 1, 0)
    assert times['step, TFLOP/s'] == pytest.approx(1e6 * pflops / times['step'])


def test_a_first_step_that_is_none(small, tmp_path, monkeypatch, capsys):
    """As the script refuses the data: what it took to refuse is no time of a step."""
    for name in ('train.pt', 'test.pt'):
        torch.save({}, tmp_path / name)
    words = ['bench_step.py', small, '--data', tmp_path, '--json', tmp_path / 'bench.json']
    monkeypatch.setattr(sys, 'argv', list(map(str, words)))
    monkeypatch.setattr(sys, 'path', sys.path[:])
    monkeypatch.setattr(bench_step, 'pieces', None)  # nothing is timed before
    with pytest.raises(SystemExit, match='2'):
        bench_step.main()
    assert f'mine trains no step on {tmp_path}' in capsys.readouterr().err.splitlines()[-1]
    sys.modules.pop('mine')


def test_its_faults(small, tmp_path, monkeypatch, capsys):
    for arguments, word in (
        (('--rounds', 2), '--rounds'),
        (('--data', tmp_path), 'train.pt'),
        (('--size', 24), 'has no --size but 32'),
        (('--size', 40), '--size must be from 12 to 32'),
        (('--size', 4), '--size must be from 12 to 32'),
        (('--against', tmp_path / 'none.py'), 'there is no script'),
        (('--against', ROOT / 'README.md'), 'there is no script'),
        (('--json', tmp_path / 'none' / 'a.json'), 'there is no folder for'),
        (('--device', 'cuda'), 'no device cuda'),
    ):
        monkeypatch.setattr(sys, 'argv', ['bench_step.py', str(small), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            bench_step.main()
        assert stop.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]


def test_the_pieces_of_a_script_that_compiles(monkeypatch, passed_through):
    """Each is run once. A step is one of the network that is compiled, and leaves it as it is."""
    module = airbench94_compiled
    for name, value in (('widths', (4, 4, 4)), ('batch_size', 20)):
        monkeypatch.setitem(module.hyp, name, value)
    split = {key: value[:300] for key, value in module.synthetic_split(True).items()}
    monkeypatch.setattr(module, 'synthetic_split', lambda train: split)
    nets, real_step = [], module.train_step

    def step(net, *args):
        before = [p.detach().clone() for p in net.parameters()]
        real_step(net, *args)
        assert all(map(torch.equal, before, net.parameters()))
        nets.append(net)

    pieces = bench_step.pieces(module, torch.device('cpu'), torch.float32, 32)
    monkeypatch.setattr(module, 'train_step', step)
    called = {}
    for name, function in pieces.items():
        function()
        called[name] = len(nets)
    own = module.compiled_net(
        module.Net, (4, 4, 4), 0.4, 1 / 9, 10, torch.device('cpu'), torch.float32
    )
    assert nets == [own, own]
    assert called == {
        'step': 1,
        'convolutions': 1,
        'float32 step': 2,
        'loader': 2,
        'evaluation': 2,
        'its convolutions': 2,
        'lookahead': 2,
    }
