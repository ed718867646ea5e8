"""The scripts as commands: output, logs, exit codes, and what happens when things go wrong."""

import errno
import functools
import hashlib
import http.server
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import FLAGS, ROOT, write_split

import airbench94
import airbench94_compiled
import airbench94_muon
import airbench95
import airbench96
from airbench import load_net
from airbench94 import default_dtype, device_name, infer, load_split

SCRIPT = ROOT / 'airbench94.py'
# No test may reach a network: this proxy refuses.
ENVIRONMENT = {
    **os.environ,
    'http_proxy': 'http://127.0.0.1:9',
    'https_proxy': 'http://127.0.0.1:9',
    'no_proxy': '',
    'PYTHONUNBUFFERED': '1',
    'OMP_NUM_THREADS': '2',
}
ENVIRONMENT.pop('AIRBENCH_DATA', None)


def command(*arguments):
    return [sys.executable, str(SCRIPT), *FLAGS, *map(str, arguments)]


def airbench(*arguments, cwd=None):
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=200
    )


def read(log):
    records = [json.loads(line) for line in Path(log).read_text().splitlines()]
    return [r for r in records if r['type'] == 'header'], [r for r in records if r['type'] == 'run']


@pytest.fixture(scope='module')
def series(one_batch, tmp_path_factory):
    """A finished series of two runs: its log and its output."""
    log = tmp_path_factory.mktemp('series') / 'series.jsonl'
    done = airbench('--data', one_batch, '--runs', 2, '--epochs', 2, '--seed', 7, '--log', log)
    assert done.returncode == 0, done.stderr
    return log, done


def test_table_and_summary(series, one_batch):
    log, done = series
    lines = done.stdout.splitlines()
    header, runs = read(log)[0][0], read(log)[1]
    where = f'{header["dtype"]} on {header["device"]}'
    assert lines[0] == f'airbench94: {one_batch} data, {where}, log {log}'
    assert [line for line in lines if line.startswith('seed')] == ['seed 7', 'seed 8']
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines if '|' in line]
    columns = ['epoch', 'train_loss', 'train_acc', 'val_acc', 'tta_val_acc', 'time_seconds']
    assert rows[0] == rows[4] == columns and [row[0] for row in rows] == 2 * [
        'epoch',
        '1',
        '2',
        'eval',
    ]
    assert len({len(line) for line in lines if '|' in line}) == 1 and done.stderr == ''
    assert [row[4] for row in rows if row[0] == 'eval'] == [
        f'{run["tta_val_acc"]:.4f}' for run in runs
    ]
    assert lines[-4] == '2 runs, 0 diverged'
    for key, line in zip(('tta_val_acc', 'seconds', 'pflops'), lines[-3:], strict=True):
        values = [run[key] for run in runs]
        deviation = statistics.stdev(values)
        assert line == (
            f'{key:13} mean {statistics.fmean(values):.4f}   std {deviation:.4f}   '
            f'stderr {deviation / math.sqrt(2):.4f}   n 2'
        )


def test_log(series, one_batch):
    headers, runs = read(series[0])
    (header,) = headers
    h = {**airbench94.hyp, 'epochs': 2.0, 'widths': (8, 8, 8), 'batch_size': 100}
    assert header['script'] == 'airbench94' and header['source'] == SCRIPT.read_text()
    assert header['hyperparameters'] == json.loads(json.dumps(h))
    assert header['seed'] == 7 and header['torch'] == torch.__version__ and header['threads'] >= 1
    assert (
        header['dtype'] in ('bfloat16', 'float32')
        and header['device']
        and header['synthetic'] is False
    )
    for name in ('train', 'test'):
        data = load_split(one_batch, train=name == 'train')
        for key in ('images', 'labels'):
            assert (
                header['data'][name][key] == hashlib.sha256(data[key].numpy().tobytes()).hexdigest()
            )
    for i, run in enumerate(runs):
        assert run['seed'] == 7 + i and run['diverged'] is False
        assert 0.1 < run['ready_seconds'] < 100  # importing PyTorch alone takes a second
        assert all(len(run[key]) == 2 for key in ('train_loss', 'train_acc', 'val_acc'))
        assert run['seconds'] == run['time_seconds'][-1] > run['time_seconds'][0] and run[
            'steps'
        ] == [1, 2, 2]
        assert run['pflops'] == airbench94.count_pflops(h, 2, 96) > 0


