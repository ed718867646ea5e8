"""results/gpu.py, tried on a CPU with tiny settings: its plans, its logs, what it skips."""

import ast
import importlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import tarfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_split

import airbench94_muon

sys.path.insert(0, str(ROOT / 'results'))
import gpu  # noqa: E402

DEVICE_NAME = airbench94_muon.device_name(torch.device('cpu'))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny networks are no faster on more threads, and far slower on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def candidates(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'results' / 'search_94_muon')
    module = importlib.import_module('candidates')
    monkeypatch.setattr(module, 'TARGETS', module.TARGETS.copy())  # --tiny changes it
    return module


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, candidates):
    """Calls gpu.main and returns the lines that it prints, but the first, the device's name."""

    def call(stage, *words, seconds=600, after=()):
        argv = ['gpu.py', stage, *map(str, words), '--tiny', '--device', 'cpu']
        argv += ['--out', str(tmp_path / 'out'), '--work', str(tmp_path / 'work')]
        argv += map(str, after)
        monkeypatch.setattr(sys, 'argv', [*argv, '--seconds', str(seconds)])
        gpu.main()
        first, *lines = capsys.readouterr().out.splitlines()
        assert first == DEVICE_NAME
        return lines

    return call


@pytest.fixture
def data(tmp_path):
    """A folder with 60 images to train on and 40 to test on."""
    for name, n in (('train.pt', 60), ('test.pt', 40)):
        write_split(tmp_path / name, n, seed=0)
    return tmp_path


def logs(tmp_path, stage):
    with tarfile.open(tmp_path / 'out' / f'{stage}.tar') as tar:
        return {name: tar.extractfile(name).read().decode(errors='replace')
                for name in tar.getnames() if '.' in name}  # fmt: skip


def test_probes_and_what_does_not_fit(run, tmp_path):
    name = 'probe_airbench94_muon_captured_64_256_384'  # which may take 120 seconds
    (line,) = run('bench', '--only', name, seconds=119)
    assert re.fullmatch(name + r': skipped, 11\d of 120 seconds are left', line)
    lines = run('bench', '--only', name, seconds=130)
    assert lines[0].startswith(f'{name}: 0, ')
    assert re.search(r"'32': '\d+\.\d\d ms \(\d+\.\d\d to \d+\.\d\d\), host ", lines[-1])
    out = logs(tmp_path, 'bench')
    assert all(name.endswith('.out') for name in out)
    record = json.loads(out['logs/probe_airbench94_muon_captured_64_256_384.out'].splitlines()[-1])
    assert record['widths'] == [8, 16, 16] and sorted(record['sizes']) == ['22', '26', '32']
    assert len(record['losses']) == 20 and record['losses'][-1] < record['losses'][0]
    for of_size in record['sizes'].values():
        assert of_size['ms'] >= of_size['host_ms'] > 0 and of_size['kernels_per_step'] > 10
        shortest, longest = of_size['ms_range']
        assert shortest < of_size['ms'] < longest  # of two blocks
        assert len(of_size['longest']) == 60


@pytest.mark.parametrize('variant', gpu.VARIANTS)
def test_variants(variant, monkeypatch, capsys, passed_through):
    modes = []

    def compile_to_nothing(function, mode=None, **options):
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, 'compile', compile_to_nothing)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    replaced = dict(  # by variants
        forward=airbench94_muon.Conv,
        convolve_small_maps=airbench94_muon,
        is_current_stream_capturing=torch.cuda,
        benchmark_limit=torch.backends.cudnn,
    )
    before = {name: getattr(place, name) for name, place in replaced.items()}
    for name, place in replaced.items():
        monkeypatch.setattr(place, name, before[name])
    made = []

    class Watched(airbench94_muon.CapturedStep):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(airbench94_muon, 'CapturedStep', Watched)
    words = ['gpu.py', 'probe', '--variant', variant, '--tiny', '--device', 'cpu']
    monkeypatch.setattr(sys, 'argv', words)
    gpu.main()
    assert len(made) == (variant != 'eager')
    for captured in made:
        uncounted = [layer.num_batches_tracked is None for layer in captured.net.modules()
                     if isinstance(layer, airbench94_muon.BatchNorm)]  # fmt: skip
        assert uncounted == 6 * [variant == 'captured-uncounted']
        of_muon = captured.groups[-1]
        assert of_muon['normalize'] == (variant != 'captured-unnormalized')
    *_, line = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert record['device'] == DEVICE_NAME and record['variant'] == variant
    assert record['losses'][-1] < record['losses'][0]
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


