"""results/gpu.py, tried on a CPU with tiny settings: its plans, its logs, what it skips."""

import ast
import importlib
import json
import math
import re
import statistics
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, write_split

import airbench94_muon

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
    name = 'probe_airbench94_muon_captured_64_256_384'  # which may take 120 seconds
    done = run(tmp_path, 'bench', '--only', name, seconds=119)
    assert done.returncode == 0 and done.stdout == f'{name}: skipped, 119 of 120 seconds are left\n'
    done = run(tmp_path, 'bench', '--only', name, seconds=121)
    assert done.returncode == 0 and done.stdout.startswith(f'{name}: 0, '), done.stderr
    out = logs(tmp_path, 'bench')
    assert all(name.endswith('.out') for name in out)
    record = json.loads(out['logs/probe_airbench94_muon_captured_64_256_384.out'].splitlines()[-1])
    assert record['widths'] == [8, 16, 16] and sorted(record['sizes']) == ['22', '26', '32']
    assert len(record['losses']) == 20 and record['losses'][-1] < record['losses'][0]
    for of_size in record['sizes'].values():
        assert of_size['ms'] >= of_size['host_ms'] > 0 and of_size['kernels_per_step'] > 10
        assert len(of_size['longest']) == 60


@pytest.mark.parametrize('variant', gpu.VARIANTS)
def test_variants(variant, monkeypatch, capsys):
    modes = []

    def compile_to_nothing(function, mode=None, **options):
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, 'compile', compile_to_nothing)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    airbench94_muon.captured_steps.clear()
    airbench94_muon.compiled_net.cache_clear()
    replaced = dict(  # by variants
        forward=airbench94_muon.Conv,
        convolve_small_maps=airbench94_muon,
        is_current_stream_capturing=torch.cuda,
        benchmark_limit=torch.backends.cudnn,
    )
    before = {name: getattr(place, name) for name, place in replaced.items()}
    for name, place in replaced.items():
        monkeypatch.setattr(place, name, before[name])
    words = ['gpu.py', 'probe', '--variant', variant, '--tiny', '--device', 'cpu']
    monkeypatch.setattr(sys, 'argv', words)
    gpu.main()
    line = capsys.readouterr().out.splitlines()[-1]
    record = json.loads(line)
    assert record['variant'] == variant and record['losses'][-1] < record['losses'][0]
    assert 'ready' in gpu.summary_of(line)
    changed = [name for name, place in replaced.items() if getattr(place, name) != before[name]]
    expected = {
        'captured-padded': 'forward',
        'captured-small-maps': 'forward',
        'captured-trimmed': 'convolve_small_maps',
        'captured-one-stream': 'is_current_stream_capturing',
        'captured-exhaustive': 'benchmark_limit',
    }
    assert changed == ([expected[variant]] if variant in expected else [])
    is_mode = variant in ('reduce-overhead', 'max-autotune-no-cudagraphs')
    assert modes == ([] if variant == 'eager' else [variant if is_mode else None])


def test_a_series_in_turn(tmp_path):
    for name, n in (('train.pt', 60), ('test.pt', 40)):
        write_split(tmp_path / name, n, seed=0)
    done = run(tmp_path, 'runs', '--data', tmp_path, '--only', 'airbench94_muon_', seconds=90)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith(' ')]
    assert lines[0] == 'airbench94_muon_1: skipped, 90 of 140 seconds are left'
    assert lines[1].startswith('airbench94_muon_2: 0, ')
    out = logs(tmp_path, 'runs')
    runs = [json.loads(line) for line in out['logs/gpu_airbench94_muon.jsonl'].splitlines()]
    assert [run['seed'] for run in runs] == [5000, 5000, 5001]
    assert runs[0]['type'] == 'header' and all(run['ready_seconds'] > 0 for run in runs[1:])


