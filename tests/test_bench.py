"""
tests/bench_step.py on a copy of airbench94.py made small: that what it prints is what it timed.
"""

import json
import shutil
import statistics
import subprocess
import sys

import bench_step
import pytest
import torch
from conftest import ROOT

import airbench94_compiled


def bench(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / 'tests' / 'bench_step.py', *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
    )


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


def test_what_bounds_a_step(small, tmp_path, tiny):
    done = bench(small, '--rounds', 3, '--data', tiny, '--json', tmp_path / 'bench.json')
    assert done.returncode == 0, done.stderr
    log = json.loads((tmp_path / 'bench.json').read_text())
    steps = [times for times in log['rounds'] if 'step' in times]
    assert len(steps) == 3 and log['script'] == 'mine'
    for times in steps:
        assert times['step / convolutions'] == times['step'] / times['convolutions']
        assert all(
            times[name] > 0
            for name in ('step', 'convolutions', 'float32 step', 'loader', 'lookahead')
        )
    median = statistics.median(times['step / convolutions'] for times in steps)
    assert log['summary']['step / convolutions']['median'] == median
    (printed,) = [
        line for line in done.stdout.splitlines() if line.startswith('step / convolutions ')
    ]
    assert f' {median:.3f} ' in printed
    assert log['summary']['evaluation / its convolutions']['median'] > 0.5
    assert all(
        log['summary'][f'{name}, s']['median'] > 0.1 for name in ('first step', 'import torch')
    )


def test_against_another(small):
    done = bench(small, '--against', small, '--rounds', 3)
    assert done.returncode == 0, done.stderr
    names = [line[:36].strip() for line in done.stdout.splitlines()[3:]]
    assert 'step / step of the other' in names and 'convolutions' not in names


def test_its_faults(small, tmp_path, monkeypatch, capsys):
    for arguments, word in (
        (('--rounds', 2), '--rounds'),
        (('--data', tmp_path), 'train.pt'),
        (('--size', 24), '--size'),
    ):
        monkeypatch.setattr(sys, 'argv', ['bench_step.py', str(small), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            bench_step.main()
        assert stop.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]


def test_the_pieces_of_a_script_that_compiles(monkeypatch):
    if not shutil.which('g++'):
        pytest.skip('needs a C++ compiler')
    monkeypatch.setitem(airbench94_compiled.hyp, 'widths', (4, 4, 4))
    monkeypatch.setattr(airbench94_compiled, 'set_up_process', lambda device: None)
    pieces = bench_step.pieces(airbench94_compiled, torch.device('cpu'), torch.float32, 32)
    assert {'step', 'convolutions', 'evaluation'} <= set(pieces)
