"""The scripts as commands: output, logs, exit codes, and what happens when things go wrong."""

import functools
import hashlib
import http.server
import json
import math
import os
import pickle
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_split

import airbench94
from airbench94 import load_split

SCRIPT = ROOT / 'airbench94.py'
# No test may reach a network: this proxy refuses.
ENVIRONMENT = {**os.environ, 'http_proxy': 'http://127.0.0.1:9', 'https_proxy': 'http://127.0.0.1:9',
               'PYTHONUNBUFFERED': '1'}
ENVIRONMENT.pop('AIRBENCH_DATA', None)


def command(*arguments):
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def airbench(*arguments, cwd=None):
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=200)


def read(log):
    records = [json.loads(line) for line in Path(log).read_text().splitlines()]
    return [r for r in records if r['type'] == 'header'], [r for r in records if r['type'] == 'run']


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """The command line in this process: a function that returns the exit code, stdout and stderr."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(airbench94, 'set_up_process', lambda device: None)

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['airbench94', *map(str, arguments)])
        try:
            code = airbench94.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    yield run
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture
def quick(monkeypatch):
    """Trainings of small networks in float32, which are over at once."""
    real_train = airbench94.train
    monkeypatch.setattr(airbench94, 'train', lambda *args, **options: real_train(
        *args, **{**options, 'widths': (8, 8, 8)}))


@pytest.fixture(scope='module')
def series(tiny, tmp_path_factory):
    """A finished series of two runs: its log and its output."""
    log = tmp_path_factory.mktemp('series') / 'series.jsonl'
    done = airbench('--data', tiny, '--runs', 2, '--epochs', 2, '--seed', 7, '--log', log)
    assert done.returncode == 0, done.stderr
    return log, done


def test_table_and_summary(series):
    log, done = series
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in done.stdout.splitlines() if '|' in line]
    assert rows[0] == list(airbench94.COLUMNS)
    assert [row[:2] for row in rows[1:]] == [[str(run), epoch] for run in (0, 1) for epoch in ('1', '2', 'eval')]
    assert done.stderr == ''
    accuracies = [run['tta_val_acc'] for run in read(log)[1]]
    assert [f'{accuracy:.4f}' for accuracy in accuracies] == [row[5] for row in rows if row[1] == 'eval']
    deviation = statistics.stdev(accuracies)
    expected = (f'mean {statistics.fmean(accuracies):.4f}   std {deviation:.4f}   '
                f'stderr {deviation / math.sqrt(2):.4f}   n 2')
    assert expected in done.stdout


def test_log(series, tiny):
    headers, runs = read(series[0])
    header, = headers
    assert header['script'] == 'airbench94' and header['source'] == SCRIPT.read_text()
    assert header['hyperparameters'] == {**json.loads(json.dumps(airbench94.hyp)), 'epochs': 2}
    assert header['seed'] == 7 and header['torch'] == torch.__version__ and header['threads'] >= 1
    assert header['dtype'] in ('bfloat16', 'float32') and header['device'] and not header['synthetic']
    data = load_split(tiny, train=False)
    for key in ('images', 'labels'):
        assert header['data']['test'][key] == hashlib.sha256(data[key].numpy().tobytes()).hexdigest()
    for i, run in enumerate(runs):
        assert run['run'] == i and run['seed'] == 7 + i and run['diverged'] is False
        assert all(len(run[key]) == 2 for key in ('train_loss', 'train_acc', 'val_acc'))
        assert run['seconds'] == run['time_seconds'][-1] > run['time_seconds'][0]
        assert run['pflops'] == airbench94.count_pflops(2, 1024, 96, 2)


def test_a_run_is_the_same_alone_in_a_series_and_under_torchrun(series, tiny, tmp_path):
    alone = tmp_path / 'alone.jsonl'
    done = airbench('--data', tiny, '--runs', 1, '--epochs', 2, '--seed', 8, '--log', alone)
    assert done.returncode == 0 and 'std' not in done.stdout and 'nan' not in done.stdout and done.stderr == ''
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '1', '--',
                           *command('--data', tiny, '--epochs', 2, '--seed', 8, '--log', tmp_path / 'rank.jsonl')[1:]],
                          capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
    assert done.returncode == 0, done.stderr
    runs = [read(series[0])[1][1], read(alone)[1][0], read(tmp_path / 'rank.rank0.jsonl')[1][0]]
    for key in ('train_loss', 'train_acc', 'val_acc', 'tta_val_acc', 'seed'):
        assert runs[0][key] == runs[1][key] == runs[2][key], key


def test_default_log_and_data_from_the_environment(tiny, main, quick, monkeypatch, tmp_path):
    monkeypatch.setenv('AIRBENCH_DATA', str(tiny))
    code, out, _ = main('--epochs', 1)
    log, = (tmp_path / 'logs').iterdir()
    assert code == 0 and re.fullmatch(r'airbench94-\d{8}-\d{6}-\w{6}\.jsonl', log.name) and log.name in out
    header = read(log)[0][0]
    assert main('--epochs', 1, '--seed', header['seed'], '--log', tmp_path / 'again.jsonl')[0] == 0
    assert read(tmp_path / 'again.jsonl')[1][0]['train_loss'] == read(log)[1][0]['train_loss']


def test_help_explains_each_option_with_its_default(main):
    code, out, _ = main('--help')
    assert code == 0
    for option in ('--runs', '--epochs', '--seed', '--data', '--device', '--dtype', '--log'):
        assert re.search(rf'  {option} .*?\(?default', out, re.DOTALL), option


def test_synthetic_data_is_said_everywhere(main, quick, monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(airbench94, 'synthetic_split', lambda train: load_split(tiny, train))
    _, out, _ = main('--data', 'synthetic', '--epochs', 1, '--log', tmp_path / 'log.jsonl')
    table, summary = (line for line in out.splitlines() if 'SYNTHETIC' in line)
    assert 'tta_val_acc' in table and '1 runs' in summary and read('log.jsonl')[0][0]['synthetic'] is True


# What makes no sense ------------------------------------------------------------------------------


@pytest.mark.parametrize('arguments, word', [
    (('--runs', 0), 'runs'), (('--epochs', -1), 'epochs'), (('--epochs', 'nan'), 'epochs'), (('--seed', -1), 'seed'),
    (('--device', 'gpu'), 'gpu'), (('--device', 'meta'), 'meta'), (('--dtype', 'float64'), 'float64'),
    (('--dtype', 'float16', '--device', 'cpu'), 'float16'), (('--data', 'nowhere'), 'nowhere'),
    (('--runs', 'many'), 'many'), (('--log', '/proc/nowhere/log.jsonl'), '/proc/nowhere'), (('--log', '/dev/full'), ''),
])
def test_bad_arguments(main, tiny, tmp_path, monkeypatch, arguments, word):
    monkeypatch.setenv('AIRBENCH_DATA', str(tiny))
    for name in ('http_proxy', 'https_proxy'):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    code, out, err = main(*arguments)
    assert code == 2 and 'error:' in err.splitlines()[-1] and word in err.splitlines()[-1]
    assert out == '' and 'Traceback' not in err and list(tmp_path.iterdir()) == []


def test_no_cuda_here(main, tiny):
    if torch.cuda.is_available():
        pytest.skip('there is a CUDA device')
    code, _, err = main('--data', tiny, '--device', 'cuda')
    assert code == 2 and '--device cuda' in err.splitlines()[-1]


def test_a_batch_larger_than_the_data(main, tmp_path):
    write_split(tmp_path / 'train.pt', 1000, seed=0)
    write_split(tmp_path / 'test.pt', 10, seed=0)
    code, out, err = main('--data', tmp_path, '--log', 'log.jsonl')
    assert code == 2 and '1024' in err and '1000 images' in err and not Path('log.jsonl').exists()


def test_missing_data_names_the_three_ways_on(tmp_path):
    done = airbench(cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == '' and len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in ('train.pt', '--data DIR', '--data synthetic'))
    assert list(tmp_path.iterdir()) == []


# The data's files ---------------------------------------------------------------------------------


class Intruder:
    def __reduce__(self):
        return os.system, ('touch INTRUDED',)


@pytest.mark.parametrize('damage', [
    lambda file: file.write_bytes(file.read_bytes()[:5000]),
    lambda file: file.write_bytes(b''),
    lambda file: file.write_text('label,image\n'),
    lambda file: torch.save(Intruder(), file),
    lambda file: file.write_bytes(pickle.dumps(Intruder())),
], ids=['truncated', 'empty', 'text', 'code', 'pickle'])
def test_damaged_files(main, tiny, tmp_path, damage):
    folder = shutil.copytree(tiny, tmp_path / 'data')
    damage(folder / 'train.pt')
    code, out, err = main('--data', folder, '--log', 'log.jsonl')
    assert code == 2 and len(err.splitlines()) == 1 and str(folder / 'train.pt') in err and 'delete it' in err
    assert out == '' and not Path('INTRUDED').exists() and not Path('log.jsonl').exists()


@pytest.mark.parametrize('change, words', [
    (dict(images=torch.zeros(5, 3, 32, 32, dtype=torch.uint8)), 'images (5, 3, 32, 32)'),
    (dict(images=torch.zeros(5, 32, 32, 3)), 'images float32'),
    (dict(images=torch.zeros(0, 32, 32, 3, dtype=torch.uint8)), 'images (0, 32, 32, 3)'),
    (dict(labels=torch.zeros(5)), 'labels float32'),
    (dict(labels=torch.zeros(4, dtype=torch.int64)), '4 labels 5 images'),
    (dict(labels=torch.tensor([0, 1, 2, 3, 10])), 'labels 10'),
    (dict(labels=torch.tensor([0, 1, 2, 3, -1])), 'labels -1'),
    (dict(classes='ten'), 'classes'),
    (dict(images=None), 'images NoneType'),
])
def test_wrong_contents(tmp_path, change, words):
    data = dict(images=torch.zeros(5, 32, 32, 3, dtype=torch.uint8), labels=torch.arange(5), classes=['x'] * 10)
    torch.save(data, tmp_path / 'train.pt')
    load_split(tmp_path, train=True)
    torch.save(data | change, tmp_path / 'train.pt')
    with pytest.raises(ValueError) as error:
        load_split(tmp_path, train=True)
    assert all(word in str(error.value) for word in (str(tmp_path / 'train.pt'), *re.findall(r'\(.*\)|\S+', words)))


def test_a_list_is_no_data(tmp_path):
    torch.save([1, 2], tmp_path / 'train.pt')
    with pytest.raises(ValueError, match='images'):
        load_split(tmp_path, train=True)


# A small archive in the format of CIFAR-10's, and torchvision told to take it for CIFAR-10.
ARCHIVE = '''
import hashlib, pickle, sys, tarfile
from pathlib import Path
import numpy
from torchvision.datasets import CIFAR10

def use_small_archive(source):
    source = Path(source)
    folder = source / CIFAR10.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = numpy.random.default_rng(0)
    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()
    def batch(n):
        return dict(data=generator.integers(0, 256, (n, 3072), dtype=numpy.uint8), labels=list(range(10)) * (n // 10))
    CIFAR10.train_list = [['data_batch_1', write('data_batch_1', batch(30))]]
    CIFAR10.test_list = [['test_batch', write('test_batch', batch(20))]]
    CIFAR10.meta = dict(filename='batches.meta', key='label_names',
                        md5=write('batches.meta', dict(label_names=[str(i) for i in range(10)])))
    with tarfile.open(source / CIFAR10.filename, 'w:gz') as archive:
        archive.add(folder, CIFAR10.base_folder)
    CIFAR10.tgz_md5 = hashlib.md5((source / CIFAR10.filename).read_bytes()).hexdigest()
'''


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
    """The small archive's folder, served as CIFAR-10; torchvision's settings are restored afterwards."""
    from torchvision.datasets import CIFAR10
    for name in ('train_list', 'test_list', 'meta', 'tgz_md5', 'url'):
        monkeypatch.setattr(CIFAR10, name, getattr(CIFAR10, name))
    scope = {}
    exec(ARCHIVE, scope)
    scope['use_small_archive'](tmp_path / 'source')
    CIFAR10.url = f'{server}/source/{CIFAR10.filename}'
    airbench94.fetch_cifar10.cache_clear()
    yield tmp_path / 'source'
    airbench94.fetch_cifar10.cache_clear()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_download_is_cached(archive, tmp_path):
    data = load_split(tmp_path / 'new', train=True)
    assert data['images'].shape == (30, 32, 32, 3) and data['labels'].tolist() == list(range(10)) * 3
    assert names(tmp_path / 'new') == ['test.pt', 'train.pt']
    airbench94.fetch_cifar10.cache_clear()
    shutil.rmtree(archive)
    again = load_split(tmp_path / 'new', train=True)
    assert all(torch.equal(again[key], data[key]) for key in ('images', 'labels'))
    assert len(load_split(tmp_path / 'new', train=False)['images']) == 20


@pytest.mark.parametrize('break_it', [
    lambda file: file.write_bytes(file.read_bytes()[:1000]),
    lambda file: file.write_bytes(file.read_bytes()[:-8] + b'12345678'),
    lambda file: file.unlink(),
], ids=['halfway', 'checksum', 'missing'])
def test_broken_download_leaves_nothing(archive, tmp_path, break_it):
    file = archive / 'cifar-10-python.tar.gz'
    whole = file.read_bytes()
    break_it(file)
    with pytest.raises(FileNotFoundError, match='cannot be downloaded'):
        load_split(tmp_path / 'new', train=True)
    assert not (tmp_path / 'new').exists()
    file.write_bytes(whole)
    assert len(load_split(tmp_path / 'new', train=True)['images']) == 30


def test_extracted_files_are_read_where_they_are(archive, tmp_path):
    (archive / 'cifar-10-python.tar.gz').unlink()
    assert len(load_split(archive, train=True)['images']) == 30
    assert names(archive) == ['cifar-10-batches-py', 'test.pt', 'train.pt']


def test_an_archive_in_the_folder_is_not_downloaded_again(archive, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10
    monkeypatch.setattr(CIFAR10, 'url', 'http://127.0.0.1:9/none')
    shutil.rmtree(archive / 'cifar-10-batches-py')
    assert len(load_split(archive, train=True)['images']) == 30


def test_read_only_folder(archive, capsys, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError('read-only')
    monkeypatch.setattr(airbench94.tempfile, 'TemporaryDirectory', refuse)  # root may write where others may not
    assert len(load_split(archive, train=True)['images']) == 30
    assert len(load_split(archive, train=False)['images']) == 20
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (archive / 'train.pt').exists()


def test_a_file_that_is_there_is_not_replaced(archive, tiny):
    shutil.copy(tiny / 'train.pt', archive)
    assert len(load_split(archive, train=False)['images']) == 20
    assert len(load_split(archive, train=True)['images']) == 1100


def test_two_processes_on_an_empty_folder(tmp_path, server):
    code = ARCHIVE + f'''
sys.path.insert(0, {str(ROOT)!r})
import airbench94
use_small_archive(Path({str(tmp_path)!r}, sys.argv[1]))
CIFAR10.url = {server!r} + '/' + sys.argv[1] + '/' + CIFAR10.filename
print(len(airbench94.load_split({str(tmp_path / 'new')!r}, True)['images']))
'''
    processes = [subprocess.Popen([sys.executable, '-c', code, f'source{i}'], stdout=subprocess.PIPE)
                 for i in range(2)]
    assert [process.communicate(timeout=100)[0] for process in processes] == [b'30\n', b'30\n']
    assert names(tmp_path / 'new') == ['test.pt', 'train.pt']
    assert len(load_split(tmp_path / 'new', train=False)['images']) == 20


# Logs ---------------------------------------------------------------------------------------------


def test_a_log_is_continued_with_its_seed(main, quick, tiny):
    assert main('--data', tiny, '--epochs', 1, '--runs', 1, '--log', 'log.jsonl')[0] == 0
    (_, first), seed = read('log.jsonl'), read('log.jsonl')[0][0]['seed']
    with open('log.jsonl', 'a') as log:
        log.write('{"type": "run", "ru')
    code, out, err = main('--data', tiny, '--epochs', 1, '--runs', 3, '--log', 'log.jsonl')
    assert code == 0 and 'n 3' in out and 'torn' in err
    headers, runs = read('log.jsonl')
    assert len(headers) == 1 and runs[0] == first[0] and [run['seed'] for run in runs] == [seed, seed + 1, seed + 2]
    code, out, _ = main('--data', tiny, '--epochs', 1, '--runs', 3, '--log', 'log.jsonl')
    assert code == 0 and 'n 3' in out and read('log.jsonl') == (headers, runs)


@pytest.mark.parametrize('key, arguments', [
    ('epochs', ('--epochs', 2)), ('dtype', ('--dtype', 'float32')), ('seed', ('--seed', 2)), ('script', ()),
    ('data', ()),
])
def test_a_log_of_something_else_is_refused(main, quick, tiny, tmp_path, monkeypatch, key, arguments):
    start = ('--data', tiny, '--epochs', 1, '--dtype', 'bfloat16', '--seed', 1, '--log', 'log.jsonl')
    assert main(*start)[0] == 0
    before = Path('log.jsonl').read_text()
    if key == 'script':
        monkeypatch.setattr(airbench94, 'SCRIPT', 'airbench95')
    if key == 'data':
        arguments = ('--data', shutil.copytree(tiny, tmp_path / 'other'))
        write_split(tmp_path / 'other' / 'test.pt', 96, seed=5)
    code, out, err = main(*start, *arguments)
    assert code == 2 and f'another {key}' in err and out == '' and Path('log.jsonl').read_text() == before


def test_another_torch_or_source_is_another_header(main, quick, tiny, monkeypatch):
    start = ('--data', tiny, '--epochs', 1, '--log', 'log.jsonl')
    assert main(*start)[0] == 0
    monkeypatch.setattr(torch, '__version__', '99.0')
    assert main(*start, '--runs', 2)[0] == 0
    headers, runs = read('log.jsonl')
    assert [header['torch'] == '99.0' for header in headers] == [False, True] and len(runs) == 2
    assert headers[0]['seed'] == headers[1]['seed']


@pytest.mark.parametrize('text', ['notes\n', '[1]\n', '{"type": "run", "run": 0}\n', 'half a li'])
def test_a_file_that_is_no_log_is_left_alone(main, tiny, text):
    Path('notes').write_text(text)
    code, _, err = main('--data', tiny, '--log', 'notes')
    assert code == 2 and 'not a log' in err and Path('notes').read_text() == text


def test_a_disk_that_fills_up_later(main, quick, tiny, monkeypatch):
    real_append = airbench94.append_to_log

    def append(log, record):
        if record['type'] == 'run' and record['run'] == 1:
            raise OSError(28, 'No space left on device')
        real_append(log, record)
    monkeypatch.setattr(airbench94, 'append_to_log', append)
    code, out, err = main('--data', tiny, '--epochs', 1, '--runs', 3, '--log', 'log.jsonl')
    assert code == 1 and 'n 3' in out and 'run 1' in err and 'not saved' in err and 'No space' in err
    assert [run['run'] for run in read('log.jsonl')[1]] == [0, 2]


def test_half_a_line_is_taken_back():
    class Log:
        """A file on a disk that takes ten bytes more."""

        def __init__(self, path):
            self.file = open(path, 'ab', buffering=0)
            self.fileno, self.truncate = self.file.fileno, self.file.truncate

        def write(self, line):
            self.file.write(line[:10])
            raise OSError(28, 'No space left on device')

    with tempfile.NamedTemporaryFile() as file:
        file.write(b'a line\n')
        file.flush()
        with pytest.raises(OSError, match='No space'):
            airbench94.append_to_log(Log(file.name), dict(type='run', note='long enough'))
        assert Path(file.name).read_bytes() == b'a line\n'


def test_divergence_is_counted_and_never_averaged(main, tiny, monkeypatch):
    real_train = airbench94.train

    def train(*args, run, **options):
        scaling_factor = math.inf if run in bad else 1 / 9
        return real_train(*args, **options, widths=(8, 8, 8), scaling_factor=scaling_factor, run=run)
    monkeypatch.setattr(airbench94, 'train', train)
    start = ('--data', tiny, '--epochs', 2, '--runs', 3)
    bad = {1}
    code, out, err = main(*start, '--log', 'log.jsonl')
    assert code == 0 and 'n 2' in out and '1 of 3 runs' in out and 'run 1' in err and 'diverged' in err
    runs = read('log.jsonl')[1]
    assert [run['diverged'] for run in runs] == [False, True, False]
    assert 'NaN' not in Path('log.jsonl').read_text().replace(SCRIPT.read_text(), '').split('"type": "run"', 1)[1]
    assert len(runs[1]['val_acc']) == 1 and runs[1]['tta_val_acc'] is None
    bad = {0, 1, 2}
    code, out, _ = main(*start, '--log', 'all.jsonl')
    assert code == 1 and '3 of 3 runs' in out and 'mean' not in out.replace('means', '')


# Signals and pipes --------------------------------------------------------------------------------


def wait_for_runs(log, n, process):
    for _ in range(1000):
        if log.exists() and log.read_text().count('"type": "run"') >= n:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError('no run ended')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_a_summary(tiny, tmp_path, number):
    log = tmp_path / 'log.jsonl'
    process = subprocess.Popen(command('--data', tiny, '--epochs', 1, '--runs', 500, '--log', log), env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_runs(log, 1, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and 'Traceback' not in err
    assert f'n {len(read(log)[1])}' in out.splitlines()[-4]


def test_kill_9_loses_the_unfinished_run_alone(tiny, tmp_path):
    log = tmp_path / 'log.jsonl'
    arguments = ('--data', tiny, '--epochs', 1, '--log', log, '--seed', 3)
    process = subprocess.Popen(command(*arguments, '--runs', 500), env=ENVIRONMENT, stdout=subprocess.PIPE)
    wait_for_runs(log, 1, process)
    process.kill()
    process.communicate()
    finished = len(read(log)[1])
    done = airbench(*arguments, '--runs', finished + 1)
    assert done.returncode == 0 and f'n {finished + 1}' in done.stdout
    assert [run['run'] for run in read(log)[1]] == list(range(finished + 1))


def test_closed_pipe(tiny, tmp_path):
    log = tmp_path / 'log.jsonl'
    line = f'set -o pipefail; "$@" --data {tiny} --epochs 1 --runs 500 --log {log} | head -1'
    done = subprocess.run(['bash', '-c', line, 'bash', *command()], capture_output=True, text=True, env=ENVIRONMENT,
                          timeout=100)
    assert done.returncode == 141 and done.stderr == '' and len(done.stdout.splitlines()) == 1
    read(log)


def rank_processes(marker):
    found = {}
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            words = (folder / 'cmdline').read_text().split('\0')
            variables = (folder / 'environ').read_text().split('\0')
        except OSError:
            continue
        ranks = [int(variable[5:]) for variable in variables if variable.startswith('RANK=')]
        if str(marker) in words and ranks and 'torch.distributed.run' not in words:
            found[ranks[0]] = int(folder.name)
    return found


@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='needs /proc to find the ranks')
def test_two_ranks_one_of_them_killed(tiny, tmp_path):
    log = tmp_path / 'log.jsonl'
    logs = [tmp_path / f'log.rank{rank}.jsonl' for rank in (0, 1)]

    def torchrun(runs):
        return subprocess.Popen(
            [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--',
             *command('--data', tiny, '--epochs', 1, '--seed', 3, '--runs', runs, '--log', log)[1:]],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process = torchrun(runs=1000)
    for path in logs:
        wait_for_runs(path, 1, process)
    os.kill(rank_processes(log)[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    finished = [read(path)[1] for path in logs]
    total = 2 * max(map(len, finished)) + 2
    process = torchrun(runs=total)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert out.count('train_loss') == 1  # only rank 0 prints
    runs = [read(path)[1] for path in logs]
    assert [[run['run'] for run in of_rank] for of_rank in runs] == [list(range(0, total, 2)), list(range(1, total, 2))]
    assert all(run['seed'] == 3 + run['run'] for of_rank in runs for run in of_rank)
    assert [of_rank[:len(old)] for of_rank, old in zip(runs, finished, strict=True)] == finished
