"""results/gpu.py, tried on a CPU with tiny settings: its plans, its logs, what it skips."""

import json
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT, write_split

sys.path.insert(0, str(ROOT / 'results'))
import gpu  # noqa: E402


def run(tmp_path, *words, seconds=100):
    return subprocess.run(
        [sys.executable, ROOT / 'results' / 'gpu.py', *words, '--tiny', '--device', 'cpu',
         '--out', tmp_path / 'out', '--work', tmp_path / 'work', '--seconds', str(seconds)],
        capture_output=True, text=True, timeout=200)  # fmt: skip


def logs(tmp_path, stage):
    with tarfile.open(tmp_path / 'out' / f'{stage}.tar') as tar:
        return {name: tar.extractfile(name).read().decode() for name in tar.getnames()
                if '.' in name}  # fmt: skip


def test_probes_and_what_does_not_fit(tmp_path):
    done = run(tmp_path, 'bench', '--only', 'probe_airbench94_muon_captured', seconds=100)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith(' ')]
    # It may take 120 seconds and is skipped; the next may take 90, and is run.
    assert lines[0] == 'probe_airbench94_muon_captured: skipped, 100 of 120 seconds are left'
    assert lines[1].startswith('probe_airbench94_muon_captured_64_256_384: 0, ')
    out = logs(tmp_path, 'bench')
    assert all(name.endswith('.out') for name in out)
    record = json.loads(out['logs/probe_airbench94_muon_captured_64_256_384.out'].splitlines()[-1])
    assert record['widths'] == [64, 256, 384] and sorted(record['sizes']) == ['24', '28', '32']
    assert len(record['losses']) == 20 and record['losses'][-1] < record['losses'][0]
    for of_size in record['sizes'].values():
        assert of_size['ms'] >= of_size['host_ms'] > 0 and of_size['launches'] > 10
        assert len(of_size['kernels']) == 10


@pytest.mark.parametrize('variant', ['eager', 'captured-unnormalized', 'reduce-overhead'])
def test_variants(variant, capsys):
    args = ['probe', '--variant', variant, '--tiny', '--device', 'cpu']
    done = subprocess.run([sys.executable, ROOT / 'results' / 'gpu.py', *args],
                          capture_output=True, text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record['variant'] == variant and record['losses'][-1] < record['losses'][0]
    assert 'ready' in gpu.summary_of(done.stdout.splitlines()[-1])


def test_a_series_in_turn(tmp_path):
    for name, n in (('train.pt', 60), ('test.pt', 40)):
        write_split(tmp_path / name, n, seed=0)
    done = run(tmp_path, 'runs', '--data', tmp_path, '--only', 'airbench94_muon', seconds=131)
    assert done.returncode == 0, done.stderr
    out = logs(tmp_path, 'runs')
    runs = [json.loads(line) for line in out['logs/gpu_airbench94_muon.jsonl'].splitlines()]
    assert [run['seed'] for run in runs] == [2000, 2000, 2001]
    assert runs[0]['type'] == 'header' and all(run['ready_seconds'] > 0 for run in runs[1:])
    shorter = json.loads(out['logs/gpu_airbench94_muon_13.3.jsonl'].splitlines()[0])
    assert shorter['type'] == 'header' and 'airbench94_muon_13.3_2: 0' in done.stdout


def test_the_plans_know_each_script(tmp_path):
    args = type('Args', (), dict(device='cuda', tiny=False, data='data', work=tmp_path, seed=7))
    plan = gpu.runs_plan(args)
    commands = [' '.join(map(str, command)) for _, _, command in plan]
    for script in ('airbench94', 'airbench94_compiled', 'airbench94_muon'):
        turns = [command for command in commands if f'/{script}.py' in command]
        assert ['--runs 13' in turns[0], '--runs 25' in turns[1]] == [True, True]
    assert any('--epochs 14.7' in command for command in commands)
    bench = gpu.bench_plan(args)
    assert sum(seconds for _, seconds, _ in bench) < 900 and bench[0][0] == 'tests'