def test_a_probe_times_blocks_of_steps(monkeypatch):
    """The GPU, which the host waits for at the end, takes 0.1 s more than the host."""
    calls = []
    monkeypatch.setattr(gpu, 'synchronize', lambda device: time.sleep(0.1))

    def step(inputs, labels):
        calls.append((inputs, labels))
        time.sleep(0.01)

    ms, host_ms = gpu.time_block(step, 1, 2, torch.device('cpu'), n_steps=5)
    assert calls == 5 * [(1, 2)] and 10 <= host_ms and host_ms + 20 <= ms < 1000


def test_a_series_in_turn(run, data, tmp_path):
    lines = run('runs', '--data', data, '--only', 'airbench94_muon_', seconds=79)
    lines = [line for line in lines if not line.startswith(' ')]
    assert re.fullmatch(r'airbench94_muon_1: skipped, 7\d of 140 seconds are left', lines[0])
    assert lines[1].startswith('airbench94_muon_2: 0, ')
    for epochs, line in zip(('15.25', '14'), lines[2:], strict=True):
        assert line.startswith(f'airbench94_muon_{epochs}_2: skipped, ')
    out = logs(tmp_path, 'runs')
    runs = [json.loads(line) for line in out['logs/gpu_airbench94_muon.jsonl'].splitlines()]
    assert [run['seed'] for run in runs] == [5000, 5000, 5001]
    assert runs[0]['type'] == 'header' and all(run['ready_seconds'] > 0 for run in runs[1:])


def test_a_second_bench_measures_again(run, tmp_path):
    old = tmp_path / 'work' / 'logs' / 'airbench94_muon.jsonl'
    old.parent.mkdir(parents=True)
    old.write_text('the script refuses to continue this')
    lines = run('bench', '--only', 'airbench94_muon_3', seconds=150)
    assert lines[0].startswith('airbench94_muon_3: 0, ') and lines[-1].endswith(' n 3')
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


def test_trials_at_once(run, data, tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.TRIALS, '94', gpu.TRIALS['94'][:2])
    lines = run('trials', '--data', data, '--target', '94', '--seed', '7')
    for i, (line, trial) in enumerate(zip(lines, gpu.TRIALS['94'], strict=True)):
        log = logs(tmp_path, 'trials')[f'logs/trial_94_{i}.jsonl'].splitlines()
        header, *runs = map(json.loads, log)
        assert header['hyperparameters']['compile'] is False
        assert [each['seed'] for each in runs] == [7, 8, 9, 10]
        mean = statistics.fmean(100 * each['tta_val_acc'] for each in runs)
        assert line.startswith(f'{" ".join(trial)}: {mean:.2f}, std. error ')
        assert line.endswith(', n = 4, 0.00 PFLOPs')


def test_there_are_no_trials_for_96(run, capsys):
    with pytest.raises(SystemExit, match='2'):
        run('trials', '--target', '96')
    assert 'search instead' in capsys.readouterr().err


@pytest.mark.parametrize('stage', ('runs', 'trials', 'search'))
def test_data_that_cannot_be_read_start_nothing(stage, run, data, tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(gpu, 'start_process')
    half = tmp_path / 'half'
    half.mkdir()
    shutil.copy(data / 'test.pt', half)
    for folder, said in (
        (data / 'train.pt', 'train.pt is a file'),
        (half, 'there is no'),
        (tmp_path / 'none', 'there is no folder'),
    ):
        with pytest.raises(SystemExit, match='2'):
            run(stage, '--data', folder)
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / 'none').exists()


def test_what_makes_no_sense_starts_nothing(run, data, monkeypatch, capsys):
    monkeypatch.delattr(gpu, 'start_process')
    for words, said in (
        (['search', '--processes', 0], '--processes must be at least 1'),
        (['bench', '--only', 'airbench97'], 'no command has airbench97 in its name'),
    ):
        with pytest.raises(SystemExit, match='2'):
            run(*words, '--data', data)
        assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize('stage', ('bench', 'probe'))
def test_without_its_device_nothing_is_begun(monkeypatch, capsys, stage):
    monkeypatch.setattr(sys, 'argv', ['gpu.py', stage])  # of which the tests see none
    with pytest.raises(SystemExit, match='2'):
        gpu.main()
    assert 'error: no device cuda: ' in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize('stage', ('bench', 'search'))
