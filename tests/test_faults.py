"""What users did, and what was lost or silently wrong then: networks, logs, data, threads."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EACH_TRAIN, FLAGS, ROOT, small, write_split
from test_cli import Intruder
from test_summarize import summarize

import airbench
import airbench94
import airbench94_compiled
import airbench94_muon
from airbench94 import CifarLoader, train

SMALL = dict(widths=(8, 8, 8), dtype=torch.float32, verbose=False)


def logged_seeds():
    lines = Path('log.jsonl').read_text().splitlines()
    return [record['seed'] for record in map(json.loads, lines) if record['type'] == 'run']


# Saved networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize('when', ['before the file is there', 'before the run is logged'])
def test_what_stops_between_saving_and_logging_loses_nothing(main, monkeypatch, when):
    """Here SIGTERM. The same command makes up for it, and no torn file has the network's name."""
    with monkeypatch.context() as patch:
        if when == 'before the file is there':
            patch.setattr(torch, 'save', lambda data, file: file.write_text('half') and 1 / 0)
        else:
            stop = os.getpid(), signal.SIGTERM
            patch.setattr(airbench94, 'save_net', lambda *args: os.kill(*stop))
        try:
            code = main(airbench94, '--save', 'nets')[0]
        except ZeroDivisionError:
            code = 130
        assert code == 130 and logged_seeds() == []
        assert not Path('nets/airbench94-seed0.pt').exists()
    assert main(airbench94, '--save', 'nets')[0] == 0 and logged_seeds() == [0]
    assert airbench.load_net('nets/airbench94-seed0.pt').classes == list('0123456789')


def test_a_network_whose_run_was_not_logged_is_made_again(main):
    assert main(airbench94, '--save', 'nets')[0] == 0
    os.unlink('log.jsonl')
    assert main(airbench94, '--save', 'nets')[0] == 0 and logged_seeds() == [0]


def test_a_network_of_the_same_recipe_in_other_words_is_accepted(main, monkeypatch):
    """A list for a tuple, and from before a hyperparameter was added, as for logs."""
    assert main(airbench94, '--save', 'nets', '--widths', '(8, 8, 8)')[0] == 0
    before = Path('nets/airbench94-seed0.pt').read_bytes()
    monkeypatch.setitem(airbench94.hyp, 'newer', 1)
    assert main(airbench94, '--runs', 2, '--save', 'nets', '--widths', '[8, 8, 8]')[0] == 0
    assert logged_seeds() == [0, 1] and Path('nets/airbench94-seed0.pt').read_bytes() == before


def test_a_logged_run_without_its_network_is_said(main):
    assert main(airbench94, '--runs', 2)[0] == 0
    code, _, err = main(airbench94, '--runs', 3, '--save', 'nets')
    assert code == 0 and len(err.splitlines()) == 1 and 'another --log' in err
    assert 'nets lacks the networks of 2 logged runs, of seed 0 for example' in err
    assert os.listdir('nets') == ['airbench94-seed2.pt'] and logged_seeds() == [0, 1, 2]


@pytest.mark.parametrize('change', ['recipe', 'data', 'seed', 'text', 'code'])
def test_another_file_is_not_overwritten(main, change, tmp_path):
    file = Path('nets/airbench94-seed1.pt')
    if change == 'recipe':
        assert main(airbench94, '--seed', 1, '--save', 'nets', '--lr', 10)[0] == 0
    elif change == 'data':
        for name, n in (('train', 110), ('test', 96)):
            write_split(tmp_path / f'{name}.pt', n, seed=2)
        assert main(airbench94, '--seed', 1, '--save', 'nets', '--data', tmp_path)[0] == 0
    elif change == 'seed':
        assert main(airbench94, '--seed', 0, '--save', 'nets')[0] == 0
        Path('nets/airbench94-seed0.pt').rename(file)
    elif change == 'code':
        file.parent.mkdir()
        torch.save(Intruder(), file)
    else:
        file.parent.mkdir()
        file.write_text('notes')
    Path('log.jsonl').unlink(missing_ok=True)
    before = file.read_bytes()
    code, out, err = main(airbench94, '--seed', 1, '--save', 'nets')
    assert code == 2 and out == '' and f'{file} is not a network of this recipe' in err
    assert '--save' in err and len(err.splitlines()) == 1 and file.read_bytes() == before
    assert not Path('log.jsonl').exists() and not Path('INTRUDED').exists()


