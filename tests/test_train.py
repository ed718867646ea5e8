"""
Whole trainings, of small networks on tiny data; a few steps of the real thing where the data can be
found.
"""

import copy
import functools
import inspect
import platform
from types import SimpleNamespace

import pytest
import torch
from conftest import EACH_TRAIN, OTHER_VALUES, basis, keep, same_state, small

import airbench94
import airbench94_compiled
import airbench94_muon
from airbench94 import CifarLoader, evaluate, hyp, infer, train

SMALL = dict(widths=(8, 16, 16), dtype=torch.float32)


def tiny_loader(tiny):
    """Eleven steps an epoch."""
    loader = CifarLoader(tiny, train=True, batch_size=10, aug=hyp['aug'], device='cpu')
    loader.images, loader.labels = loader.images[:110], loader.labels[:110]
    return loader


def test_it_learns(tiny):
    torch.manual_seed(0)
    loader = CifarLoader(tiny, train=True, batch_size=100, aug=hyp['aug'], device='cpu')
    net = train(loader, epochs=4, verbose=False, **SMALL)
    assert not net.training
    assert evaluate(net, CifarLoader(tiny, train=False)) > 0.3
    logits = infer(net, loader, tta_level=2)
    assert logits.shape == (1100, 10) and logits.dtype == torch.float32


def test_same_seed_same_result(tiny):
    nets = [
        train(tiny_loader(tiny), epochs=1.3, seed=seed, verbose=False, **SMALL)
        for seed in (5, 5, 6)
    ]
    assert all(
        torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True)
    )
    assert not torch.equal(nets[0].linear.weight, nets[2].linear.weight)
    torch.manual_seed(5)
    one, other = (train(tiny_loader(tiny), epochs=1, verbose=False, **SMALL) for _ in range(2))
    assert not torch.equal(one.linear.weight, other.linear.weight)  # without a seed they go on


def test_the_callers_loader_is_not_changed_and_serves_again(tiny):
    loader = tiny_loader(tiny)
    list(loader)
    before = copy.copy(loader.__dict__)
    first = train(loader, epochs=2, seed=1, verbose=False, **SMALL)
    assert loader.__dict__.keys() == before.keys() and all(
        loader.__dict__[key] is before[key] for key in before
    )
    second = train(loader, epochs=2, seed=1, verbose=False, **SMALL)
    assert torch.equal(first.linear.weight, second.linear.weight)
    fresh = train(tiny_loader(tiny), epochs=2, seed=1, verbose=False, **SMALL)
    assert torch.equal(first.linear.weight, fresh.linear.weight)


def test_table_and_history(tiny, capsys, monkeypatch):
    steps, history = [], []
    real_step = airbench94.train_step

    def step(net, optimizer, inputs, labels, label_smoothing):
        steps.append((labels, *real_step(net, optimizer, inputs, labels, label_smoothing)))
        return steps[-1][1:]

    with monkeypatch.context() as patch:
        patch.setattr(airbench94, 'train_step', step)
        train(tiny_loader(tiny), epochs=1.5, seed=1, callback=keep(history), **SMALL)
    out, err = capsys.readouterr()
    assert err == ''
    assert [line.split('|')[1].strip() for line in out.splitlines() if '|' in line] == [
        'epoch',
        '1',
        '2',
        'eval',
    ]
    assert len(out.splitlines()) == 4 and len({len(line) for line in out.splitlines()}) == 1
    assert [row['epoch'] for row in history] == [1, 2, 'eval']
    assert [row['steps'] for row in history] == [11, 17, 17]  # ceil(1.5 * 11)
    for row, (labels, loss, logits) in zip(history, (steps[10], steps[16]), strict=False):
        assert row['train_loss'] == pytest.approx(loss.item() / 10) and 1 < row['train_loss'] < 4
        right = (logits.argmax(1) == labels).sum().item()
        assert row['train_acc'] == pytest.approx(right / 10) and 0 <= row['val_acc'] <= 1
    times = [row['time_seconds'] for row in history]
    assert 0 < times[0] < times[1] < times[2]
    quiet = []
    train(tiny_loader(tiny), epochs=1.5, seed=1, verbose=False, callback=keep(quiet), **SMALL)
    assert capsys.readouterr() == ('', '')
    assert [row.get('val_acc') for row in quiet] == [row.get('val_acc') for row in history]