@pytest.mark.parametrize('word', ('--out', '--work'))
def test_a_folder_that_cannot_be_written_is_said_at_once(
    stage, word, run, data, monkeypatch, capsys
):
    monkeypatch.delattr(gpu, 'start_process')
    with pytest.raises(SystemExit, match='2'):
        run(stage, '--data', data, after=(word, data / 'train.pt' / 'folder'))
    said = capsys.readouterr().err.splitlines()[-1]
    assert 'cannot write to ' in said and 'name another folder' in said


def test_a_probe_of_what_a_script_has_not(monkeypatch, capsys):
    for words, said in (
        (
            ['--script', 'airbench94_compiled', '--variant', 'captured-padded'],
            'compiled has only eager, ',
        ),
        (['--script', 'airbench94', '--variant', 'captured'], 'airbench94 has only eager'),
        (['--script', 'none'], 'invalid choice'),
    ):
        monkeypatch.setattr(sys, 'argv', ['gpu.py', 'probe', '--device', 'cpu', *words])
        with pytest.raises(SystemExit, match='2'):
            gpu.main()
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_search(run, data, tmp_path):
    words = '--data', data, '--processes', '2', '--runs', '8', '--seed', '7'
    base, first, second, misses, last = run('search', *words)
    assert re.fullmatch(r'\d+\.\d\d ± \d+\.\d\d with no change, estimated from all 8 runs', base)
    assert float(first.split()[0]) >= float(second.split()[0])
    for name in ('NorMuon', "Hiverge's Muon"):
        line = rf'[+-]\d+\.\d\d ± \d+\.\d\d by {name} \(\d runs\)'
        assert re.fullmatch(line, first) or re.fullmatch(line, second)
    assert misses.startswith('of these 3 intervals')
    assert last.startswith('8 runs of 8 in ')
    out = logs(tmp_path, 'search')
    runs = [json.loads(line) for i in range(2)
            for line in out[f'logs/search_94_{i}.jsonl'].splitlines()]  # fmt: skip
    assert [each['seed'] for each in runs] == [7, 9, 11, 13, 8, 10, 12, 14]
    for each in runs:
        assert each['device'] == DEVICE_NAME and each['torch'] == torch.__version__
        assert each['diverged'] is False


@pytest.mark.parametrize('target', ('95', '96'))
def test_the_search_tries_tiny_changes(run, data, target):
    words = '--data', data, '--processes', '2', '--runs', '4', '--target', target
    lines = run('search', *words)
    assert lines[-1].startswith('4 runs of 4 in ')


# In the place of a script: it logs a run, prints what is no UTF-8, and starts a process that adds
# to a file for half a minute.
FAKE = """
import subprocess, sys, time
log = [word for word in sys.argv if word.endswith('.jsonl')][-1]
beat = "import sys, time\\nfor _ in range(600): open(sys.argv[1], 'a').write('.'); time.sleep(0.05)"
with open(log, 'a') as file:
    file.write('{"type": "header"}\\n' * ('--log' in sys.argv))
    file.write('{"tta_val_acc": 0.5, "diverged": false, "pflops": 1, "changes": {}}\\n')
sys.stdout.buffer.write(b'\\xff\\n')
sys.stdout.flush()
subprocess.Popen([sys.executable, '-c', beat, log.replace('.jsonl', '.beat')])
time.sleep(30)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts FAKE in the place of the scripts, one process of it."""
    root = tmp_path / 'root'
    (root / 'results' / 'search_94_muon').mkdir(parents=True)
    for name in ('airbench94_muon.py', 'results/search_94_muon/search.py'):
        (root / name).write_text(FAKE)
    command = [sys.executable, 'airbench94_muon.py', '--log', tmp_path / 'work/logs/fake.jsonl']
    monkeypatch.setattr(gpu, 'ROOT', root)
    monkeypatch.setattr(gpu, 'runs_plan', lambda args: [('fake', args.seconds / 2 - 1, command)])
    monkeypatch.setitem(gpu.TRIALS, '94', [['--lr', '1']])
    monkeypatch.setattr(gpu, 'PACK_SECONDS', 0.1)


@pytest.mark.parametrize('stage', ('trials', 'search'))
def test_what_fails_says_why(stage, run, fake, data):
    for script in gpu.ROOT.rglob('*.py'):
        script.write_text("import sys; sys.exit('no memory')")
    first, second = run(stage, '--data', data, '--processes', '1')
    start = dict(trials='--lr 1: none, n = 0', search='0 runs of 320 in ')[stage]
    assert first.startswith(start) and second == '    no memory'