def test_a_log_that_is_refused_is_all_that_is_said(main):
    """Not also that the networks of its runs are missing."""
    assert main(airbench94)[0] == 0
    before = Path('log.jsonl').read_bytes()
    code, out, err = main(airbench94, '--lr', 10, '--save', 'nets')
    assert code == 2 and out == '' and len(err.splitlines()) == 1 and 'another lr' in err
    assert Path('log.jsonl').read_bytes() == before


def test_save_wants_a_folder(main):
    Path('net').write_text('')
    code, out, err = main(airbench94, '--save', 'net')
    assert code == 2 and out == '' and 'net is a file: name a folder with --save' in err
    assert not Path('log.jsonl').exists()


def test_a_network_of_a_copied_script(main, monkeypatch, tmp_path):
    """The script has another name, and another network."""
    source = (ROOT / 'airbench94.py').read_text().replace('F.gelu(self.norm2(x))', 'self.norm2(x)')
    (tmp_path / 'my94.py').write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import my94

    assert main(my94, '--save', 'nets')[0] == 0
    file = 'nets/my94-seed0.pt'
    with pytest.raises(ValueError, match=r'load_net\(file, script=my94\)'):
        airbench.load_net(file)
    for script in (my94, 'my94'):
        assert type(airbench.load_net(file, script=script)) is my94.Net
    with pytest.raises(ValueError, match='dtype must be float32, float16 or bfloat16, not fp16'):
        airbench.load_net(file, script=my94, dtype='fp16')
    with pytest.raises(ValueError, match='does not fit the network of airbench94_muon.py'):
        airbench.load_net(file, script=airbench94_muon)


def test_a_network_of_an_earlier_script_is_refused(tmp_path):
    """airbench94_muon.py had `crops`, and a pool elsewhere, with the same names of weights."""
    h = airbench94_muon.hyp | dict(widths=(8, 8, 8), crops=((24, 0.4),))
    recipe = dict(script='airbench94_muon', hyperparameters=h, dtype='float32', classes=['x'] * 10)
    airbench94_muon.save_net(airbench94_muon.Net(h), tmp_path / 'net.pt', recipe)
    with pytest.raises(ValueError, match='which knows no crops: load it with the version that'):
        airbench.load_net(tmp_path / 'net.pt')
    only_net = SimpleNamespace(__name__='only_net', Net=airbench94_muon.Net)  # has no hyp
    assert airbench.load_net(tmp_path / 'net.pt', script=only_net).classes == ['x'] * 10


def test_device_and_dtype_of_a_loaded_network(tmp_path):
    h = airbench94.hyp | dict(widths=(8, 8, 8))
    net = airbench94.Net(h, dtype=torch.float16).eval()
    airbench94.init_whitening(net, torch.randn(20, 3, 32, 32))
    recipe = dict(script='airbench94', hyperparameters=h, dtype='float16', classes=['x'] * 10)
    airbench94.save_net(net, tmp_path / 'net.pt', recipe)
    images = torch.randn(4, 3, 32, 32)
    for dtype, expected in ((None, torch.float32), ('float16', torch.float16)):
        loaded = airbench.load_net(tmp_path / 'net.pt', device='cpu', dtype=dtype)
        assert loaded.linear.weight.dtype == expected
        assert loaded.blocks[0].norm1.bias.dtype == torch.float32
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), net(images), rtol=0.01, atol=0.01)
    with pytest.raises((AssertionError, RuntimeError), match='CUDA|NVIDIA'):
        airbench.load_net(tmp_path / 'net.pt', device='cuda')


def test_a_network_on_a_macs_gpu_is_float32(tmp_path, monkeypatch):
    h = airbench94.hyp | dict(widths=(8, 8, 8))
    recipe = dict(script='airbench94', hyperparameters=h, dtype='float16', classes=['x'] * 10)
    airbench94.save_net(airbench94.Net(h), tmp_path / 'net.pt', recipe)
    found = []

    def make_net(h, num_classes, device, dtype):
        found.append((device.type, dtype))
        return airbench94.Net(h, num_classes)

    script = SimpleNamespace(__name__='airbench94', Net=make_net)
    airbench.load_net(tmp_path / 'net.pt', script, device='mps')
    assert found == [('mps', torch.float32)]