def test_the_head_of_the_table_comes_first(tiny, capsys, monkeypatch):
    """On a CPU the first row can be minutes away."""

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(airbench94, 'train_step', stop)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_loader(tiny), epochs=1, **SMALL)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split('|')[1].strip() == 'epoch'


@EACH_TRAIN
@pytest.mark.parametrize('at, steps', [(1, [11, 11]), (2, [11, 22, 22]), (3, [11, 22, 33, 33])])
def test_a_callback_can_end_the_training(module, tiny, at, steps, monkeypatch):
    """The last epoch ends as always: with the average of Lookahead and the final evaluation."""
    rows, decays = [], []
    real_update = module.lookahead_update

    def update(average, state, decay):
        decays.append(decay)
        real_update(average, state, decay)

    def callback(net, row):
        assert isinstance(net, module.Net)
        rows.append(row)
        return row['epoch'] == at

    monkeypatch.setattr(module, 'lookahead_update', update)
    options = small(module, epochs=3, seed=1, verbose=False)
    net = module.train(tiny_loader(tiny), callback=callback, **options)
    assert [row['steps'] for row in rows] == steps and 'tta_val_acc' in rows[-1]
    loader = CifarLoader(tiny, train=False)
    assert module.evaluate(net, loader, module.hyp['tta_level']) == rows[-1]['tta_val_acc']
    if module is airbench94_muon:  # whose Lookahead is of the last steps of the schedule alone
        assert decays == ([0.0, module.hyp['lookahead_decay']] if at == 3 else [])
    else:
        assert decays[-1] == 1.0


def test_the_clock_is_read_when_the_device_is_done(monkeypatch):
    done = []
    monkeypatch.setattr(torch.accelerator, 'synchronize', done.append)
    monkeypatch.setattr(airbench94, 'time', SimpleNamespace(perf_counter=lambda: len(done)))
    assert airbench94.synchronized_time(torch.device('cpu')) == 0
    assert airbench94.synchronized_time(torch.device('cuda')) == 1
    assert done == [torch.device('cuda')]


@pytest.mark.parametrize('module, options', [
    (airbench94, {}),
    (airbench94_compiled, dict(compile=False)),
    (airbench94_compiled, dict(compile=True)),
    (airbench94_muon, dict(compile=False)),
    (airbench94_muon, dict(compile=True)),
], ids=lambda value: getattr(value, '__name__', None))  # fmt: skip
def test_the_clock_runs_in_training_and_the_final_evaluation(
    module, options, tiny, monkeypatch, passed_through
):
    """
    The whitening included, and neither validations nor callbacks, nor what compiling needs. Here
    each of these takes seconds of its own.
    """
    now = 0

    def taking(seconds, function):
        def slow(*args, **options):
            nonlocal now
            now += seconds
            return function(*args, **options)

        return slow

    for name, seconds in (('init_whitening', 1), ('train_step', 10), ('evaluate', 1_000)):
        monkeypatch.setattr(module, name, taking(seconds, getattr(module, name)))
    monkeypatch.setattr(module, 'synchronized_time', lambda device: now)
    rows = []
    options = small(
        module, epochs=2, verbose=False, callback=taking(100_000, keep(rows)), **options
    )
    module.train(tiny_loader(tiny), **options)
    assert [row['time_seconds'] for row in rows] == [111, 221, 1221]


def on_forty_images(module, folder, **changes):
    loader = module.CifarLoader(folder, True, 10, module.hyp['aug'], device='cpu')
    loader.images, loader.labels = loader.images[:40], loader.labels[:40]
    return module.train(loader, **basis(module, seed=0, **changes))


unchanged = functools.cache(on_forty_images)


@pytest.mark.parametrize(
    'module, key',
    [(module, key) for module, values in OTHER_VALUES.items() for key in values],
    ids=lambda value: getattr(value, '__name__', value),
)
def test_every_hyperparameter_has_an_effect(module, key, tiny, monkeypatch):
    """On the network, or on its final evaluation."""
    value = OTHER_VALUES[module][key]
    if key != 'tta_level':
        assert not same_state(
            on_forty_images(module, tiny, **{key: value}), unchanged(module, tiny)
        )
        return
    levels = []
    real_evaluate = module.evaluate

    def evaluate(net, loader, tta_level=0, mirror=True):
        levels.append(tta_level)
        return real_evaluate(net, loader, tta_level, mirror)

    monkeypatch.setattr(module, 'evaluate', evaluate)
    on_forty_images(module, tiny, epochs=1, tta_level=value, callback=keep([]))
    assert levels == [0, value] and value != module.hyp['tta_level']


