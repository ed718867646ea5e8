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


def test_against_another(small, bench):
    out = bench(small, '--against', small, '--rounds', 3)
    names = [line[:36].strip() for line in out.splitlines()[3:]]
    assert 'step / step of the other' in names and 'convolutions' not in names


def test_its_faults(small, tmp_path, monkeypatch, capsys):
    for arguments, word in (
        (('--rounds', 2), '--rounds'),
        (('--data', tmp_path), 'train.pt'),
        (('--size', 24), '--size'),
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