def assert_nothing_runs(tmp_path):
    (beat,) = (tmp_path / 'work' / 'logs').glob('*.beat')
    size = beat.stat().st_size
    time.sleep(0.3)
    assert 0 < size == beat.stat().st_size


@pytest.mark.parametrize('stage', ('runs', 'trials'))
def test_what_takes_too_long_is_stopped(stage, run, fake, data, tmp_path, monkeypatch):
    """The clock jumps when the process has done all that it does at first."""
    monotonic = time.monotonic

    def clock():
        beats = (tmp_path / 'work' / 'logs').glob('*.beat')
        return monotonic() + 1000 * any(beat.stat().st_size for beat in beats)

    monkeypatch.setattr(gpu, 'time', SimpleNamespace(**vars(time) | dict(monotonic=clock)))
    first, second = run(stage, '--data', data)
    assert first.startswith(dict(runs='fake: stopped, ', trials='--lr 1: 50.00, n = 1')[stage])
    assert second == '    �'
    assert_nothing_runs(tmp_path)


@pytest.mark.parametrize('stage', ('runs', 'trials', 'search'))
def test_sigterm_ends_what_was_started_and_the_runs_are_packed(stage, run, fake, data, tmp_path):
    def is_under_way():
        beats = (tmp_path / 'work' / 'logs').glob('*.beat')
        has_begun = any(beat.stat().st_size for beat in beats)
        return has_begun and (stage == 'runs' or is_packed())  # the other two pack now and then

    def is_packed():
        with suppress(FileNotFoundError):
            return any('tta_val_acc' in text for text in logs(tmp_path, stage).values())

    seen = []
    has_ended = threading.Event()

    def terminate():
        end = time.monotonic() + 20
        while not is_under_way() and time.monotonic() < end:
            time.sleep(0.05)
        seen.append(is_under_way())
        if not has_ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    def handler(*_):
        pytest.fail('main has no handler')

    before = signal.signal(signal.SIGTERM, handler)
    thread = threading.Thread(target=terminate)
    thread.start()
    try:
        with pytest.raises(SystemExit, match='143'):
            run(stage, '--data', data, '--processes', '1')
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        has_ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert seen == [True] and is_packed()
    assert_nothing_runs(tmp_path)


@pytest.mark.parametrize('half', (False, True))
@pytest.mark.parametrize('target', ('94', '95', '96'))
def test_candidates_are_recipes_of_the_search(candidates, target, half):
    search = importlib.import_module('search')
    for names in ([], *([name] for name in candidates.TARGETS[target][1])):
        changes = candidates.recipe(target, names, half)
        assert set(changes) <= set(search.base)
        assert sum(share for share, *_ in changes['stages']) == pytest.approx(1)
        if not half:  # it is of one image
            with torch.device('meta'):
                search.forward_flops(search.settings(changes), 24)
        assert candidates.changes_on(target, changes, half) == names
    assert candidates.changes_on(target, changes | dict(translate=1), half) is None
    lines = map(json.loads, candidates.queue(target, 40, 5, half))
    assert [line['seed'] for line in lines] == list(range(5, 45))


def test_the_search_for_95_starts_from_what_has_been_tried(candidates):
    base = candidates.BASE_95
    changes = dict(widths=tuple(base['widths']), epochs=24)
    assert ['--widths', str(changes['widths']), '--epochs', '24'] in [
        words[:4] for words in gpu.TRIALS['95']
    ]
    h = airbench94_muon.merge(changes)
    pflops = airbench94_muon.count_pflops(h, 24 * 25, 10000, total_steps=24 * 25)
    assert base['budget'] == pytest.approx(pflops, rel=0.01) and base['translate'] == 3
    mids = [block.conv1.out_channels for block in airbench94_muon.Net(h).blocks]
    assert base['mids'] == mids


def test_the_search_reads_data_as_the_scripts_do(candidates, monkeypatch):
    search = importlib.import_module('search')
    monkeypatch.setattr(search, 'data', {})
    search.load('synthetic')
    loader = airbench94_muon.CifarLoader('synthetic', device='cpu')
    images, labels = search.data['train']
    assert images.allclose(loader.normalize(loader.images)) and labels.equal(loader.labels)
    assert len(search.data['test'][1]) == 1000