@EACH_TRAIN
def test_nothing_else_has_an_effect(module, tiny):
    """Which the test above relies on; it is of all hyperparameters but one."""
    assert same_state(on_forty_images(module, tiny), unchanged(module, tiny))
    assert OTHER_VALUES[module].keys() == module.hyp.keys() - {'compile'}


def test_without_a_table_nothing_is_printed_or_evaluated(tiny, capsys, tmp_path, monkeypatch):
    (tmp_path / 'train.pt').write_bytes((tiny / 'train.pt').read_bytes())  # and no test.pt
    monkeypatch.setattr(airbench94, 'evaluate', None)
    train(CifarLoader(tmp_path, train=True, batch_size=500), epochs=0.5, verbose=False, **SMALL)
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('steps', [1, 2, 4, 5])
def test_any_number_of_steps(tiny, steps):
    loader, history = tiny_loader(tiny), []
    train(loader, epochs=steps / len(loader), verbose=False, callback=keep(history), **SMALL)
    assert history[-1]['steps'] == steps


def test_lookahead_ends_with_the_average(tiny):
    """The steps after its last update are not in it. Before the first there is no average."""

    def after(steps, **options):
        return train(
            tiny_loader(tiny), epochs=steps / 11, seed=3, verbose=False, **options, **SMALL
        ).linear.weight

    schedule = dict(lr_start=1, lr_peak=0, lr_end=1, lookahead_power=0)  # alike for any steps
    assert torch.equal(after(5, **schedule), after(9, **schedule))
    assert not torch.equal(after(9, **schedule), after(10, **schedule))


@pytest.mark.parametrize('module', [airbench94, airbench94_compiled])
@pytest.mark.parametrize(
    'steps, options',
    [(4, dict(epochs=4 / 11)), (3, dict(epochs=2, batch_size=30, callback=lambda *_: True))],
)
def test_a_training_that_ends_before_lookaheads_first_update(module, steps, options, tiny):
    """By its length, or by the callback. It keeps what it has learned: there is no average."""
    options = small(module, seed=3, verbose=False) | options
    net, without, other = (
        module.train(tiny_loader(tiny), **options, **lookahead)
        for lookahead in (
            dict(lookahead_every=steps + 1),
            dict(lookahead=False),
            dict(lookahead_every=steps),
        )
    )
    assert same_state(net, without) and not same_state(net, other)


@EACH_TRAIN
def test_lookahead_is_of_all_the_network_and_of_every_so_many_steps(module, tiny, monkeypatch):
    calls = []

    def update(average, state, decay):
        calls.append(
            ([id(tensor) for tensor in average], [tensor.data_ptr() for tensor in state], decay)
        )

    monkeypatch.setattr(module, 'lookahead_update', update)
    options = small(module, epochs=12 / 11, verbose=False)
    expected = [0.95**5 * (5 / 12) ** 3, 0.95**5 * (10 / 12) ** 3, 1]
    if module is airbench94_muon:  # of the last steps alone
        options['lr_tail'] = 0.75
        expected = [0, 0.7, 0.7, 0.7]  # begins at step 3; then steps 4, 8 and 12
    net = module.train(tiny_loader(tiny), **options)
    assert [decay for *_, decay in calls] == pytest.approx(expected)
    everything = [
        tensor.data_ptr() for name, tensor in net.state_dict().items() if 'num_batches' not in name
    ]
    assert all(state == everything and average == calls[0][0] for average, state, _ in calls)


def test_the_lr_of_each_step(tiny, monkeypatch):
    real_step, seen = airbench94.train_step, []

    def step(net, optimizer, *args):
        seen.append([group['lr'] / group['initial_lr'] for group in optimizer.param_groups])
        return real_step(net, optimizer, *args)

    monkeypatch.setattr(airbench94, 'train_step', step)
    train(tiny_loader(tiny), epochs=12 / 11, verbose=False, **SMALL)
    assert seen == [pytest.approx(2 * [airbench94.lr_factor(i, 12, hyp)]) for i in range(12)]