def test_a_second_bench_measures_again(tmp_path):
    for _ in range(2):
        done = run(tmp_path, 'bench', '--only', 'airbench94_muon_3', seconds=150)
        assert done.returncode == 0 and done.stdout.startswith('airbench94_muon_3: 0, ')
        assert ' n 3' in done.stdout
        assert logs(tmp_path, 'bench')['logs/airbench94_muon_3.out'].count('seed ') == 3


def test_the_trials_for_95_keep_to_the_budget():
    for words in gpu.TRIALS['95']:
        changes = {
            flag.removeprefix('--'): ast.literal_eval(value)
            for flag, value in zip(words[::2], words[1::2], strict=True)
        }
        h = airbench94_muon.merge(changes)
        steps = math.ceil(25 * h['epochs'])
        assert airbench94_muon.count_pflops(h, steps, 10000, total_steps=steps) <= 0.70


def test_trials_at_once(tmp_path):
    for name, n in (('train.pt', 60), ('test.pt', 40)):
        write_split(tmp_path / name, n, seed=0)
    words = '--data', tmp_path, '--target', '94', '--seed', '7'
    done = run(tmp_path, 'trials', *words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(gpu.TRIALS['94'])
    for i, (line, trial) in enumerate(zip(lines, gpu.TRIALS['94'], strict=True)):
        log = logs(tmp_path, 'trials')[f'logs/trial_94_{i}.jsonl'].splitlines()
        header, *runs = map(json.loads, log)
        assert header['hyperparameters']['compile'] is False
        assert [each['seed'] for each in runs] == [7, 8, 9, 10]
        mean = statistics.fmean(100 * each['tta_val_acc'] for each in runs)
        assert line.startswith(f'{" ".join(trial)}: {mean:.2f} ± ') and '(4), 0.00 PFLOPs' in line
    done = run(tmp_path / 'other', 'trials', '--data', tmp_path / 'train.pt')
    assert 'none (0)' in done.stdout and 'is a file' in done.stdout
    done = run(tmp_path, 'trials', '--target', '96')
    assert done.returncode == 2 and 'search instead' in done.stderr


def test_the_search(tmp_path):
    for name, n in (('train.pt', 60), ('test.pt', 40)):
        write_split(tmp_path / name, n, seed=0)
    words = '--data', tmp_path, '--processes', '2', '--runs', '8', '--seed', '7'
    done = run(tmp_path, 'search', *words)
    assert done.returncode == 0, done.stderr
    base, first, second, last = done.stdout.splitlines()
    assert re.fullmatch(r'\d+\.\d\d ± \d+\.\d\d with no change, from 8 runs', base)
    assert float(first.split()[0]) >= float(second.split()[0])
    for name in ('NorMuon', "Hiverge's Muon"):
        line = rf'[+-]\d+\.\d\d ± \d+\.\d\d by {name} \(\d runs\)'
        assert re.fullmatch(line, first) or re.fullmatch(line, second)
    assert last.startswith('8 runs of 8 in ')
    out = logs(tmp_path, 'search')
    seeds = [json.loads(line)['seed'] for i in range(2)
             for line in out[f'logs/search_94_{i}.jsonl'].splitlines()]  # fmt: skip
    assert seeds == [7, 9, 11, 13, 8, 10, 12, 14]


def test_a_search_that_fails_says_why(tmp_path):
    done = run(tmp_path, 'search', '--data', tmp_path / 'absent', '--processes', '1')
    assert done.stdout.startswith('0 runs of 320 in ') and 'absent' in done.stdout


@pytest.fixture
def candidates(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'results' / 'search_94_muon')
    return importlib.import_module('candidates')


@pytest.mark.parametrize('half', (False, True))
@pytest.mark.parametrize('target', ('94', '95', '96'))
def test_candidates_are_recipes_of_the_search(candidates, target, half):
    search = importlib.import_module('search')
    for names in ([], *([name] for name in candidates.TARGETS[target][1])):
        changes = candidates.recipe(target, names, half)
        assert set(changes) <= set(search.base)
        assert sum(share for share, *_ in changes['stages']) == pytest.approx(1)
        search.forward_flops(SimpleNamespace(**search.base | changes), 24)
        assert candidates.changes_on(target, changes, half) == names
    assert candidates.changes_on(target, changes | dict(translate=1), half) is None
    lines = map(json.loads, candidates.queue(target, 40, 5, half))
    assert [line['seed'] for line in lines] == list(range(5, 45))


@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float32))
def test_all_changes_train_together(candidates, monkeypatch, dtype):
    search = importlib.import_module('search')
    generator = torch.Generator().manual_seed(0)
    for split, n in (('train', 60), ('test', 40)):
        images = torch.randn(n, 3, 32, 32, generator=generator)
        monkeypatch.setitem(search.data, split, (images, torch.arange(n) % 10))
    monkeypatch.setattr(search, 'DTYPE', dtype)  # bfloat16 on a GPU
    for target in ('94', '95', '96'):
        changes = gpu.shrunk(candidates.recipe(target, candidates.TARGETS[target][1]))
        changes['budget'] = 1.5e-4
        run = search.run(changes, seed=0)
        assert run['steps'] > 4 and run['train_loss'] < 3