def test_the_search_lets_cudnn_choose(candidates, monkeypatch):
    search = importlib.import_module('search')
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    monkeypatch.setattr(sys, 'argv', ['search.py', 'queue', 'log', 'absent'])
    monkeypatch.setattr(search, 'load', lambda root: sys.exit('loads'))
    with pytest.raises(SystemExit, match='loads'):
        search.main()
    assert torch.backends.cudnn.benchmark


@pytest.fixture
def search(candidates, monkeypatch):
    """search.py with few images."""
    module = importlib.import_module('search')
    generator = torch.Generator().manual_seed(0)
    for split, n in (('train', 60), ('test', 40)):
        images = torch.randn(n, 3, 32, 32, generator=generator)
        monkeypatch.setitem(module.data, split, (images, torch.arange(n) % 10))
    return module


@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float32))
def test_all_changes_train_together(candidates, search, monkeypatch, dtype):
    monkeypatch.setattr(search, 'DTYPE', dtype)  # bfloat16 on a GPU
    for target in ('94', '95', '96'):
        changes = gpu.shrunk(candidates.recipe(target, candidates.TARGETS[target][1]))
        run = search.run(changes, seed=0)
        assert 10 < run['steps'] < 300 and run['train_loss'] < 3 and run['diverged'] is False


def test_a_search_knows_a_run_that_diverged(candidates, search, monkeypatch):
    monkeypatch.setattr(search, 'DTYPE', torch.float32)
    changes = gpu.shrunk(candidates.recipe('96', [])) | dict(head_lr=1e38)
    assert search.run(changes, seed=0)['diverged'] is True


def test_the_cutout_of_the_search_is_of_the_image_before_it_is_reduced(search, monkeypatch):
    images, labels = search.data['train']
    monkeypatch.setitem(search.data, 'train', (torch.ones_like(images), labels))
    h = search.settings(dict(cutout=16))
    mirrored, order = torch.zeros(60, dtype=torch.bool), torch.arange(60)
    for size in (32, 16):
        ((x, _, _),) = search.batches(h, mirrored, order, size, 'bilinear', 60)
        assert x.shape == (60, 3, size, size)
        assert x.mean((1, 2, 3)).allclose(torch.tensor(0.75))


def test_a_proxy_passes_on_the_images_with_the_most_loss(search, monkeypatch):
    monkeypatch.setattr(search, 'DTYPE', torch.float32)
    learners, trained, proxys, batches, proxy_losses = [], [], [], [], []
    make_learner, update, hardest = search.make_learner, search.update, search.hardest

    def watched_learner(h):
        learners.append(make_learner(h))
        learners[-1].net.register_forward_pre_hook(
            lambda net, args: batches.append((net, args[0])) if net.training else None
        )
        return learners[-1]

    def watched_update(learner, loss, *args):
        before = {name: value.clone() for name, value in learner.net.named_parameters()}
        update(learner, loss, *args)
        after = learner.net.named_parameters()
        moved = {name for name, value in after if not value.equal(before[name])}
        assert {'linear.weight', 'blocks.0.conv1.weight'} < moved
        trained.append((learner, loss.item()))

    def watched_hardest(proxy, x, y, n, *args):
        losses = F.cross_entropy(proxy.net(x), y, label_smoothing=0.2, reduction='none')
        batches.pop()
        positions, found = hardest(proxy, x, y, n, *args)
        assert found.allclose(losses, atol=1e-5) and not found.requires_grad
        assert positions.tolist() == sorted(losses.argsort()[-n:].tolist())
        if trained[-1:] and trained[-1][0] is proxy:
            assert trained[-1][1] == pytest.approx(losses[positions].sum().item(), rel=1e-4)
        proxys.append((x, positions))
        proxy_losses.append(losses[positions].mean().item())
        return positions, found

    monkeypatch.setattr(search, 'make_learner', watched_learner)
    monkeypatch.setattr(search, 'update', watched_update)
    monkeypatch.setattr(search, 'hardest', watched_hardest)
    changes = dict(budget=9e-5, train_images=60, widths=[8, 8, 8], stages=[[1.0, 32, 'none', 12]])
    changes |= dict(proxy=[[8, 4, 6], 0.4, 3], mids=[4, 8, 8], tta_share=0.0)
    run = search.run(changes, seed=0)
    net, proxy = learners
    assert [block.conv2.out_channels for block in proxy.net.blocks] == [8, 4, 6]
    assert [block.conv1.out_channels for block in proxy.net.blocks] == [8, 4, 6]
    assert proxy.net.whiten.weight.equal(net.net.whiten.weight)
    expected, n_trained = [], 0
    for step, (x, positions) in enumerate(proxys):
        assert len(x) == 30 and len(positions) == 12
        assert batches[2 * step][0] is proxy.net and batches[2 * step][1].equal(x)
        assert batches[2 * step + 1][0] is net.net
        assert batches[2 * step + 1][1].equal(x[positions])
        n_trained += step % 3 == 0
        expected += [proxy, net] if step % 3 == 0 else [net]
    assert len(proxys) == run['steps'] > 4 and len(batches) == 2 * run['steps']
    assert [learner is proxy for learner, _ in trained] == [
        learner is proxy for learner in expected
    ]
    flops, muon, _ = search.forward_flops(net.h, 32)
    of_proxy, muon_of_proxy, _ = search.forward_flops(proxy.h, 32)
    total = run['steps'] * (3 * 12 * flops + muon + 30 * of_proxy) + 20000 * flops
    total += n_trained * (2 * 30 * of_proxy + muon_of_proxy)
    assert run['pflops'] == pytest.approx(total / 1e15) == pytest.approx(changes['budget'], rel=0.1)
    assert run['epochs'] == pytest.approx(run['steps'] * 12 / 60)
    assert run['proxy_loss'] == pytest.approx(proxy_losses[-1], rel=1e-4)