def test_the_whitening_bias_trains_for_its_epochs(tiny):
    def bias(epochs, **options):
        return train(
            tiny_loader(tiny),
            epochs=epochs,
            seed=3,
            lookahead=False,
            verbose=False,
            lr=1e-3,
            weight_decay=0,
            **options,
            **SMALL,
        ).whiten.bias

    assert (bias(1, whiten_bias_epochs=0) == 0).all()
    assert (bias(1, whiten_bias_epochs=1) != 0).any()
    trained, longer = bias(2, whiten_bias_epochs=1), bias(2, whiten_bias_epochs=2)
    assert not torch.equal(trained, longer)


@EACH_TRAIN
def test_divergence_is_an_error_in_its_epoch(module, tiny):
    history = []
    options = small(module, epochs=3, lr=1e30, verbose=False, callback=keep(history))
    with pytest.raises(FloatingPointError, match='epoch 1'):
        module.train(tiny_loader(tiny), **options)
    assert [row['epoch'] for row in history] == [1]


NONSENSE = [
    ('epochs', 0),
    ('epochs', -1),
    ('epochs', float('nan')),
    ('epochs', float('inf')),
    ('batch_size', 0),
    ('batch_size', True),
    ('lr', 0),
    ('lr', -1),
    ('lr', True),
    ('momentum', 1),
    ('momentum', -0.1),
    ('weight_decay', -1),
    ('weight_decay', float('inf')),
    ('bias_scaler', 0),
    ('label_smoothing', 1.1),
    ('whiten_bias_epochs', -1),
    ('widths', (8, 8)),
    ('widths', (8, 8, 0)),
    ('bn_momentum', 0),
    ('tta_level', 3),
    ('tta_level', -1),
    ('tta_level', 1.5),
    ('batch_size', 99.5),
    ('lr_start', -1),
    ('lr_end', -1),
    ('lr_peak', 1),
    ('lr_peak', -0.1),
    ('lookahead', 'false'),
    ('lookahead_every', 0),
    ('lookahead_decay', 1.5),
    ('lookahead_power', -1),
    ('altflip', 'false'),
    ('scaling_factor', 0),
    ('compile', 'false'),
]


@pytest.mark.parametrize(
    'module, name, value',
    [
        (module, name, value)
        for module in (airbench94, airbench94_compiled, airbench94_muon)
        for name, value in NONSENSE
        if name in module.hyp
    ],
    ids=lambda value: getattr(value, '__name__', value),
)
def test_values_that_make_no_sense(module, name, value):
    """train merges what it is given first."""
    with pytest.raises(ValueError, match=f'{name} must be'):
        module.merge({name: value})


@EACH_TRAIN
def test_what_train_is_given_is_merged(module, tiny):
    *arguments, overrides = inspect.signature(module.train).parameters
    names = ', '.join([*arguments, *module.hyp])
    with pytest.raises(TypeError, match=f'no argument label_smoothin: there are {names}$'):
        module.train(tiny_loader(tiny), label_smoothin=0)
    with pytest.raises(ValueError, match='lr must be'):
        module.train(tiny_loader(tiny), lr=0)


def test_labels_must_be_of_the_classes(tiny):
    loader = tiny_loader(tiny)
    loader.classes = loader.classes[:9]
    with pytest.raises(ValueError, match='train_loader.labels must be from 0 to 8'):
        train(loader, verbose=False, **SMALL)
    loader.labels = loader.labels % 9
    assert train(loader, epochs=1 / 11, verbose=False, **SMALL).linear.out_features == 9


def uncompiled(module):
    return {} if module is airbench94 else dict(compile=False)