def test_a_diverged_run_has_no_network_to_be_missed(main):
    assert main(airbench94, '--scaling_factor', 1e90, '--save', 'nets')[0] == 0
    code, _, err = main(airbench94, '--scaling_factor', 1e90, '--save', 'nets')
    assert code == 0 and err == '' and os.listdir('nets') == []


def test_a_network_for_other_classes_is_refused(one_batch):
    net = airbench94.Net(airbench94.hyp | dict(widths=(8, 8, 8)), num_classes=9)
    with pytest.raises(ValueError, match='net has 9 outputs, and train_loader 10 classes'):
        train(CifarLoader(one_batch, batch_size=50), net=net, epochs=1, **SMALL)
    assert not hasattr(net, 'classes')


def test_a_trained_network_has_its_classes(one_batch):
    assert train(CifarLoader(one_batch, batch_size=50), epochs=1, **SMALL).classes == list(
        '0123456789'
    )


# Logs ---------------------------------------------------------------------------------------------


def test_a_second_process_with_the_same_log_is_refused(main, one_batch):
    command = [sys.executable, ROOT / 'airbench94.py', *FLAGS, '--log', 'log.jsonl']
    command += ['--data', one_batch, '--runs', '500']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        while 'seed 0' not in process.stdout.readline():
            assert process.poll() is None
        code, out, err = main(airbench94, '--runs', 2, '--data', one_batch)
        assert code == 2 and out == '' and len(err.splitlines()) == 1
        assert 'another process writes to the log log.jsonl' in err and '--log' in err
    finally:
        process.kill()
        process.communicate()
    done = len(logged_seeds())
    assert main(airbench94, '--runs', done + 1)[0] == 0 and logged_seeds() == list(range(done + 1))


def test_a_log_that_holds_a_seed_twice_is_refused(main):
    assert main(airbench94)[0] == 0
    lines = Path('log.jsonl').read_text().splitlines()
    Path('log.jsonl').write_text('\n'.join([*lines, lines[-1]]) + '\n')
    code, out, err = main(airbench94, '--runs', 2)
    assert code == 2 and out == '' and 'log.jsonl holds a seed twice' in err


def test_a_last_line_without_its_end_is_a_run(main):
    """As some editors leave it. Only a line that was cut off is dropped."""
    assert main(airbench94, '--runs', 2)[0] == 0
    log = Path('log.jsonl')
    log.write_text(log.read_text().rstrip('\n'))
    assert [run['seed'] for run in summarize.read_logs([log])[1]] == [0, 1]
    code, _, err = main(airbench94, '--runs', 3)
    assert code == 0 and err == '' and logged_seeds() == [0, 1, 2]
    log.write_text(log.read_text()[:-3])
    assert [run['seed'] for run in summarize.read_logs([log])[1]] == [0, 1]
    code, _, err = main(airbench94, '--runs', 3)
    assert code == 0 and 'torn' in err and logged_seeds() == [0, 1, 2]


def test_another_number_of_ranks_goes_on_with_a_series(main, monkeypatch):
    """None repeats a run. A log that another rank has just begun is no hindrance."""
    for world_size, runs in ((2, 4), (3, 6), (1, 7)):
        monkeypatch.setenv('WORLD_SIZE', str(world_size))
        for rank in range(world_size):
            monkeypatch.setenv('RANK', str(rank))
            assert main(airbench94, '--runs', runs)[0] == 0
        Path('log.rank9.jsonl').write_text('{"type": "hea')
    Path('log.rank9.jsonl').unlink()
    logs = sorted(Path().glob('log.rank*.jsonl'))
    seeds = [[run['seed'] for run in summarize.read_logs([log])[1]] for log in logs]
    assert seeds == [[0, 2, 6], [1, 3, 4], [5]]


def test_a_rank_without_a_log_has_the_seeds_of_its_series(main, monkeypatch):
    log = 'log[1].jsonl'  # which a pattern of names would not match
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '1')
    assert main(airbench94, '--seed', 5, log=log)[0] == 0
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert main(airbench94, '--runs', 2, log=log)[0] == 0
    (run,) = summarize.read_logs([Path('log[1].rank1.jsonl')])[1]
    assert run['seed'] == 6