def test_with_a_proxy_the_easy_images_are_easy_for_it(search, monkeypatch):
    """For what it never passes on has no other loss, and would never be left out."""
    monkeypatch.setattr(search, 'DTYPE', torch.float32)
    drawn, known = [], torch.full((60,), math.inf)
    batches, hardest = search.batches, search.hardest

    def watched_batches(h, flip_mask, order, *args):
        left_out = sorted(set(range(60)) - set(order.tolist()))
        drawn.append((left_out, known.argsort()[: len(left_out)].tolist()))
        for x, y, idx in batches(h, flip_mask, order, *args):
            drawn.append(idx)
            yield x, y, idx

    def watched_hardest(*args):
        positions, losses = hardest(*args)
        known[drawn[-1]] = losses
        return positions, losses

    monkeypatch.setattr(search, 'batches', watched_batches)
    monkeypatch.setattr(search, 'hardest', watched_hardest)
    changes = dict(budget=1.2e-4, train_images=60, widths=[8, 8, 8], stages=[[1.0, 32, 'none', 10]])
    changes |= dict(proxy=[[8, 8, 8], 0.5, 2], tta_share=0.0, prune=[0.0, 0.3])
    search.run(changes, seed=0)
    passes = [item for item in drawn if isinstance(item, tuple)]
    assert len(passes) > 4 and passes[0][0] == [] and len(passes[1][0]) == 18
    assert sorted(passes[1][1]) == passes[1][0]


def test_a_proxy_that_diverges_is_seen(search, monkeypatch):
    monkeypatch.setattr(search, 'DTYPE', torch.float32)
    changes = dict(budget=1.2e-4, train_images=60, widths=[8, 8, 8], stages=[[1.0, 32, 'none', 10]])
    changes |= dict(proxy=[[8, 8, 8], 0.5, 2], tta_share=0.0)
    assert search.run(changes, seed=0)['diverged'] is False
    hardest = search.hardest
    monkeypatch.setattr(
        search, 'hardest', lambda *args: (hardest(*args)[0], torch.full((20,), math.nan))
    )
    assert search.run(changes, seed=0)['diverged'] is True


def test_a_proxy_needs_enough_images(search):
    with pytest.raises(ValueError, match='no batch of 100 from 60 images'):
        search.settings(
            dict(train_images=60, stages=[[1.0, 32, 'none', 50]], proxy=[[8, 8, 8], 0.5, 4])
        )


@pytest.mark.parametrize('extra', (1, 2))
def test_the_residual_of_a_third_convolution(search, extra):
    h = search.settings(dict(extra=[0, 0, extra], widths=[8, 8, 8]))
    block = search.Net(h).blocks[2]
    for module in (block.conv1, block.conv2, block.conv3):
        torch.nn.init.normal_(module.weight)
    x = torch.randn(4, 8, 6, 6)
    first = F.gelu(block.norm1(F.max_pool2d(block.conv1(x), 2)))
    second = F.gelu(block.norm2(block.conv2(first)))
    expected = F.gelu(block.norm3(block.conv3(second)) + (second if extra == 1 else first))
    assert block(x).allclose(expected, atol=1e-5)