@EACH_TRAIN
def test_warmup_on_a_cpu_only_sets_the_process_up(module, tiny, monkeypatch, capsys):
    called = []
    libc = SimpleNamespace(mallopt=lambda *args: called.append(args))
    monkeypatch.setattr(module.ctypes, 'CDLL', lambda name: libc)
    monkeypatch.setattr(platform, 'libc_ver', lambda: ('glibc', '2.36'))
    monkeypatch.setattr(module, 'train', None)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    monkeypatch.setenv('AIRBENCH_DATA', str(tiny))
    module.warmup(device='cpu', dtype=torch.float16, **uncompiled(module))
    assert torch.backends.cudnn.benchmark is True
    assert called == [(-4, 0), (-1, 2**31 - 1)] and capsys.readouterr() == ('', '')
    monkeypatch.setattr(platform, 'libc_ver', lambda: ('', ''))
    module.warmup(tiny_loader(tiny), CifarLoader(tiny, False), **uncompiled(module))
    assert len(called) == 2


def trained_by_warmup(module, monkeypatch, *args, **options):
    """What the warm-up on a device, which meta stands for, would train on."""
    calls = []
    monkeypatch.setattr(
        module, 'train', lambda *loaders, **options: calls.append((loaders, options))
    )
    module.warmup(*args, **uncompiled(module) | options)
    (((loader, test_loader), options),) = calls
    # airbench94_muon.py's images have several sizes, each of which gets as many epochs.
    n_sizes = 1 if options.get('compile') else len(options.get('sizes', [32]))
    assert options['epochs'] == 2 * n_sizes and options['whiten_bias_epochs'] == 1
    assert not options['verbose'] and options['callback'](None, {}) is None
    return loader, options | dict(test_loader=test_loader)


@EACH_TRAIN
def test_warmup_on_a_device_trains_on_a_few_batches(module, tiny, monkeypatch):
    loader = CifarLoader(tiny, True, 100, hyp['aug'], device='meta')
    test_loader = CifarLoader(tiny, False, device='meta')
    test_loader.images = torch.empty(10_500, 3, 32, 32, device='meta')
    test_loader.labels = torch.empty(10_500, dtype=torch.int64, device='meta')
    options = dict(
        net=module.Net(),
        seed=3,
        verbose=True,
        callback=print,
        batch_size=100,
        dtype=torch.float16,
        lr=1e30,
        bn_momentum=0.3,
    )
    trained, found = trained_by_warmup(module, monkeypatch, loader, test_loader, **options)
    assert len(trained.images) == len(trained.labels) == 300 and found['batch_size'] == 100
    assert found['lr'] < 0.01 and found['bn_momentum'] == 0.3 and found['dtype'] == torch.float16
    assert found['weight_decay'] == 0  # it is divided by the lr
    assert found.get('net') is found.get('seed') is None
    assert len(loader.images) == len(loader.labels) == 1100 and len(test_loader.images) == 10_500
    # The compiled evaluation needs a batch of each size, and no more.
    tested = found['test_loader']
    assert len(tested.images) == len(tested.labels)
    if module is airbench94_compiled:
        assert [len(images) for images in tested.images.split(2000)] == [2000, 500]
    else:
        assert tested is test_loader
    if module is not airbench94:
        # A recorded step is that of its lr and of its weight decay.
        options |= dict(compile=True)
        _, found = trained_by_warmup(module, monkeypatch, loader, test_loader, **options)
        assert found['lr'] == 1e30 and 'weight_decay' not in found and found['compile']
        if module is airbench94_compiled:
            tested = found['test_loader']
            assert [len(images) for images in tested.images.split(2000)] == [2000, 500]


@EACH_TRAIN
def test_warmup_leaves_it_to_the_training_to_diverge(module, tiny, monkeypatch):
    def diverge(*args, **options):
        raise FloatingPointError

    monkeypatch.setattr(module, 'train', diverge)
    module.warmup(CifarLoader(tiny, True, 100, device='meta'), device='meta')


@EACH_TRAIN
def test_warmup_without_a_loader_is_for_the_recipes_batches(module, tiny, monkeypatch):
    monkeypatch.setenv('AIRBENCH_DATA', str(tiny))
    monkeypatch.setitem(module.hyp, 'batch_size', 350)
    loader, options = trained_by_warmup(module, monkeypatch, device='meta')
    assert options.get('batch_size', loader.batch_size) == 350 and len(loader.images) == 1050
    assert options.get('aug', loader.aug) == module.hyp['aug']