def test_a_network_that_cannot_be_counted_is_not_trained(main, monkeypatch):
    """The compute is counted on the meta device, where there are no values."""
    forward = airbench94.Block.forward

    def scaled(self, x):
        return forward(self, x / x.abs().max().item())

    monkeypatch.setattr(airbench94.Block, 'forward', scaled)
    monkeypatch.setattr(airbench94, 'run_once', lambda *args: pytest.fail('it was trained'))
    with pytest.raises(RuntimeError, match='meta'):
        main(airbench94)


def test_more_ranks_than_gpus(main, monkeypatch):
    """On a CPU they train; on CUDA each needs its own."""
    used = []
    threads = []
    monkeypatch.setattr(torch, 'set_num_threads', threads.append)
    monkeypatch.setattr(os, 'cpu_count', lambda: 7)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', used.append)
    monkeypatch.setenv('LOCAL_RANK', '2')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '3')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')  # as torchrun does
    assert main(airbench94, '--device', 'cpu')[0] == 0 and used == []
    assert threads == [2]  # the processes of a machine share its 7 cores
    monkeypatch.setenv('OMP_NUM_THREADS', '3')  # the user's own number
    assert main(airbench94, '--device', 'cpu:0')[0] == 0 and threads == [2]
    on_cuda = SimpleNamespace(h={}, device=torch.device('cuda'))
    monkeypatch.setattr(airbench94, 'parse_arguments', lambda: on_cuda)
    code, out, err = main(airbench94)
    assert code == 2 and out == '' and 'more processes than the 2 GPUs' in err
    monkeypatch.setenv('LOCAL_RANK', '1')
    with pytest.raises(AttributeError, match='data'):  # it gets further than that
        main(airbench94)
    on_cuda.device = torch.device('cuda:0')
    code, out, err = main(airbench94)
    assert code == 2 and out == '' and 'start all on cuda:0: use --device cuda' in err
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '1')  # of one GPU each on several machines
    with pytest.raises(AttributeError, match='data'):
        main(airbench94)
    assert used == [1, 1, 1]


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision_on_a_macs_gpu_is_refused(main, monkeypatch, dtype):
    def loader(*args, device, **options):
        return CifarLoader(*args, device='cpu', **options)

    h = airbench94.hyp | dict(batch_size=100)
    args = SimpleNamespace(h=h, device=torch.device('mps'), data=None, log=None, dtype=dtype)
    monkeypatch.setattr(airbench94, 'CifarLoader', loader)
    monkeypatch.setattr(airbench94, 'parse_arguments', lambda: args)
    code, out, err = main(airbench94)
    assert code == 2 and out == '' and f'dtype {dtype} is missing or far too slow on mps' in err


def test_the_compute_of_a_diverged_run_is_what_ran(main, monkeypatch):
    assert main(airbench94, '--epochs', 3, '--scaling_factor', 1e90)[0] == 0
    run = json.loads(Path('log.jsonl').read_text().splitlines()[-1])
    assert run['diverged'] and run['steps'] == [1]
    h = airbench94.hyp | dict(widths=(8, 8, 8), batch_size=100)
    assert run['pflops'] == airbench94.count_pflops(h, 1, 0)
    # The images of airbench94_muon.py grow with the schedule, not with what ran of it.
    hyp = airbench94_muon.hyp
    small = airbench94_muon.count_pflops(hyp | dict(sizes=((22, 1.0),)), 10, 0)
    assert airbench94_muon.count_pflops(hyp, 10, 0, total_steps=100) == small
    words = ('--epochs', 3, '--batch_size', 10, '--scaling_factor', 1e90)
    assert main(airbench94_muon, *words, log='muon.jsonl')[0] == 0
    run = json.loads(Path('muon.jsonl').read_text().splitlines()[-1])
    assert run['diverged'] and run['steps'] == [11]
    h = hyp | dict(widths=(8, 8, 8), batch_size=10)
    assert run['pflops'] == airbench94_muon.count_pflops(h, 11, 0, total_steps=33)


# Data ---------------------------------------------------------------------------------------------


def spoil(loader, name, change):
    setattr(loader, name, change(getattr(loader, name)))