@pytest.mark.parametrize('features', (384, 512))
def test_the_search_gives_the_head_the_scripts_lr(candidates, search, features):
    """What a step of SGD adds to the logits, by each feature and unit of their gradient."""
    base = candidates.BASE_95
    h = search.settings(base | dict(mids=[8, 8, features], widths=[8, 8, features]))
    script = airbench94_muon.hyp | dict(widths=(8, 8, features))
    net = airbench94_muon.Net(script)
    sgd, _ = airbench94_muon.make_optimizer(net, script)
    expected = sgd.param_groups[1]['lr'] * net.scaling_factor**2
    assert h.head_lr / search.Net(h).head_scale ** 2 == pytest.approx(expected, rel=0.01)


def test_batchnorm_over_parts_of_a_batch_averages_as_over_all_of_it(search):
    for scale, parts in ((1.0, 4), (0.5, 2)):
        h = search.settings(dict(ghost=500, batch_scale=scale))
        assert (1 - search.norm(4, h).momentum) ** parts == pytest.approx(1 - h.bn_momentum)


def test_a_recipe_that_fails_does_not_end_the_search(
    candidates, search, monkeypatch, tmp_path, capsys
):
    queue, log = tmp_path / 'queue', tmp_path / 'log'
    good = gpu.shrunk(candidates.BASE_95)
    lines = [json.dumps(good | dict(seed=seed, act=act)) for seed, act in ((1, 'no'), (2, 'gelu'))]
    unknown, no_batch = good | dict(seed=3, muon_lrr=1), good | dict(seed=4, train_images=10)
    lines = ['', '{', json.dumps(unknown), json.dumps(no_batch), *lines]
    queue.write_text('\n'.join(lines) + '\n{"seed": 5')  # the last is being written
    monkeypatch.setattr(search, 'load', lambda root: None)
    monkeypatch.setattr(sys, 'argv', ['search.py', str(queue), str(log), 'absent'])
    monkeypatch.setattr(time, 'sleep', lambda seconds: sys.exit('waits for more lines'))
    with pytest.raises(SystemExit, match='waits for more'):
        search.main()
    assert [json.loads(line)['seed'] for line in log.read_text().splitlines()] == [2]
    log.unlink()
    queue.write_text('\n'.join([*lines, 'end']))  # as gpu.py does
    capsys.readouterr()
    assert search.main() == 0 and len(log.read_text().splitlines()) == 1
    err = capsys.readouterr().err
    assert "KeyError: 'no'" in err and 'ValueError: base has no muon_lrr' in err
    assert 'ValueError: there is no batch of 20 from 10 images' in err
    assert re.findall(r'search: line (\d) of the queue is left out', err) == list('12345')