@pytest.fixture
def two_threads(monkeypatch):
    """As the process of the series has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setenv('OMP_NUM_THREADS', '2')  # so that main leaves it at that
    yield
    torch.set_num_threads(before)


def test_a_run_is_the_same_alone_in_a_series_and_as_a_rank(series, main, monkeypatch, two_threads):
    """The series is of another process. The variables are those that torchrun sets."""
    code, out, err = main(airbench94, '--runs', 1, '--epochs', 2, '--seed', 8)
    assert code == 0 and 'std' not in out and 'nan' not in out and err == ''
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1).items():
        monkeypatch.setenv(name, str(value))
    assert main(airbench94, '--runs', 1, '--epochs', 2, '--seed', 8)[0] == 0
    runs = [read(series[0])[1][1], read('log.jsonl')[1][0], read('log.rank0.jsonl')[1][0]]
    for key in ('train_loss', 'train_acc', 'val_acc', 'tta_val_acc', 'seed'):
        assert runs[0][key] == runs[1][key] == runs[2][key], key


def test_default_log_and_data_from_the_environment(main, monkeypatch, tmp_path):
    code, out, _ = main(airbench94, log=None)
    (log,) = (tmp_path / 'logs').iterdir()
    assert (
        code == 0
        and re.fullmatch(r'airbench94-\d{8}-\d{6}-\d+\.jsonl', log.name)
        and log.name in out
    )
    assert read(log)[0][0]['seed'] == 0
    assert main(airbench94, '--seed', 0, '--log', tmp_path / 'again.jsonl')[0] == 0
    assert read(tmp_path / 'again.jsonl')[1][0]['train_loss'] == read(log)[1][0]['train_loss']


def test_help_explains_each_option_with_its_default(main):
    code, out, _ = main(airbench94, '--help')
    assert code == 0 and airbench94.__doc__.strip() in out
    for option in ('runs', 'seed', 'data', 'device', 'dtype', 'log', 'save'):
        assert '(default: ' in re.sub(
            r'\s+', ' ', out.split(f'\n  --{option} ')[1].split('\n  --')[0]
        ), option
    for key, value in airbench94.hyp.items():
        assert f'(default: {value})' in re.sub(
            r'\s+', ' ', out.split(f'\n  --{key} ')[1].split('\n  --')[0]
        ), key


def test_the_readmes_trial_learns(main):
    (line,) = re.findall(
        r'^    python airbench94.py (--data synthetic.*)$', (ROOT / 'README.md').read_text(), re.M
    )
    code, out, _ = main(airbench94, *shlex.split(line))
    assert code == 0 and 'SYNTHETIC' in out
    assert read('log.jsonl')[1][0]['tta_val_acc'] > 0.9


@pytest.mark.parametrize('of_environment', [False, True], ids=['flag', 'environment'])
def test_synthetic_data_is_said_everywhere(main, monkeypatch, one_batch, of_environment):
    small = {train: load_split(one_batch, train) for train in (True, False)}
    monkeypatch.setattr(airbench94, 'load_split', lambda path, train: small[train])
    if of_environment:
        monkeypatch.setenv('AIRBENCH_DATA', 'synthetic')
    words = () if of_environment else ('--data', 'synthetic')
    code, out, _ = main(airbench94, *words)
    assert code == 0 and read('log.jsonl')[0][0]['synthetic'] is True
    assert (
        'synthetic data' in out.splitlines()[0]
        and out.splitlines()[-4] == 'SYNTHETIC data: 1 runs, 0 diverged'
    )


def test_every_hyperparameter_is_a_flag(main, monkeypatch):
    h = dict(
        epochs=1.0,
        batch_size=50,
        lr=10.0,
        momentum=0.8,
        weight_decay=0.01,
        bias_scaler=32.0,
        lr_start=0.1,
        lr_peak=0.5,
        lr_end=0.0,
        label_smoothing=0.1,
        whiten_bias_epochs=1,
        lookahead=False,
        lookahead_every=2,
        lookahead_decay=0.9,
        lookahead_power=2,
        aug=dict(flip=False),
        altflip=False,
        widths=(8, 8, 16),
        bn_momentum=0.3,
        scaling_factor=0.125,
        tta_level=1,
    )
    assert h.keys() == airbench94.hyp.keys()
    calls, real_train = [], airbench94.train

    def train(loader, test_loader, **options):
        calls.append({**options, 'loader': (loader.batch_size, loader.aug)})
        return real_train(loader, test_loader, **options)

    def warmup(loader, test_loader, *, dtype, **options):
        warmed.append((loader.batch_size, len(test_loader.images), dtype, options))

    warmed = []
    monkeypatch.setattr(airbench94, 'train', train)
    monkeypatch.setattr(airbench94, 'warmup', warmup)
    flags = [word for key, value in h.items() for word in (f'--{key}', value)]
    code, _, err = main(airbench94, *flags, '--dtype', 'float32')
    assert code == 0, err
    assert warmed == [(50, 96, 'float32', h)]
    assert {key: calls[0][key] for key in h} == h and calls[0]['loader'] == (50, dict(flip=False))
    assert read('log.jsonl')[0][0]['hyperparameters'] == json.loads(json.dumps(h))
    assert read('log.jsonl')[1][0]['pflops'] == airbench94.count_pflops(h, 2, 96)


def test_a_hundred_classes(main, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ('train.pt', 'test.pt'):
        images = torch.randint(256, (100, 32, 32, 3), generator=generator, dtype=torch.uint8)
        torch.save(
            dict(
                images=images, labels=torch.arange(100), classes=[f'class {i}' for i in range(100)]
            ),
            tmp_path / name,
        )
    code, _, err = main(airbench94, '--data', tmp_path, '--save', 'nets')
    assert code == 0, err
    net = load_net('nets/airbench94-seed0.pt')
    assert net.linear.out_features == 100 and net.classes[99] == 'class 99'
    h = {**airbench94.hyp, 'widths': (8, 8, 8), 'batch_size': 100}
    assert read('log.jsonl')[1][0]['pflops'] == airbench94.count_pflops(h, 1, 100, 100)


# Saved networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'script, dtype',
    [
        (airbench94, 'float32'),
        (airbench94, 'bfloat16'),
        (airbench94_compiled, 'float32'),
        (airbench94_muon, 'float32'),
        (airbench94_muon, 'bfloat16'),
        (airbench95, 'float32'),
        (airbench96, 'float32'),
    ],
    ids=lambda value: getattr(value, '__name__', value),
)
def test_a_saved_network_is_the_trained_one(
    main, one_batch, monkeypatch, passed_through, script, dtype
):
    if script is airbench94_compiled:
        monkeypatch.setattr(script, 'what_compiling_lacks', lambda device: None)
    nets, real_train = [], script.train
    files = [f'{script.__name__}-seed{seed}.pt' for seed in (0, 1)]
    monkeypatch.setattr(
        script,
        'train',
        lambda *args, **options: nets.append(real_train(*args, **options)) or nets[-1],
    )
    words = ('--runs', 2, '--dtype', dtype, '--save', 'new/nets')
    code, _, err = main(script, *words)
    assert code == 0 and names(Path('new/nets')) == files, err
    loader = script.CifarLoader(one_batch, train=False, device='cpu')
    # Compiled, a warm-up came first.
    logits = [infer(net, loader) for net in nets[-2:]]
    assert not torch.equal(*logits)
    for i in (0, 1):
        net = load_net(f'new/nets/{files[i]}')
        assert type(net) is script.Net and not net.training and net.classes == loader.classes
        assert torch.equal(infer(net, loader), logits[i])
    saved = torch.load(f'new/nets/{files[0]}', weights_only=True)
    assert saved['script'] == script.__name__ and saved['dtype'] == dtype
    assert saved['hyperparameters'] == {
        **script.hyp,
        'epochs': 1,
        'widths': (8, 8, 8),
        'batch_size': 100,
    }


def test_a_network_of_the_recipe_in_other_words_may_be_replaced(main):
    words = ('--save', 'nets', '--widths', '(8, 8, 8)')
    assert main(airbench94, *words, '--lr', '11')[0] == 0
    for same in (('--lr', '11.0'), ('--lr', '11', '--widths', '[8, 8, 8]')):
        code, _, err = main(airbench94, *words, *same, log='other.jsonl')
        assert (code, err) == (0, '')
        Path('other.jsonl').unlink()
    code, _, err = main(airbench94, *words, '--lr', '12', log='other.jsonl')
    assert code == 2 and 'not a network of this recipe' in err


@pytest.mark.parametrize('option', ('--save', '--log', '--data'))
def test_a_folder_of_nobody(main, option):
    """It is a mistake, and no name of a folder."""
    code, out, err = main(airbench94, option, '~no such user/folder')
    assert code == 2 and out == '' and len(err.splitlines()) == 1
    assert 'there is no home folder for ~no such user/folder' in err
    assert not any(name.startswith('~') for name in os.listdir())


def test_a_folder_whose_name_begins_with_a_tilde(main, one_batch):
    os.symlink(one_batch, '~data')
    code, _, err = main(airbench94, '--data', './~data', '--save', './~nets')
    assert (code, err) == (0, '') and names(Path('~nets')) == ['airbench94-seed0.pt']


def test_a_diverged_run_is_not_saved(main):
    assert main(airbench94, '--scaling_factor', 1e90, '--save', '.')[0] == 0
    assert names(Path('.')) == ['log.jsonl']


@pytest.mark.parametrize(
    'error', [OSError(28, 'No space left'), RuntimeError('No space left: unexpected pos 64')]
)
def test_weights_that_cannot_be_saved_end_the_series(main, monkeypatch, capsys, error):
    def fail(data, file):
        raise error

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(type(error), match='No space'):
        main(airbench94, '--runs', 2, '--save', 'nets')
    assert '0 runs' in capsys.readouterr().out
    assert read('log.jsonl')[1] == [] and names(Path('nets')) == []


@pytest.mark.parametrize(
    'break_it',
    [
        lambda file: file.write_bytes(file.read_bytes()[:2000]),
        lambda file: file.write_text('weights'),
        lambda file: torch.save(Intruder(), file),
        lambda file: torch.save([1, 2], file),
        lambda file: torch.save(torch.load(file) | dict(script='os'), file),
        lambda file: torch.save(torch.load(file) | dict(classes=['one']), file),
        lambda file: torch.save(torch.load(file)['state_dict'], file),
    ],
    ids=['truncated', 'text', 'code', 'list', 'script', 'classes', 'state_dict'],
)
def test_load_net_refuses_other_files(tmp_path, monkeypatch, break_it):
    monkeypatch.chdir(tmp_path)
    h, file = {**airbench94.hyp, 'widths': (8, 8, 8)}, tmp_path / 'run0.pt'
    torch.save(
        dict(
            script='airbench94',
            state_dict=airbench94.Net(h).state_dict(),
            hyperparameters=h,
            classes=list('0123456789'),
            dtype='float32',
        ),
        file,
    )
    load_net(file)
    break_it(file)
    with pytest.raises(
        ValueError, match='run0.pt (is not a network|is a network of os|does not fit)'
    ):
        load_net(file)
    assert names(tmp_path) == ['run0.pt']


def test_load_net_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_net(tmp_path / 'run0.pt')


# Devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'cpu, name, dtype',
    [
        (
            dict(cpu_name='Intel Xeon', amx_bf16=True, avx512_bf16=True),
            'Intel Xeon (AMX)',
            torch.bfloat16,
        ),
        (
            dict(cpu_name='AMD EPYC', avx512_bf16=True, avx512_f=True),
            'AMD EPYC (AVX512-BF16)',
            torch.bfloat16,
        ),
        (
            dict(cpu_name='Intel Xeon', avx512_bf16=True, avx2=True),
            'Intel Xeon (AVX512-BF16)',
            torch.float32,
        ),
        (
            dict(cpu_name='AMD EPYC', avx512_bf16=False, avx512_f=True, avx2=True),
            'AMD EPYC (AVX512)',
            torch.float32,
        ),
        (dict(cpu_name='AMD EPYC', avx2=True), 'AMD EPYC (AVX2)', torch.float32),
        (dict(), 'CPU (z80)', torch.float32),
        (None, 'CPU (z80)', torch.float32),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_name_and_dtype_of_a_cpu(monkeypatch, cpu, name, dtype):
    monkeypatch.setattr(airbench94.platform, 'machine', lambda: 'z80')
    if cpu is None:
        monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
    else:
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: cpu, raising=False)
    device = torch.device('cpu')
    assert (device_name(device), default_dtype(device)) == (name, dtype)


def test_name_and_dtype_of_a_gpu(monkeypatch):
    def refuse():
        raise AssertionError('asked for the CPU')

    monkeypatch.setattr(torch.cpu, 'get_capabilities', refuse, raising=False)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: f'NVIDIA {device}')
    device = torch.device('cuda:3')
    assert device_name(device) == 'NVIDIA cuda:3' and default_dtype(device) == torch.float16
    # A Mac's GPU does not have the name of its processor.
    assert device_name(torch.device('mps')) == f'mps ({platform.machine()})'


# What makes no sense ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments, word',
    [
        (('--runs', 0), 'runs'),
        (('--epochs', -1), 'epochs'),
        (('--epochs', 'nan'), 'epochs'),
        (('--seed', -1), 'seed'),
        (('--device', 'gpu'), 'gpu'),
        (('--device', 'meta'), 'meta'),
        (('--dtype', 'float64'), 'float64'),
        (('--dtype', 'float16', '--device', 'cpu'), 'float16'),
        (('--data', 'nowhere'), 'nowhere'),
        (('--runs', 'many'), 'many'),
        (('--log', '/proc/nowhere/log.jsonl'), '/proc/nowhere'),
        pytest.param(
            ('--log', '/dev/full'),
            'No space',
            marks=pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full'),
        ),
        (('--log', '.'), 'directory'),
        (('--seed', 2**62), 'seed'),
        (('--lr', 0), 'lr must be a number above 0, not 0'),
        (('--lr', '1e999'), 'lr must be a number above 0, not inf'),
        (('--lr', '[1]'), 'lr must be a number above 0, not [1]'),
        (('--lr', 'fast'), "lr must be a number above 0, not 'fast'"),
        (('--lookahead', 'false'), "lookahead must be True or False, not 'false'"),
        (('--whiten_bias_epochs', 'None'), 'whiten_bias_epochs must be a number'),
        (('--momentum', 1), 'momentum must be a number from 0 to below 1, not 1'),
        (('--lookahead_every', 0), 'lookahead_every must be a whole number'),
        (('--lr_peak', 1), 'lr_peak'),
        (('--bn_momentum', 1.5), 'bn_momentum'),
        (('--label_smoothing', -0.1), 'label_smoothing'),
        (('--whiten_bias_epochs', -1), 'whiten_bias_epochs'),
        (('--tta_level', 3), 'tta_level'),
        (('--widths', '(8, 8)'), 'widths'),
        (('--widths', '(8, 8, 0)'), 'widths'),
        (
            ('--widths', '(8,'),
            "widths must be three whole numbers above 0, as (8, 16, 16), not '(8,'",
        ),
        (('--widths', 8), 'widths must be three whole numbers above 0, as (8, 16, 16), not 8'),
        (('--batch_size', 111), '111'),
        (('--batch_size', 99.5), 'batch_size'),
        (('--aug', "{'rotate': 1}"), 'rotate'),
        (('--aug', "{'translate': 1.5}"), '1.5'),
        (('--aug', 1), 'aug must be a dict'),
        (('--scaling_factor', 0), 'scaling'),
        (('--scaling_factor', 'None'), 'scaling_factor must be a number above 0, not None'),
        (('--wd', 1), '--wd'),
    ],
)
def test_bad_arguments(main, tmp_path, monkeypatch, arguments, word):
    for name in ('http_proxy', 'https_proxy', 'no_proxy'):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    code, out, err = main(airbench94, *arguments)
    (line,) = err.splitlines()
    assert code == 2 and line.startswith('airbench94: error: ') and word in line and out == ''
    assert names(tmp_path) == []


def test_no_cuda_here(main):
    code, out, err = main(airbench94, '--device', 'cuda')
    assert code == 2 and out == '' and len(err.splitlines()) == 1 and re.search('CUDA|NVIDIA', err)


def test_a_batch_larger_than_the_data(main, tmp_path):
    write_split(tmp_path / 'train.pt', 99, seed=0)
    write_split(tmp_path / 'test.pt', 10, seed=0)
    code, out, err = main(airbench94, '--data', tmp_path)
    assert (
        code == 2
        and 'batch of 100' in err
        and '99 images' in err
        and not Path('log.jsonl').exists()
    )


def test_missing_data_names_the_three_ways_on(main, tmp_path, monkeypatch):
    monkeypatch.delenv('AIRBENCH_DATA')
    for name in ('http_proxy', 'https_proxy', 'no_proxy'):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    code, out, err = main(airbench94)
    assert code == 2 and out == '' and len(err.splitlines()) == 1
    assert all(word in err for word in ('train.pt', '--data DIR', '--data synthetic'))
    assert names(tmp_path) == []


# The data's files ---------------------------------------------------------------------------------


class Intruder:
    def __reduce__(self):
        return os.system, ('touch INTRUDED',)


@pytest.mark.parametrize(
    'damage',
    [
        lambda file: file.write_bytes(file.read_bytes()[:5000]),
        lambda file: file.write_bytes(b''),
        lambda file: file.write_text('label,image\n'),
        lambda file: torch.save(Intruder(), file),
        lambda file: file.write_bytes(pickle.dumps(Intruder())),
    ],
    ids=['truncated', 'empty', 'text', 'code', 'pickle'],
)
def test_damaged_files(main, one_batch, tmp_path, damage):
    folder = shutil.copytree(one_batch, tmp_path / 'data')
    damage(folder / 'train.pt')
    code, out, err = main(airbench94, '--data', folder)
    assert code == 2 and len(err.splitlines()) == 1 and str(folder / 'train.pt') in err
    assert out == '' and not Path('INTRUDED').exists() and not Path('log.jsonl').exists()


@pytest.mark.parametrize(
    'change, found',
    [
        (
            dict(images=torch.zeros(5, 3, 32, 32, dtype=torch.uint8)),
            'uint8 (5, 3, 32, 32), torch.int64 (5,)',
        ),
        (dict(images=torch.zeros(5, 32, 32, 3)), 'float32 (5, 32, 32, 3)'),
        (dict(images=torch.zeros(0, 32, 32, 3, dtype=torch.uint8)), 'uint8 (0, 32, 32, 3)'),
        (
            dict(images=torch.zeros(0, 32, 32, 3, dtype=torch.uint8), labels=torch.arange(0)),
            'int64 (0,)',
        ),
        (dict(labels=torch.zeros(5)), 'float32 (5,)'),
        (dict(labels=torch.arange(5)[:, None]), 'int64 (5, 1)'),
        (dict(labels=torch.zeros(4, dtype=torch.int64)), 'uint8 (5, 32, 32, 3), torch.int64 (4,)'),
        (dict(labels=torch.tensor([0, 1, 2, 3, 10])), "int64 (5,), ['x', 'x',"),
        (dict(labels=torch.tensor([0, 1, 2, 3, -1])), "int64 (5,), ['x', 'x',"),
        (dict(classes='0123456789'), '0123456789'),
        (dict(classes=[]), '[]'),
        (dict(images=None), 'NoneType'),
    ],
)
def test_wrong_contents(tmp_path, change, found):
    data = dict(
        images=torch.zeros(5, 32, 32, 3, dtype=torch.uint8),
        labels=torch.arange(5),
        classes=['x'] * 10,
    )
    torch.save(data, tmp_path / 'train.pt')
    load_split(tmp_path, train=True)
    torch.save(data | change, tmp_path / 'train.pt')
    with pytest.raises(ValueError) as error:
        load_split(tmp_path, train=True)
    told, tells = str(error.value).split(' It holds ')
    assert told.startswith(f'{tmp_path / "train.pt"} must hold dict(images=') and found in tells


@pytest.mark.parametrize(
    'data, found',
    [([1, 2], 'TypeError'), (dict(images=torch.zeros(1, 32, 32, 3, dtype=torch.uint8)), 'labels')],
)
def test_neither_a_list_nor_half_a_dict_is_data(tmp_path, data, found):
    torch.save(data, tmp_path / 'train.pt')
    with pytest.raises(ValueError, match=f'must hold dict.* It holds .*{found}'):
        load_split(tmp_path, train=True)


def use_small_archive(source):
    """An archive in the format of CIFAR-10's, in this folder. torchvision takes it for CIFAR-10."""
    from torchvision.datasets import CIFAR10

    folder = source / CIFAR10.base_folder
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(n):
        data = torch.randint(256, (n, 3072), generator=generator, dtype=torch.uint8)
        return dict(data=data.numpy(), labels=list(range(10)) * (n // 10))

    CIFAR10.train_list = [['data_batch_1', write('data_batch_1', batch(30))]]
    CIFAR10.test_list = [['test_batch', write('test_batch', batch(20))]]
    names_of_classes = write('batches.meta', dict(label_names=list('0123456789')))
    CIFAR10.meta = dict(filename='batches.meta', key='label_names', md5=names_of_classes)
    file = source / CIFAR10.filename
    with tarfile.open(file, 'w:gz') as archive:
        archive.add(folder, CIFAR10.base_folder)
    CIFAR10.tgz_md5 = hashlib.md5(file.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server of the files in tmp_path."""
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.fixture
def archive(tmp_path, monkeypatch, server):
    """
    The small archive's folder, served as CIFAR-10; torchvision's settings are restored afterwards.
    """
    from torchvision.datasets import CIFAR10

    for name in ('train_list', 'test_list', 'meta', 'tgz_md5', 'url'):
        monkeypatch.setattr(CIFAR10, name, getattr(CIFAR10, name))
    use_small_archive(tmp_path / 'source')
    CIFAR10.url = f'{server}/source/{CIFAR10.filename}'
    return tmp_path / 'source'


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_download_is_kept(archive, tmp_path):
    data = load_split(tmp_path / 'new', train=True)
    assert data['images'].shape == (30, 32, 32, 3) and data['images'].dtype == torch.uint8
    assert data['labels'].tolist() == list(range(10)) * 3 and data['labels'].dtype == torch.int64
    assert data['classes'] == list('0123456789')
    loader = airbench94.CifarLoader(tmp_path / 'new', batch_size=10, device='cpu')
    assert loader.sha256['images'] == hashlib.sha256(data['images'].numpy().tobytes()).hexdigest()
    assert torch.equal(loader.images[5, 2], data['images'][5, :, :, 2] / 255)
    assert loader.images.is_contiguous(memory_format=torch.channels_last)  # as from train.pt
    shutil.rmtree(archive)
    again = load_split(tmp_path / 'new', train=True)
    assert all(torch.equal(again[key], data[key]) for key in ('images', 'labels'))
    assert len(load_split(tmp_path / 'new', train=False)['images']) == 20


@pytest.mark.parametrize(
    'break_it',
    [
        lambda file: file.write_bytes(file.read_bytes()[:1000]),
        lambda file: file.write_bytes(file.read_bytes()[:-8] + b'12345678'),
        lambda file: file.unlink(),
    ],
    ids=['halfway', 'checksum', 'missing'],
)
def test_a_broken_download_is_refused_and_made_good_by_the_next(archive, tmp_path, break_it):
    file = archive / 'cifar-10-python.tar.gz'
    whole = file.read_bytes()
    break_it(file)
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match='cannot be downloaded'):
            load_split(tmp_path / 'new', train=True)
    file.write_bytes(whole)
    assert len(load_split(tmp_path / 'new', train=True)['images']) == 30


@pytest.mark.parametrize(
    'remove',
    [
        lambda folder: (folder / 'cifar-10-python.tar.gz').unlink(),
        lambda folder: shutil.rmtree(folder / 'cifar-10-batches-py'),
    ],
    ids=['extracted', 'archive'],
)
def test_torchvisions_files_are_read_where_they_are(archive, monkeypatch, remove):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, 'url', 'http://127.0.0.1:9/none')
    remove(archive)
    assert (
        len(load_split(archive, train=True)['images']) == 30
        and len(load_split(archive, False)['images']) == 20
    )


@pytest.mark.parametrize(
    'file, n, other', [('train.pt', 110, 'test.pt'), ('test.pt', 96, 'train.pt')]
)
def test_one_split_without_the_other_is_not_made_up_from_cifar10(
    archive, one_batch, file, n, other
):
    shutil.copy(one_batch / file, archive)
    is_train = file == 'train.pt'
    assert len(load_split(archive, is_train)['images']) == n
    with pytest.raises(FileNotFoundError, match=f'there is no .*{other}'):
        load_split(archive, not is_train)


# Logs ---------------------------------------------------------------------------------------------


def test_a_log_is_continued_with_its_seed(main):
    assert main(airbench94, '--runs', 1, '--seed', 5)[0] == 0
    (_, first), seed = read('log.jsonl'), read('log.jsonl')[0][0]['seed']
    with open('log.jsonl', 'a') as log:
        log.write('{"type": "run", "ru')
    code, out, err = main(airbench94, '--runs', 3)
    assert code == 0 and 'n 3' in out and 'torn' in err
    headers, runs = read('log.jsonl')
    assert (
        len(headers) == 1
        and runs[0] == first[0]
        and [run['seed'] for run in runs] == [seed, seed + 1, seed + 2]
    )
    code, out, _ = main(airbench94, '--runs', 3)
    assert code == 0 and 'n 3' in out and read('log.jsonl') == (headers, runs)


def test_a_log_is_continued_with_its_dtype(main, monkeypatch):
    monkeypatch.setattr(airbench94, 'default_dtype', lambda device: torch.bfloat16)
    assert main(airbench94, '--dtype', 'float32', '--seed', 1)[0] == 0
    code, out, err = main(airbench94, '--runs', 2)
    assert code == 0 and 'float32 on' in out and 'bfloat16' not in out, err
    headers, runs = read('log.jsonl')
    assert len(headers) == 1 and len(runs) == 2
    assert main(airbench94, '--log', 'same.jsonl', '--dtype', 'float32', '--seed', 2)[0] == 0
    assert read('same.jsonl')[1][0]['train_loss'] == runs[1]['train_loss']


def test_a_log_of_a_dtype_that_is_too_slow_here(main):
    assert main(airbench94, '--dtype', 'float32')[0] == 0
    Path('log.jsonl').write_text(
        Path('log.jsonl').read_text().replace('"dtype": "float32"', '"dtype": "float16"')
    )
    code, out, err = main(airbench94, '--runs', 2)
    assert code == 2 and out == '' and 'float16 is missing or far too slow' in err


def test_numbers_of_another_kind_are_as_good(main):
    code, _, err = main(airbench94, '--tta_level', 2.0, '--altflip', 0)
    assert code == 0 and len(read('log.jsonl')[1]) == 1, err


@pytest.mark.parametrize(
    'key, arguments',
    [
        ('epochs', ('--epochs', 2)),
        ('lr', ('--lr', 10)),
        ('widths', ('--widths', '(8, 8, 16)')),
        ('dtype', ('--dtype', 'bfloat16')),
        ('lookahead_every', ('--lookahead_every', 4)),
        ('script', ()),
        ('data', ()),
    ],
)
def test_a_log_of_something_else_is_refused(main, one_batch, tmp_path, monkeypatch, key, arguments):
    start = ('--dtype', 'float32', '--seed', 1)
    assert main(airbench94, *start)[0] == 0
    before = Path('log.jsonl').read_text()
    if key == 'script':
        monkeypatch.setattr(airbench94, '__file__', airbench96.__file__)
    if key == 'data':
        arguments = ('--data', shutil.copytree(one_batch, tmp_path / 'other'))
        write_split(tmp_path / 'other' / 'test.pt', 96, seed=5)
    code, out, err = main(airbench94, *start, *arguments)
    assert code == 2 and out == '' and f'another {key}' in err
    assert Path('log.jsonl').read_text() == before
    assert len(err) < 160  # not the data's hashes


def test_a_log_older_than_a_hyperparameter_is_continued(main):
    """It had the value that hyp has now, and no other."""
    assert main(airbench94)[0] == 0
    header, *runs = map(json.loads, Path('log.jsonl').read_text().splitlines())
    del header['hyperparameters']['lr_peak']
    Path('log.jsonl').write_text('\n'.join(map(json.dumps, (header, *runs))) + '\n')
    code, _, err = main(airbench94, '--runs', 2, '--lr_peak', 0.3)
    assert code == 2 and 'another lr_peak, 0.23, not 0.3' in err
    assert main(airbench94, '--runs', 2)[0] == 0 and len(read('log.jsonl')[1]) == 2


def test_a_log_with_a_hyperparameter_that_is_no_more_is_refused(main):
    assert main(airbench94)[0] == 0
    header, run = map(json.loads, Path('log.jsonl').read_text().splitlines())
    header['hyperparameters']['crops'] = 1
    Path('log.jsonl').write_text('\n'.join(map(json.dumps, (header, run))) + '\n')
    code, out, err = main(airbench94, '--runs', 2)
    assert code == 2 and out == '' and 'another crops, 1, not None' in err


def test_a_log_on_a_disk_without_locks(main, monkeypatch):
    def lock(file):
        raise OSError(errno.ENOTSUP, 'no locks')

    monkeypatch.setattr(airbench94, 'lock', lock)
    code, _, err = main(airbench94)
    assert (code, err) == (0, '') and len(read('log.jsonl')[1]) == 1


def test_an_empty_log_is_begun(main):
    """As a process leaves it that was killed before it wrote the header."""
    Path('log.jsonl').touch()
    code, _, err = main(airbench94)
    assert (code, err) == (0, '') and len(read('log.jsonl')[1]) == 1


def test_other_seeds_are_added_to_a_log(main):
    assert main(airbench94, '--seed', 3, '--runs', 2)[0] == 0
    code, out, _ = main(airbench94, '--seed', 4, '--runs', 2)
    assert code == 0 and [run['seed'] for run in read('log.jsonl')[1]] == [3, 4, 5]
    assert 'seed 5' in out and 'seed 4' not in out and 'n 3' in out


def test_each_rerun_says_that_the_log_has_runs_of_another_source(main, monkeypatch):
    """Not only the first one. Only one header is added. A log without runs has none of another."""
    code, _, err = main(airbench94)
    assert (code, err) == (0, '')
    read_text = Path.read_text
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'read_text', lambda *args, **kw: read_text(*args, **kw) + '#')
        for _ in range(2):
            code, out, err = main(airbench94)
            assert code == 0 and 'seed 0' not in out and len(err.splitlines()) == 1
            assert 'log.jsonl has runs of another version of the script. The means' in err
            assert 'With runs of another version of the script: 1 runs, 0 diverged' in out
        Path('begun.jsonl').write_text(Path('log.jsonl').read_text().splitlines()[0] + '\n')
        for runs in (1, 1, 2):
            code, out, err = main(airbench94, '--log', 'begun.jsonl', '--runs', runs)
            assert (code, err) == (0, '') and 'With runs' not in out
    assert [len(records) for records in read('log.jsonl')] == [2, 1]
    # Back to the first source. Of the second no run has ended.
    for runs in (1, 2):
        code, out, err = main(airbench94, '--runs', runs)
        assert (code, err) == (0, '') and 'With runs' not in out
    assert [len(records) for records in read('log.jsonl')] == [3, 2]


@pytest.mark.parametrize(
    'module, name, other, key, value, what',
    [
        (torch, '__version__', '99.0', 'torch', '99.0', 'PyTorch'),
        (airbench94, 'device_name', lambda device: 'abacus', 'device', 'abacus', 'device'),
        (torch, 'get_num_threads', lambda: 99, 'threads', 99, 'number of threads'),
    ],
    ids=['torch', 'device', 'threads'],
)
def test_another_torch_or_machine_is_another_header(
    main, monkeypatch, module, name, other, key, value, what
):
    assert main(airbench94)[0] == 0
    monkeypatch.setattr(module, name, other)
    code, out, err = main(airbench94, '--runs', 2)
    assert code == 0 and f'log.jsonl has runs of another {what}. The means' in err
    assert f'With runs of another {what}: 2 runs, 0 diverged' in out
    headers, runs = read('log.jsonl')
    assert [header[key] == value for header in headers] == [False, True] and len(runs) == 2
    assert headers[0]['seed'] == headers[1]['seed']


@pytest.mark.parametrize('text', ['notes\n', '[1]\n', '{"type": "run", "run": 0}\n', 'half a li'])
def test_a_file_that_is_no_log_is_left_alone(main, text):
    Path('notes').write_text(text)
    code, _, err = main(airbench94, '--log', 'notes')
    assert code == 2 and 'not a log' in err and Path('notes').read_text() == text


def test_a_disk_that_fills_up_later(main, capsys):
    resource = pytest.importorskip('resource')
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert main(airbench94, '--runs', 1)[0] == 0
    text = Path('log.jsonl').read_bytes()
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (len(text) + len(text.splitlines()[-1]) * 3 // 2, limit[1])
    )
    try:
        with pytest.raises(OSError, match='File too large'):
            main(airbench94, '--runs', 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert 'n 2' in capsys.readouterr().out  # what is logged
    *lines, torn = Path('log.jsonl').read_text().split('\n')
    assert [json.loads(line)['seed'] for line in lines] == [0, 0, 1] and torn
    code, out, err = main(airbench94, '--runs', 4)
    assert code == 0 and 'n 4' in out and 'torn' in err
    assert Path('log.jsonl').read_text().splitlines()[:3] == lines
    assert [run['seed'] for run in read('log.jsonl')[1]] == [0, 1, 2, 3]


def test_divergence_is_counted_and_never_averaged(main, monkeypatch):
    real_train = airbench94.train

    def train(*args, seed, **options):
        return real_train(
            *args, seed=seed, **options | (dict(scaling_factor=1e90) if seed in bad else {})
        )

    monkeypatch.setattr(airbench94, 'train', train)
    start = ('--epochs', 2, '--runs', 3, '--seed', 0)
    bad = {1}
    code, out, err = main(airbench94, *start)
    assert (
        code == 0
        and 'n 2' in out
        and '3 runs, 1 diverged' in out
        and 'seed 1: ' in err
        and 'diverged' in err
    )
    runs = read('log.jsonl')[1]
    assert [run['diverged'] for run in runs] == [False, True, False]
    assert (
        'NaN'
        not in Path('log.jsonl')
        .read_text()
        .replace(SCRIPT.read_text(), '')
        .split('"type": "run"', 1)[1]
    )
    assert len(runs[1]['val_acc']) == 1 and runs[1]['tta_val_acc'] is None
    bad = {0, 1, 2}
    code, out, _ = main(airbench94, *start, '--log', 'all.jsonl')
    assert code == 0 and '3 runs, 3 diverged' in out and 'mean' not in out


# Signals ------------------------------------------------------------------------------------------


@pytest.fixture
def start():
    """Starts a process that does not outlive the test."""
    started = []

    def start(words, **options):
        options = dict(env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) | options
        started.append(subprocess.Popen(words, **options))
        return started[-1]

    yield start
    for process in started:
        process.terminate()  # so that torchrun ends its processes
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_runs(log, n, process):
    for _ in range(1000):
        if log.exists() and log.read_text().count('"type": "run"') >= n:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError('no run ended')


def test_a_signal_ends_with_a_summary(one_batch, tmp_path, start):
    log = tmp_path / 'log.jsonl'
    words = command('--data', one_batch, '--runs', 500, '--log', log)
    process = start(words, stderr=subprocess.PIPE)
    wait_for_runs(log, 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ''
    assert out.splitlines()[-3].endswith(f'   n {len(read(log)[1])}')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signals_in_the_second_run(main, monkeypatch, number):
    real_run_once = airbench94.run_once

    def run_once(train_loader, test_loader, seed, dtype, h):
        if seed == 1:
            os.kill(os.getpid(), number)
        return real_run_once(train_loader, test_loader, seed, dtype, h)

    monkeypatch.setattr(airbench94, 'run_once', run_once)
    code, out, err = main(airbench94, '--runs', 3)
    assert code == 130 and err == '' and out.splitlines()[-4] == '1 runs, 0 diverged'
    assert [run['seed'] for run in read('log.jsonl')[1]] == [0]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signals_before_the_first_run(main, monkeypatch, number):
    monkeypatch.setattr(airbench94, 'load_split', lambda *args: os.kill(os.getpid(), number))
    try:
        assert main(airbench94, '--log', 'log.jsonl') == (130, '', '')
    except KeyboardInterrupt:
        pytest.fail('not caught')
    assert not Path('log.jsonl').exists()


def test_kill_9_loses_the_unfinished_run_alone(main, one_batch, tmp_path, start):
    log = tmp_path / 'log.jsonl'
    words = command('--data', one_batch, '--log', log, '--seed', 3, '--runs', 500)
    process = start(words)
    wait_for_runs(log, 1, process)
    process.kill()
    process.communicate()
    finished = len(read(log)[1])
    code, out, _ = main(airbench94, '--runs', finished + 1)
    assert code == 0 and f'n {finished + 1}' in out
    assert [run['seed'] for run in read(log)[1]] == list(range(3, 3 + finished + 1))


def rank_processes(marker):
    found = {}
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            words = (folder / 'cmdline').read_text(errors='replace').split('\0')
            variables = (folder / 'environ').read_text(errors='replace').split('\0')
        except OSError:
            continue
        ranks = [int(variable[5:]) for variable in variables if variable.startswith('RANK=')]
        if str(marker) in words and ranks and 'torch.distributed.run' not in words:
            found[ranks[0]] = int(folder.name)
    return found


@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='needs /proc to find the ranks')
def test_two_ranks_one_of_them_killed(main, one_batch, tmp_path, monkeypatch, start):
    log = tmp_path / 'log.jsonl'
    logs = [tmp_path / f'log.rank{rank}.jsonl' for rank in (0, 1)]
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    torchrun += ['--nproc-per-node', '2', '--']
    words = command('--data', one_batch, '--seed', 3, '--runs', 1000, '--log', log)[1:]
    environment = ENVIRONMENT.copy()
    del environment['OMP_NUM_THREADS']  # so that the two share the cores
    process = start([*torchrun, *words], env=environment, stderr=subprocess.PIPE)
    for path in logs:
        wait_for_runs(path, 1, process)
    os.kill(rank_processes(log)[1], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    # Only rank 0 prints.
    assert re.search(r'^seed \d*[13579]$', out, re.M)
    assert not re.search(r'^seed \d*[02468]$', out, re.M) and out.count('airbench94:') == 1
    finished = [read(path)[1] for path in logs]
    threads = [header['threads'] for path in logs for header in read(path)[0]]
    assert threads == 2 * [max(1, os.cpu_count() // 2)]  # they share the cores

    total = 2 * max(map(len, finished)) + 2
    monkeypatch.setenv('WORLD_SIZE', '2')
    for rank in (0, 1):
        monkeypatch.setenv('RANK', str(rank))
        code, out, err = main(airbench94, '--runs', total)
        assert code == 0, err
        # Of another number of threads too, if that is not the number of this process.
        note = '(With runs of another number of threads: )?'
        summary = f'of rank 0, of 2 ranks:\n{note}{total // 2} runs, 0 diverged\n'
        assert (out == '') == (rank == 1) and len(re.findall(summary, out)) == 1 - rank
    runs = [read(path)[1] for path in logs]
    assert [[run['seed'] for run in of_rank] for of_rank in runs] == [
        list(range(3, 3 + total, 2)),
        list(range(4, 3 + total, 2)),
    ]
    assert [of_rank[: len(old)] for of_rank, old in zip(runs, finished, strict=True)] == finished