@pytest.mark.parametrize('which', ['train_loader', 'test_loader'])
@pytest.mark.parametrize('name, change, message', [
    ('images', lambda images: images[..., :28, :28], r'float \(N, 3, 32, 32\) .*28, 28'),
    ('images', lambda images: images.mul(255), r'0 to 1, as by / 255, not from \d+ to 2\d\d'),
    ('images', lambda images: images - 0.5, 'from 0 to 1, as by / 255, not from -0.5'),
    ('images', lambda images: images * float('nan'), 'from 0 to 1, as by / 255, not from nan'),
    ('images', lambda images: images.mul(255).byte(), 'as by / 255 .* not torch.uint8'),
    ('images', lambda images: images[:90], 'a label for each of the 90 images'),
    ('labels', lambda labels: labels[:90], r'a label for each of the \d+ images, not \(90,\)'),
    ('labels', lambda labels: labels[:, None], 'a label for each of the'),
    ('labels', lambda labels: labels - 1, 'labels must be from 0 to 9'),
    ('labels', lambda labels: labels + 90, 'labels must be from 0 to 9'),
    ('labels', lambda labels: labels.int(), 'labels must be int64, .* not torch.int32'),
    ('images', lambda images: images.numpy(), 'images must be a tensor, .* not ndarray'),
    ('labels', lambda labels: labels.tolist(), 'labels must be a tensor, .* not list'),
    ('batch_size', lambda size: 0, 'no batch of 0'),
    ('batch_size', float, 'batch_size must be a whole number, not 50'),
    ('mean', lambda mean: (0.5, 0.5), 'mean and std must be three numbers each, not .0.5, 0.5.'),
    ('std', lambda std: 0.2, 'mean and std must be three numbers each'),
])  # fmt: skip
def test_data_are_checked_before_training(one_batch, monkeypatch, which, name, change, message):
    monkeypatch.setattr(airbench94, 'Net', None)
    loaders = dict(
        train_loader=CifarLoader(one_batch, batch_size=50),
        test_loader=CifarLoader(one_batch, train=False),
    )
    spoil(loaders[which], name, change)
    with pytest.raises(ValueError, match=message):
        train(**loaders, epochs=1, **SMALL)


@pytest.mark.parametrize('name, change, message', [
    ('mean', lambda mean: 255 * mean, 'mean must be from 0 to 1, .* and std above 0, not .125'),
    ('mean', lambda mean: mean * float('nan'), 'mean must be from 0 to 1, .* not .nan'),
    ('std', lambda std: (0, 0, 0), 'and std above 0, not .* and .0, 0, 0'),
    ('std', lambda std: std * float('nan'), 'and std above 0, not .* and .nan'),
])  # fmt: skip
def test_mean_and_std_are_checked_before_training(one_batch, monkeypatch, name, change, message):
    """Those of train_loader: train uses them for the images of test_loader too."""
    loader = CifarLoader(one_batch, batch_size=50)
    test_loader = CifarLoader(one_batch, train=False)
    spoil(test_loader, name, change)
    train(loader, test_loader, epochs=1, **SMALL)
    monkeypatch.setattr(airbench94, 'Net', None)
    spoil(loader, name, change)
    with pytest.raises(ValueError, match=message):
        train(loader, test_loader, epochs=1, **SMALL)


def test_a_loader_is_checked_with_the_keywords_of_train(one_batch):
    """Its own batch size may be more than it has images."""
    loader = CifarLoader(one_batch, batch_size=100)
    loader.images, loader.labels = loader.images[:60], loader.labels[:60]
    with pytest.raises(ValueError, match='no batch of 100 from 60 images'):
        train(loader, epochs=1, **SMALL)
    train(loader, epochs=1, batch_size=20, **SMALL)


def test_the_default_test_set_is_checked_too(one_batch):
    """After the first classes were left out of the training images alone."""
    loader = CifarLoader(one_batch, batch_size=20)
    mask = loader.labels >= 4
    loader.images, loader.labels = loader.images[mask], loader.labels[mask] - 4
    loader.classes = loader.classes[4:]
    train(loader, epochs=1, **SMALL)
    message = 'test_loader.labels must be from 0 to 5, .*: set labels in both loaders'
    with pytest.raises(ValueError, match=message):
        train(loader, epochs=1, callback=lambda net, row: None, **SMALL)