@pytest.mark.parametrize('words, said', [
    ([], 'give it QUEUE LOG DATA'),
    (['none', 'log', 'synthetic'], 'none'),
    (['queue', 'none/log', 'synthetic'], 'none/log'),
    (['queue', 'log', 'queue'], 'queue is a file'),
])  # fmt: skip
def test_the_search_refuses_before_it_trains(search, monkeypatch, tmp_path, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path('queue').write_text('{"seed": 1}\nend\n')
    monkeypatch.setattr(search, 'run', None)
    monkeypatch.setattr(sys, 'argv', ['search.py', *words])
    assert search.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('search: error: ') and said in line


@pytest.mark.parametrize('target, n', (('94', 32), ('95', 32), ('96', 16)))
def test_a_design_tells_the_changes_apart(candidates, target, n):
    names = list(candidates.TARGETS[target][1])
    runs = candidates.design(names, n, seed=0)
    signs = torch.tensor([[-1.0 if name in on else 1.0 for name in names] for on in runs])
    assert signs.sum(0).eq(0).all() and (signs.T @ signs).equal(n * torch.eye(len(names)))
    pairs = torch.einsum('ri,rj->rij', signs, signs).flatten(1)
    assert (signs.T @ pairs).eq(0).all()
    assert candidates.design(names, 2 * n, seed=0)[:n] == runs
    assert candidates.design(names, n, seed=1) != runs


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('target', ('94', '95', '96'))
def test_the_first_runs_of_a_design_tell_the_changes_apart(candidates, target, seed):
    names = list(candidates.TARGETS[target][1])
    runs = candidates.design(names, len(names) + 1, seed)
    rows = torch.tensor([[1.0] + [float(name in on) for name in names] for on in runs])
    assert torch.linalg.matrix_rank(rows) == len(names) + 1


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
        assert abs(effect - truth) < 2 * width and 0.01 < width < 0.1
        assert n == (64 if name == '' else 32)
    for few in (runs[:5], runs[:5] * 2):
        of_few = candidates.effects('94', few, 'held_out', half=True)
        assert all(width == float('inf') for _, _, width, _ in of_few)
        lines = candidates.report('94', few, 'held_out', True)
        assert lines == [f'no effects: {len(few)} runs do not tell {len(names)} changes apart, '
                         f'the first {len(names) + 2} of a queue do']  # fmt: skip
    of_few = candidates.effects('94', runs[: len(names) + 2], 'held_out', half=True)
    assert all(width < float('inf') for _, _, width, _ in of_few)
    (none,) = candidates.report('94', runs[-1:], 'held_out', True)
    assert none == 'no run is of this recipe and ended (without --half there may be some)'
    other = dict(changes={}, selective=0.5)  # of all data, which has no held_out
    assert candidates.effects('94', [*runs, other], 'held_out', half=True) == found
    runs.append(runs[0] | dict(held_out=0.1, diverged=True))
    runs[0]['diverged'] = False
    assert candidates.effects('94', runs, 'held_out', half=True) == found
    first, second, *_, last = candidates.report('94', runs, 'held_out', True)
    assert first == '1 runs diverged and are left out' and second.endswith('from all 64 runs')
    assert last == f'of these {len(names) + 1} intervals one in twenty misses, by chance'


def test_effects_of_several_logs(candidates, tmp_path, monkeypatch, capsys):
    lines = [json.dumps(dict(changes=json.loads(line), selective=0.9 + 0.001 * i)) for i, line in
             enumerate(candidates.queue('96', 12, seed=0))]  # fmt: skip
    lines = [re.sub(', "seed": [0-9]+', '', line) for line in lines]
    (tmp_path / 'a').write_text('\n'.join(lines[:5]) + '\n')
    (tmp_path / 'b').write_text('\n'.join(lines[5:])[:-9])  # the last one is cut off
    words = ['candidates.py', 'effects', '96', str(tmp_path / 'a'), str(tmp_path / 'b')]
    monkeypatch.setattr(sys, 'argv', words)
    candidates.main()
    first, *changes, _ = capsys.readouterr().out.splitlines()
    assert first.endswith(' with no change, estimated from all 11 runs') and len(changes) == 8
    for line in ('no JSON', '{"type": "header"}', '[]'):
        (tmp_path / 'a').write_text(line + '\n')
        with pytest.raises(SystemExit, match='2'):
            candidates.main()
        assert 'these are not logs of search.py' in capsys.readouterr().err.splitlines()[-1]


def test_the_plans_know_each_script(tmp_path):
    args = type('Args', (), dict(device='cuda', tiny=False, data='data', work=tmp_path, seed=7))
    plan = gpu.runs_plan(args)
    commands = [' '.join(map(str, command)) for _, _, command in plan]
    for script in ('airbench94', 'airbench94_compiled', 'airbench94_muon'):
        turns = [command for command in commands if f'/{script}.py' in command]
        assert ['--runs 13' in turns[0], '--runs 25' in turns[1]] == [True, True]
    assert any('--epochs 15.25' in command for command in commands)
    bench = gpu.bench_plan(args)
    names = [name for name, _, _ in bench]
    assert names[0] == 'airbench94_muon_3' and names[5] == 'tests'
    for _, _, command in bench:
        if '--variant' in command:
            variant = command[command.index('--variant') + 1]
            assert variant in gpu.variants_of(command[command.index('--script') + 1])
        for file, _, name in (str(word).partition('::') for word in command):
            assert not name or f'def {name}(' in (ROOT / file).read_text()
    # Most commands take half of what they may: those that were left out are for another loan.
    assert sum(seconds for _, seconds, _ in bench) <= 1200
    documented = dict(re.findall(r'gpu.py (\w+) --out DIR --seconds (\d+)', gpu.__doc__))
    # Up to the tests on CUDA, and both turns: also where each takes as long as it may.
    assert sum(seconds for _, seconds, _ in bench[:6]) <= int(documented['bench'])
    assert sum(seconds for _, seconds, _ in plan[:6]) <= int(documented['runs'])
