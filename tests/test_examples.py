"""examples/, scaled down."""

import json
import subprocess
import sys

from conftest import ROOT, write_split


def test_data_selection(tmp_path):
    write_split(tmp_path / 'train.pt', 1800, seed=0)
    write_split(tmp_path / 'test.pt', 50, seed=1)
    done = subprocess.run([sys.executable, ROOT / 'examples' / 'data_selection.py', '--data', tmp_path, '--epochs', '1',
                           '--seed', '5', '--log', tmp_path / 'log.jsonl'],
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    header, *results = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert header['arguments']['seed'] == '5' and 'least confident' in header['source']
    assert [result['images'] for result in results] == [1800, 1080, 1080]
    table = done.stdout.splitlines()[-3:]
    for line, result in zip(table, results, strict=True):
        assert line.startswith(result['name']) and line.endswith(f'{result["tta_val_acc"]:.4f}')


def test_data_selection_without_data(tmp_path):
    (tmp_path / 'train.pt').write_text('no data')
    done = subprocess.run([sys.executable, ROOT / 'examples' / 'data_selection.py', '--data', tmp_path],
                          capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and 'train.pt' in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ['train.pt']