def test_the_loaders_augmentation_is_its_own(one_batch):
    aug = dict(flip=True)
    loader = CifarLoader(one_batch, batch_size=50, aug=aug)
    loader.aug['translate'] = 2
    assert aug == dict(flip=True)
    for wrong in ('flip', ['flip']):
        with pytest.raises(ValueError, match='aug must be a dict'):
            CifarLoader(one_batch, batch_size=50, aug=wrong)


@pytest.mark.parametrize('dtype', ['fp16', 'float64', torch.float64, 16])
def test_another_dtype_is_refused(one_batch, dtype):
    with pytest.raises(ValueError, match='dtype must be float32, float16 or bfloat16, not'):
        train(CifarLoader(one_batch, batch_size=50), **(SMALL | dict(dtype=dtype)))


def test_a_test_set_of_more_classes_is_refused(main, tmp_path, one_batch):
    shutil.copytree(one_batch, tmp_path / 'data')
    data = torch.load(tmp_path / 'data' / 'train.pt')
    mask = data['labels'] < 9
    less = dict(images=data['images'][mask], labels=data['labels'][mask], classes=list('012345678'))
    torch.save(less, tmp_path / 'data' / 'train.pt')
    code, out, err = main(airbench94, '--data', tmp_path / 'data', '--batch_size', 50)
    assert code == 2 and out == '' and 'test_loader.labels must be from 0 to 8' in err
    assert len(err.splitlines()) == 1 and not Path('log.jsonl').exists()


@pytest.mark.parametrize('loader, name', [('cifar10', 'str'), (['x'], 'list'), (
    torch.utils.data.DataLoader([1]), 'DataLoader')])  # fmt: skip
def test_what_is_no_loader(loader, name, one_batch):
    with pytest.raises(TypeError, match=f'train_loader must be a CifarLoader.*not {name}'):
        train(loader)
    with pytest.raises(TypeError, match=f'test_loader must be a CifarLoader.*not {name}'):
        train(CifarLoader(one_batch, batch_size=50), loader)


def test_what_is_no_network_of_these_scripts(one_batch):
    with pytest.raises(TypeError, match='net must be a Net, not Linear'):
        train(CifarLoader(one_batch, batch_size=50), net=torch.nn.Linear(2, 2))


@pytest.mark.parametrize('module', [airbench94, airbench94_muon], ids=lambda m: m.__name__)
@pytest.mark.parametrize('level', [-1, 3, '2'])
def test_there_are_three_levels_of_test_time_augmentation(module, level, one_batch):
    net = module.Net(module.hyp | dict(widths=(8, 8, 8)))
    with pytest.raises(ValueError, match=f'tta_level must be 0, 1 or 2, not {level!r}'):
        module.evaluate(net, CifarLoader(one_batch, train=False), tta_level=level)


