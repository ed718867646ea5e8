"""examples/, scaled down."""

import json
import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT, write_split
from test_results import CIFAR10
from test_summarize import summarize

import airbench94


def test_data_selection(tmp_path, monkeypatch, capsys):
    write_split(tmp_path / 'train.pt', 1800, seed=0)
    write_split(tmp_path / 'test.pt', 50, seed=1)
    monkeypatch.setitem(airbench94.hyp, 'widths', (8, 8, 8))
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


ABLATIONS = (ROOT / 'examples' / 'ablations.md').read_text()


def test_the_ablations_program(tiny, tmp_path, monkeypatch):
    """As it stands, but small and in float32; its logs go to summarize.py as the page says."""
    program = re.search(
        r"^AIRBENCH_DATA=\S+ python - <<'END'\n(.*?)^END$", ABLATIONS, re.DOTALL | re.MULTILINE
    )[1]
    monkeypatch.setenv('AIRBENCH_DATA', str(tiny))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(airbench94.hyp, 'batch_size', 100)
    for full, less in (
        ('(32, 128, 128)', '(8, 8, 8)'),
        ('epochs=3', 'epochs=1'),
        ('torch.bfloat16', 'torch.float32'),
    ):
        assert full in program
        program = program.replace(full, less)
    exec(compile(program, 'ablations.md', 'exec'), {})
    compared = re.findall(
        r'^python results/summarize.py (\S+) --against (\S+)$', ABLATIONS, re.MULTILINE
    )
    assert len(compared) == 2
    for mine, other in compared:
        (header, runs), (changed, others) = (summarize.read_logs([path]) for path in (mine, other))
        assert len(runs) == len(others) == 3
        changes = {
            key: changed['hyperparameters'][key]
            for key in header['hyperparameters']
            if changed['hyperparameters'][key] != header['hyperparameters'][key]
        }
        assert (
            changes
            == {'random_flip': dict(altflip=False), 'no_lookahead': dict(lookahead=False)}[
                re.search('ablation_(.*).jsonl', other)[1]
            ]
        )


@pytest.mark.parametrize('arm', ['random_flip', 'no_lookahead'])
def test_the_ablations_results_follow_from_the_logs(arm):
    baseline, other = (
        summarize.read_logs([ROOT / 'results' / f'ablation_{name}.jsonl'])
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
    assert row in ABLATIONS


def test_the_data_selection_follows_from_its_log():
    lines = (ROOT / 'results' / 'data_selection.jsonl').read_text().splitlines()
    header, *runs = [json.loads(line) for line in lines]
    assert header['data'] == CIFAR10 and len(runs) == 3
    for run in runs:
        accuracy = 100 * run['tta_val_acc']
        row = f'| {run["name"]} | {run["images"]:,} | {run["epochs"]:g} | {accuracy:.2f} |'
        assert row in (ROOT / 'results' / 'README.md').read_text()