def test_a_design_tells_the_changes_apart(candidates):
    names = list(candidates.FACTORS_94)
    runs = candidates.design(names, 32, seed=0)
    signs = torch.tensor([[-1.0 if name in on else 1.0 for name in names] for on in runs])
    assert signs.sum(0).eq(0).all() and (signs.T @ signs).equal(32 * torch.eye(len(names)))
    pairs = torch.einsum('ri,rj->rij', signs, signs).flatten(1)
    assert (signs.T @ pairs).eq(0).all()
    assert candidates.design(names, 64, seed=0)[:32] == runs
    assert candidates.design(names, 32, seed=1) != runs


def test_effects(candidates):
    names = list(candidates.FACTORS_94)
    generator = torch.Generator().manual_seed(0)
    runs = []
    for line in candidates.queue('94', 64, seed=0, half=True):
        changes = json.loads(line)
        changes.pop('seed')
        on = candidates.changes_on('94', changes, half=True)
        accuracy = 0.91 + 0.002 * (names[0] in on) - 0.001 * (names[3] in on)
        accuracy += 0.0005 * torch.randn((), generator=generator).item()
        runs.append(dict(changes=changes, held_out=accuracy))
    runs.append(dict(changes=changes | dict(translate=1), held_out=0.5))
    found = candidates.effects('94', runs, 'held_out', half=True)
    assert [name for name, *_ in found] == ['', *names]
    for name, effect, width, n in found:
        truth = {'': 91, names[0]: 0.2, names[3]: -0.1}.get(name, 0)
        assert abs(effect - truth) < 2 * width and 0.02 < width < 0.08
        assert n == (64 if name == '' else 32)
    for few in (runs[:5], runs[:5] * 2):
        found = candidates.effects('94', few, 'held_out', half=True)
        assert all(width == float('inf') for *_, width, _ in found)
    assert candidates.report('94', runs[-1:], 'held_out', True) == []


def test_the_plans_know_each_script(tmp_path):
    args = type('Args', (), dict(device='cuda', tiny=False, data='data', work=tmp_path, seed=7))
    plan = gpu.runs_plan(args)
    commands = [' '.join(map(str, command)) for _, _, command in plan]
    for script in ('airbench94', 'airbench94_compiled', 'airbench94_muon'):
        turns = [command for command in commands if f'/{script}.py' in command]
        assert ['--runs 13' in turns[0], '--runs 25' in turns[1]] == [True, True]
    assert any('--epochs 15.25' in command for command in commands)
    bench = gpu.bench_plan(args)
    assert sum(seconds for _, seconds, _ in bench) <= 1100 and bench[0][0] == 'airbench94_muon_3'