def test_folders_by_a_tilde_and_files_for_folders(main, one_batch, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    shutil.copytree(one_batch, tmp_path / 'data')
    code, out, err = main(
        airbench94, '--data', '~/data', '--save', '~/nets', '--log', '~/other.jsonl'
    )
    assert code == 0 and (tmp_path / 'other.jsonl').exists() and (tmp_path / 'nets').is_dir(), err
    assert not Path('~').exists()
    code, out, err = main(airbench94, '--data', tmp_path / 'data' / 'train.pt')
    assert code == 2 and 'train.pt is a file: name the folder' in err
    (tmp_path / 'data' / 'test.pt').unlink()
    code, out, err = main(airbench94, '--data', tmp_path / 'data')
    assert code == 2 and 'there is no' in err and 'test.pt' in err


def test_flags_and_keywords_of_another_kind_are_as_good(main, one_batch):
    numpy = pytest.importorskip('numpy')
    assert main(airbench94, '--batch-size', 50, '--whiten-bias-epochs', 1)[0] == 0
    header = json.loads(Path('log.jsonl').read_text().splitlines()[0])
    h = header['hyperparameters']
    assert (h['batch_size'], h['whiten_bias_epochs']) == (50, 1)
    options = dict(dtype='float32', epochs=numpy.float64(1), batch_size=numpy.int64(50))
    loader = CifarLoader(one_batch, batch_size=10)
    net = train(loader, widths=[numpy.int64(8)] * 3, verbose=False, **options)
    assert net.linear.weight.dtype == torch.float32


# Callbacks ----------------------------------------------------------------------------------------


@EACH_TRAIN
def test_a_callback_that_calls_the_network_does_not_change_it(module, one_batch):
    """It is in evaluation mode: its BatchNorms' averages stay as they are."""
    images = torch.randn(50, 3, 32, 32)
    nets = []
    for callback in (lambda net, row: None, lambda net, row: net(images) is None):
        loader = module.CifarLoader(one_batch, batch_size=50)
        options = small(module, epochs=2, seed=1, verbose=False)
        nets.append(module.train(loader, callback=callback, **options))
    for one, other in zip(*(net.state_dict().values() for net in nets), strict=True):
        assert torch.equal(one, other)


@EACH_TRAIN
def test_a_callback_that_returns_something_else(module, one_batch, tmp_path):
    loader, options = CifarLoader(one_batch, batch_size=50), small(module, epochs=2, verbose=False)
    with open(tmp_path / 'log', 'w') as file:
        for text in ('.', 'seventeen letters'):
            with pytest.raises(TypeError, match=f'None, or True .* {len(text)}$'):
                module.train(loader, callback=lambda *_, text=text: file.write(text), **options)
    for accuracy in (0.0, 1.0):
        with pytest.raises(TypeError, match=f'None, or True .* {accuracy}$'):
            module.train(loader, callback=lambda *_, value=accuracy: value, **options)
    for logits in (torch.zeros(2), torch.ones(2).numpy()):
        with pytest.raises(TypeError, match='None, or True '):
            module.train(loader, callback=lambda *_, value=logits: value, **options)
    rows = []
    module.train(
        loader, callback=lambda *args: rows.append(args[1]) or torch.tensor(True), **options
    )
    assert [row['epoch'] for row in rows] == [1, 'eval']  # as by accuracies.mean() > 0.9


def test_a_finished_series_is_summed_up_without_a_warm_up(main, monkeypatch):
    """Which compiles in other scripts, for minutes."""
    code, out, _ = main(airbench94, '--runs', 1)
    monkeypatch.setattr(airbench94, 'warmup', None)
    code_again, again, _ = main(airbench94, '--runs', 1)
    assert code == code_again == 0
    assert again.splitlines()[-3:] == out.splitlines()[-3:]
    with pytest.raises(TypeError):
        main(airbench94, '--runs', 2)


# A forker's mistakes, threads ---------------------------------------------------------------------


@pytest.mark.parametrize('at', ['check_data', 'warmup', 'train'])
def test_a_fault_of_the_program_shows_its_traceback(main, monkeypatch, at):
    def fail(*args, **options):
        raise RuntimeError('shapes cannot be multiplied')

    monkeypatch.setattr(airbench94, at, fail)
    with pytest.raises(RuntimeError, match='shapes'):
        main(airbench94)


@pytest.mark.parametrize(
    'module', [airbench94_compiled, airbench94_muon], ids=lambda module: module.__name__
)
def test_a_second_compiled_training_at_once_is_refused(module, one_batch, monkeypatch):
    """In a thread beside the first, which waits for the outcome."""
    loader = module.CifarLoader(one_batch, batch_size=50)
    options = dict(SMALL, epochs=1)
    if not module.hyp['compile']:
        options['compile'] = True
    outcome = []

    def second():
        for changes in ({}, dict(compile=False)):
            try:
                module.train(loader, **options | changes)
            except (RuntimeError, KeyboardInterrupt) as error:
                outcome.append(str(error))

    def first_needs_an_optimizer(net, h):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, 'make_optimizer', first_needs_an_optimizer)
    for _ in range(2):  # the first, though it failed, does not lock out the next
        with pytest.raises(KeyboardInterrupt):
            module.train(loader, **options)
    assert len(outcome) == 4 and 'one compiled network' in outcome[0]
    assert outcome[1] == ''  # one that is not compiled began


def test_infer_of_airbench94_muon(one_batch):
    assert airbench.infer94_muon is airbench94_muon.infer
    assert airbench.evaluate94_muon is airbench94_muon.evaluate
    rows = []
    loader = airbench.CifarLoader(one_batch, batch_size=50, aug=dict(flip=True))
    net = airbench.train94_muon(
        loader, epochs=1, callback=lambda net, row: rows.append(row), **SMALL
    )
    test_loader = airbench.CifarLoader(one_batch, train=False)
    assert airbench.evaluate94_muon(net, test_loader, 2) == rows[-1]['tta_val_acc']