@EACH_TRAIN
@pytest.mark.parametrize('batch_size', [100, 3200])
def test_warmup_has_the_loaders_batch_size(module, tiny, monkeypatch, batch_size):
    loader = CifarLoader(tiny, True, 100, hyp['aug'], device='meta')
    loader.batch_size = batch_size
    loader.images = torch.empty(4400, 3, 32, 32, device='meta')
    loader.labels = loader.labels.repeat(4)
    test_loader = CifarLoader(tiny, False, device='meta')
    trained, _ = trained_by_warmup(module, monkeypatch, loader, test_loader)
    assert len(trained) == min(3, len(loader)) and trained.batch_size == batch_size


@EACH_TRAIN
def test_warmup_sees_the_smaller_last_batch(module, tiny, monkeypatch):
    options = dict(aug=hyp['aug'], device='meta')
    loader = CifarLoader(tiny, True, 200, drop_last=False, **options)
    trained, _ = trained_by_warmup(module, monkeypatch, loader, batch_size=300)
    assert [len(labels) for labels in trained.labels.split(300)] == [300, 300, 300, 200]


def test_warmup_sees_all_sizes_of_the_images(tiny, monkeypatch):
    """At each size a whole epoch, with its smaller last batch."""
    module = airbench94_muon
    loader = CifarLoader(tiny, True, 200, dict(flip=True), drop_last=False, device='meta')
    sizes = dict(sizes=((16, 0.1), (20, 0.95)))
    trained, options = trained_by_warmup(module, monkeypatch, loader, **sizes)
    steps = options['epochs'] * len(trained)
    seen = [module.image_size(step, steps, options) for step in range(steps)]
    assert seen == sorted(2 * len(trained) * [16, 20, 32])
    trained, options = trained_by_warmup(module, monkeypatch, loader, **sizes, compile=True)
    assert options['epochs'] == 2 and options['sizes'] == sizes['sizes']


@pytest.mark.skipif(torch.accelerator.is_available(), reason='there is a GPU')
def test_a_device_that_is_a_number_is_a_gpu(tiny):
    """Of which the tests see none."""
    with pytest.raises((AssertionError, RuntimeError), match='CUDA|NVIDIA|accelerator'):
        CifarLoader(tiny, device=0)
    with pytest.raises((AssertionError, RuntimeError), match='CUDA|NVIDIA|accelerator'):
        train(tiny_loader(tiny), device=0)


def test_the_first_losses_on_the_real_data(real, monkeypatch):
    """
    As recorded. The filters' signs are fixed, since each library for linear algebra has its own.
    """
    real_step, real_init, losses = airbench94.train_step, airbench94.init_whitening, []

    def step(*args):
        loss, logits = real_step(*args)
        losses.append(loss.item() / len(logits))
        return loss, logits

    def init_whitening(net, images):
        real_init(net, images)
        filters = net.whiten.weight.data[:12]
        signs = (
            (filters * torch.arange(12.0).sub(4).square().view(3, 2, 2))
            .sum((1, 2, 3))
            .sign()
            .view(12, 1, 1, 1)
        )
        net.whiten.weight.data = torch.cat((signs * filters, -signs * filters))

    monkeypatch.setattr(airbench94, 'train_step', step)
    monkeypatch.setattr(airbench94, 'init_whitening', init_whitening)
    real_split = airbench94.load_split

    def load_split(path, train):
        return {key: value[:5120] for key, value in real_split(path, train).items()}

    monkeypatch.setattr(airbench94, 'load_split', load_split)
    loader = CifarLoader(real, train=True, batch_size=128, aug=hyp['aug'], device='cpu')
    train(loader, epochs=6 / 40, lr=46, seed=1, dtype=torch.float32, verbose=False)
    assert losses == pytest.approx([2.31850, 2.29835, 2.28547, 2.29866, 2.22748, 2.19030], rel=2e-3)


@EACH_TRAIN
def test_the_first_5000_images_decide_the_whitening(module, tiny, monkeypatch):
    seen = []
    loader = tiny_loader(tiny)
    loader.images = loader.images.repeat(50, 1, 1, 1)
    loader.labels = loader.labels.repeat(50)
    monkeypatch.setattr(module, 'init_whitening', lambda net, images: seen.append(images))
    module.train(loader, **small(module, epochs=1e-9, verbose=False))  # a step
    assert torch.equal(seen[0], loader.normalize(loader.images[:5000]))
