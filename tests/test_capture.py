"""Compiled and captured training, as far as a CPU can show it; on CUDA where there is one."""

import contextlib
import functools
import gc
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CUDA_ENVIRONMENT,
    OTHER_VALUES,
    ROOT,
    VERSION,
    basis,
    forget_compiled,
    keep,
    same_state,
)
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import airbench94_compiled
import airbench94_muon

MODULES = pytest.mark.parametrize('module', [airbench94_compiled, airbench94_muon],
                                  ids=lambda module: module.__name__)  # fmt: skip
SMALL = dict(widths=(8, 16, 16), dtype=torch.float32, verbose=False)


@pytest.fixture(autouse=True)
def afresh():
    """No test finds what another has captured."""
    forget_compiled()


def loader_of(module, tiny, epoch=11):
    """Of batches of ten images, so many an epoch."""
    loader = module.CifarLoader(tiny, True, 10, module.hyp['aug'], device='cpu')
    loader.images, loader.labels = loader.images[: 10 * epoch], loader.labels[: 10 * epoch]
    return loader


def weights_of(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@MODULES
def test_captured_training_is_the_plain_one(module, tiny, passed_through):
    """All kinds of step of a short training; lr as a tensor rounds a little differently."""
    rows, other = [], []
    lr = 10 * module.hyp['lr']  # as the batches are small
    options = dict(SMALL, epochs=3, whiten_bias_epochs=1, seed=3, lr=lr)
    loader = loader_of(module, tiny)
    plain = module.train(loader, compile=False, callback=keep(rows), **options)
    captured = module.train(loader, compile=True, callback=keep(other), **options)
    assert type(captured.forward).__name__ == 'method' and not captured.training
    for row, same in zip(rows, other, strict=True):
        if 'train_loss' in row:
            assert row['train_loss'] == pytest.approx(same['train_loss'], rel=1e-3)
    difference = (weights_of(plain) - weights_of(captured)).norm() / weights_of(plain).norm()
    assert difference < 0.01
    (step,) = module.captured_steps.values()
    kinds = {(shape[-1], trained) for shape, trained in step.recordings}
    sizes = (22, 26, 32) if module is airbench94_muon else (32,)
    assert kinds == {(size, trained) for size in sizes for trained in (True, False)}


@MODULES
@pytest.mark.parametrize('height, width', [(6, 6), (7, 9), (3, 2)])
def test_the_pool_for_compiling_is_pytorchs(module, height, width, monkeypatch):
    """Values and gradients, of equal values too, and of odd sizes; eager and compiled."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(5, (4, 8, height, width), generator=generator).float()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = F.max_pool2d(x, 2)
    grad = torch.randn(expected.shape, generator=generator)
    (of_x,) = torch.autograd.grad(expected, x, grad)

    def own(x):
        return module.max_pool(x, custom_backward=True)

    compiled = torch.compile(own, fullgraph=True, dynamic=False, backend='aot_eager')
    for pool in (module.MaxPool.apply, compiled):
        with monkeypatch.context() as patch:
            patch.setattr(F, 'max_pool2d', lambda *args: torch.zeros(()))
            out = pool(x)
        assert out.equal(expected) and torch.autograd.grad(out, x, grad)[0].equal(of_x)


@MODULES
def test_only_compiled_training_has_its_own_pool(module, monkeypatch, passed_through):
    """
    Evaluation has PyTorch's, and so has what users compile: vmap for example does not know it.
    """
    calls = []
    real = module.MaxPool.apply

    def apply(x):
        calls.append(x.shape)
        return real(x)

    monkeypatch.setattr(module.MaxPool, 'apply', apply)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    users = module.Net(module.hyp | dict(widths=(8, 16, 16)))
    images = torch.randn(4, 3, 32, 32)
    users(images)
    assert not calls
    kind = module.Net, (8, 16, 16), 0.4, 1 / 9, 10, torch.device('cpu'), torch.float32
    net = module.compiled_net(*kind)
    net(images)
    assert len(calls) == 3
    with torch.no_grad():
        net(images)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: False)
    net(images)
    assert len(calls) == 3


@functools.cache
def first_run(module, folder, epochs):
    """The network of a training that finds nothing captured."""
    forget_compiled()
    options = basis(module, epochs=epochs, compile=True)
    return module.train(loader_of(module, folder, epoch=2), seed=3, **options)


@pytest.mark.parametrize(
    'module, key',
    [(module, key) for module in (airbench94_compiled, airbench94_muon)
     for key in OTHER_VALUES[module] if key != 'tta_level'],
    ids=lambda value: getattr(value, '__name__', value),
)  # fmt: skip
def test_a_run_does_not_depend_on_those_before(module, key, tiny, passed_through):
    """
    Nor on their hyperparameters, of which a recording holds some as plain numbers: another value
    counts as it would in the first run, and so does the old one afterwards.
    """
    loader = loader_of(module, tiny, epoch=2)
    epochs = 4 if key == 'lookahead_every' else 2  # airbench94_muon needs a longer tail for it
    options = basis(module, epochs=epochs, compile=True)
    changed = options | {key: OTHER_VALUES[module][key]}
    assert changed != options

    module.train(loader, seed=1, **options)
    second = module.train(loader, seed=2, **changed)
    third = module.train(loader, seed=3, **options)
    forget_compiled()
    assert same_state(second, module.train(loader, seed=2, **changed))
    assert same_state(third, first_run(module, tiny, epochs))


@MODULES
def test_every_recording_is_of_training(module, tiny, passed_through, monkeypatch):
    """Also that of other hyperparameters, after a run, which leaves the network in evaluation."""
    modes = []
    real_record = module.CapturedStep.record

    def record(captured, *args):
        modes.append(captured.net.training)
        return real_record(captured, *args)

    monkeypatch.setattr(module.CapturedStep, 'record', record)
    for lr in (1, 2):
        module.train(loader_of(module, tiny), lr=lr, epochs=1, compile=True, **SMALL)
    assert modes == 4 * len(module.image_sizes(module.hyp)) * [True]


class FakeGraphs:
    """
    torch.cuda as a recording needs it. As on CUDA, the kernels of a recording do not run in it,
    and a replay writes to the outputs of the recording.
    """

    def __init__(self, monkeypatch, module, captured):
        self.captured, self.real_step, self.last = captured, module.train_step, None
        self.replays = 0
        self.done = []
        monkeypatch.setattr(module, 'train_step', self.train_step)
        captured.stream, current = (
            SimpleNamespace(wait_stream=lambda other, name=name: self.done.append(f'{name} waits'))
            for name in ('own', 'current')
        )
        for name, value in dict(
            current_stream=lambda device: current,
            stream=lambda stream: contextlib.nullcontext(),
            CUDAGraph=lambda: SimpleNamespace(),
            graph=self.graph,
        ).items():
            monkeypatch.setattr(torch.cuda, name, value)

    def train_step(self, *args):
        self.done.append('step')
        self.last = args, self.real_step(*args)
        return self.last[1]

    def tensors(self):
        net = self.captured.net
        return [*net.parameters(), *net.buffers(), *self.captured.optimizer_state()]

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.done.append('recording')
        before = [tensor.detach().clone() for tensor in self.tensors()]
        assert all(p.grad is None for p in self.captured.net.parameters())
        yield
        args, outputs = self.last
        trained = self.captured.net.whiten.bias.requires_grad
        with torch.no_grad():
            for tensor, old in zip(self.tensors(), before, strict=True):
                tensor.copy_(old)

        def replay():
            self.replays += 1
            bias = self.captured.net.whiten.bias
            now = bias.requires_grad
            bias.requires_grad_(trained)  # a recording does what it did
            for output, new in zip(outputs, self.real_step(*args), strict=True):
                output.copy_(new)
            bias.requires_grad_(now)

        graph.replay = replay


@MODULES
def test_replays_are_steps(module, tiny, passed_through, monkeypatch):
    """
    The two steps before a recording and the recording itself leave nothing behind, also where a
    kind of step comes in the midst of a training: the same losses as without a recording, in the
    first run and in the second.
    """
    h = module.merge(dict(widths=(8, 16, 16), batch_size=100))
    device, dtype = torch.device('cpu'), torch.float32
    torch.manual_seed(0)
    start = module.Net(h).state_dict()
    batches = [(torch.randn(100, 3, size, size), torch.randint(10, (100,)), trained)
               for size, trained in ((24, True), (24, True), (28, False), (24, False), (28, False),
                                     (32, False), (24, True))]  # fmt: skip

    def run(captured):
        captured.start_run(start)
        losses = []
        for i, (inputs, labels, trained) in enumerate(batches):
            captured.net.whiten.bias.requires_grad_(trained)
            loss, logits = captured(inputs, labels, 1 - i / len(batches))
            assert logits.shape == (100, 10)
            losses.append(loss.item())
        return losses, weights_of(captured.net)

    if module is airbench94_compiled:  # whose head is for 32 pixels
        batches = [(torch.randn(100, 3, 32, 32), *rest) for _, *rest in batches]
    plain = module.captured_step(h, 10, device, dtype)
    expected = run(plain)
    plain.net.whiten.bias.requires_grad_(True)
    optimizer = module.make_optimizer(plain.net, h)  # without momenta, until there is a step
    captured = module.CapturedStep(plain.net, optimizer, h['label_smoothing'])
    captured.is_cuda = True
    real_record = module.CapturedStep.record

    def record(*args):
        recording = real_record(*args)
        # They are in the memory of this recording, and no other one writes to them.
        assert all(p.grad is None for p in captured.net.parameters())
        return recording

    with monkeypatch.context() as patch:
        patch.setattr(module.CapturedStep, 'record', record)
        fake = FakeGraphs(patch, module, captured)
        for _ in range(2):
            losses, weights = run(captured)
            assert losses == expected[0] and torch.equal(weights, expected[1])
        assert fake.replays == 2 * len(batches)
        # Two steps on a stream of their own, which begin after all that was asked for before.
        assert fake.done[:6] == [
            'own waits', 'step', 'step', 'current waits', 'recording', 'step',
        ]  # fmt: skip
    assert len(captured.recordings) == (4 if module is airbench94_muon else 2)


@MODULES
def test_another_thread_may_compile_as_often(module, passed_through):
    """From PyTorch 2.12 on each thread has its own settings of the compiler."""
    h = module.merge(dict(widths=(8, 8, 8), batch_size=10))
    limits = []

    def in_a_thread():
        module.captured_step(h, 10, torch.device('cpu'), torch.float32)
        limits.append(torch._dynamo.config.cache_size_limit)

    module.captured_step(h, 10, torch.device('cpu'), torch.float32)
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert limits == [10_000]


@MODULES
def test_a_smaller_last_batch_is_recorded_before_the_training(
    module, tiny, passed_through, monkeypatch
):
    """Each kind of step that the training will have."""
    seen = []
    for name in ('record', 'start_run'):
        real = getattr(module.CapturedStep, name)

        def method(captured, *args, name=name, real=real):
            seen.append(name)
            return real(captured, *args)

        monkeypatch.setattr(module.CapturedStep, name, method)
    loader = loader_of(module, tiny)
    loader.drop_last, loader.batch_size = False, 40
    module.train(loader, epochs=5, whiten_bias_epochs=2, compile=True, **SMALL)
    assert seen == 4 * len(module.image_sizes(module.hyp)) * ['record'] + ['start_run']


@MODULES
def test_the_final_evaluation_compiles_nothing(module, tiny, monkeypatch):
    """As it is timed. No warm-up was before, or one of other hyperparameters."""
    real_compile = torch.compile
    monkeypatch.setattr(
        torch, 'compile', lambda function, **options: real_compile(function, backend='eager')
    )
    graphs = []

    def callback(net, row):
        graphs.append(counters['stats']['unique_graphs'])

    for epochs in (1, 3):  # the second time the whitening bias is frozen in the end
        graphs.clear()
        torch._dynamo.reset()
        before = counters['stats']['unique_graphs']
        options = dict(SMALL, epochs=epochs, whiten_bias_epochs=1.5)
        module.train(loader_of(module, tiny), compile=True, callback=callback, **options)
        forget_compiled()
        assert len(graphs) == epochs + 1 and graphs[-2] == graphs[-1] > before


@MODULES
@pytest.mark.parametrize('epoch', (1, 'eval'))
def test_a_training_after_one_whose_callback_moved_the_network(module, epoch, tiny, passed_through):
    """It finds no recording, and no network of another dtype. On CUDA the old memory is free."""

    def callback(net, row):
        if row['epoch'] == epoch:
            net.double()

    loader, options = loader_of(module, tiny), dict(SMALL, epochs=2, compile=True, seed=1)
    first = module.train(loader, **options)
    (step,) = module.captured_steps.values()
    with contextlib.suppress(RuntimeError):
        module.train(loader, callback=callback, **options)
    assert list(module.captured_steps.values()) == [step]
    again = module.train(loader, **options)
    assert step not in module.captured_steps.values() and same_state(first, again)
    assert all(p.dtype == torch.float32 for p in again.parameters())


@MODULES
def test_nothing_recorded_before_is_kept_while_more_is_recorded(
    module, tiny, passed_through, monkeypatch
):
    """On CUDA it would take the memory of both."""
    loader, options = loader_of(module, tiny), dict(epochs=1, compile=True, verbose=False)
    module.train(loader, **options | dict(widths=(8, 8, 8)))
    first = weakref.ref(*module.captured_steps.values())
    kept = []
    record = module.CapturedStep.record

    def watched(*args):
        gc.collect()  # on a CPU a recording and its step hold each other
        kept.append(first() is not None)
        return record(*args)

    monkeypatch.setattr(module.CapturedStep, 'record', watched)
    module.train(loader, **options | dict(widths=(8, 8, 12)))
    assert len(kept) > 1 and not any(kept)


@MODULES
def test_another_number_of_classes(module, tiny, passed_through):
    loader = loader_of(module, tiny)
    for n in (10, 12):
        loader.classes = [str(i) for i in range(n)]
        net = module.train(loader, epochs=1, compile=True, **SMALL)
        assert net.linear.out_features == n


@MODULES
def test_an_lr_that_is_a_whole_number(module):
    h = module.hyp | dict(widths=(8, 8, 8))
    net = module.Net(h)
    made = module.make_optimizer(net, h)
    first = made[0] if isinstance(made, list) else made
    first.param_groups[0]['lr'] = 1
    captured = module.CapturedStep(net, made, label_smoothing=0.2)
    captured(torch.randn(4, 3, 32, 32), torch.arange(4), factor=0.5)
    assert captured.groups[0]['lr'].item() == 0.5


def test_any_optimizer_is_captured(tiny, passed_through, monkeypatch):
    def make_optimizer(net, h):
        return [torch.optim.AdamW(net.parameters(), lr=0.01)]

    monkeypatch.setattr(airbench94_muon, 'make_optimizer', make_optimizer)
    options = dict(SMALL, epochs=1, seed=1)
    loader = loader_of(airbench94_muon, tiny)
    first, second = (airbench94_muon.train(loader, compile=True, **options) for _ in range(2))
    plain = airbench94_muon.train(loader, compile=False, **options)
    assert same_state(first, second)
    assert (weights_of(plain) - weights_of(first)).norm() < 0.01 * weights_of(plain).norm()


@MODULES
def test_only_sgd_is_made_fused(module, monkeypatch):
    """Adagrad has made its state before, as one that is not fused needs it."""
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: None)
    weight = SimpleNamespace(is_cuda=True, device=torch.device('cpu'))
    net = SimpleNamespace(linear=SimpleNamespace(weight=weight), parameters=list, buffers=list)
    fused = {}
    for name in ('SGD', 'Adagrad', 'AdamW'):
        optimizer = getattr(torch.optim, name)([torch.zeros(2, requires_grad=True)], lr=0.1)
        (group,) = module.CapturedStep(net, optimizer, label_smoothing=0.2).groups
        fused[name] = bool(group['fused'])
        assert group.get('capturable') is (True if name == 'AdamW' else None)
    assert fused == dict(SGD=True, Adagrad=False, AdamW=False)


class Counting(torch.optim.SGD):
    """With a number in its state, as optimizers from papers have it."""

    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group['params']:
                self.state[p]['step'] = self.state[p].get('step', 0) + 1


@MODULES
def test_an_optimizer_with_a_number_in_its_state(module, tiny, passed_through, monkeypatch):
    """Which would stay as it was recorded, or go on in the next training."""

    def make_optimizer(net, h):
        return Counting([p for p in net.parameters() if p.requires_grad], lr=0.01)

    monkeypatch.setattr(module, 'make_optimizer', make_optimizer)
    if module is airbench94_muon:
        monkeypatch.setattr(module, 'make_optimizer', lambda net, h: [make_optimizer(net, h)])
    loader, options = loader_of(module, tiny), dict(SMALL, epochs=1)
    module.train(loader, compile=False, **options)
    with pytest.raises(TypeError, match='state of an optimizer must be tensors, no numbers'):
        for _ in range(2):
            module.train(loader, compile=True, **options)


@MODULES
@pytest.mark.parametrize('name', ['Net', 'make_optimizer', 'train_step'])
def test_code_that_is_replaced_after_a_capture(module, name, tiny, passed_through, monkeypatch):
    """It is used, as it is without a capture; and the real one is again, afterwards."""
    real = getattr(module, name)
    calls = []

    def other(*args, **options):
        calls.append(name)
        return real(*args, **options)

    loader, options = loader_of(module, tiny), dict(SMALL, epochs=1, compile=True)
    before = module.train(loader, seed=1, **options)
    (first,) = module.captured_steps.values()
    monkeypatch.setattr(module, name, other)
    module.train(loader, seed=1, **options)
    # Net is called for the network that is returned, too; the others by what is captured alone.
    assert len(calls) >= (2 if name == 'Net' else 1)
    assert first not in module.captured_steps.values()  # a recording would go on as it was
    monkeypatch.undo()
    monkeypatch.setattr(torch, 'compile', lambda function, **options: function)
    calls.clear()
    assert torch.equal(weights_of(module.train(loader, seed=1, **options)), weights_of(before))
    assert calls == []


@MODULES
@pytest.mark.parametrize('key', ['lr', 'momentum'])
def test_values_that_make_optimizer_has_not_from_h(module, key, tiny, passed_through, monkeypatch):
    """A sweep by a global that it reads: each training has the value of its time."""
    real = module.make_optimizer
    values = {}

    def make_optimizer(net, h):
        made = real(net, h)
        optimizer = made[0] if isinstance(made, list) else made
        for group in optimizer.param_groups:
            group.update(values)
        return made

    monkeypatch.setattr(module, 'make_optimizer', make_optimizer)
    nets = []
    for values[key] in (0.01, 0.5, 0.01):
        nets.append(module.train(loader_of(module, tiny), seed=1, epochs=1, compile=True, **SMALL))
    assert same_state(nets[0], nets[2]) and not same_state(nets[0], nets[1])


@MODULES
def test_a_given_network_is_trained_as_it_is(module, tiny, passed_through):
    """Of other widths, BatchNorm and factor of the logits than the hyperparameters say."""
    h = module.hyp | dict(widths=(8, 12, 20), bn_momentum=0.1, scaling_factor=0.3)
    loader, nets = loader_of(module, tiny), []
    for compile in (False, True):
        torch.manual_seed(0)
        net = module.Net(h)
        module.init_whitening(net, loader.normalize(loader.images[:100]))
        options = dict(SMALL, epochs=1, seed=2, compile=compile, lr=10 * module.hyp['lr'])
        nets.append(module.train(loader, net=net, **options))
        assert nets[-1] is net
    states = [
        torch.cat([x.flatten() for x in net.state_dict().values() if x.is_floating_point()])
        for net in nets
    ]
    module.train(loader, net=module.Net(h, dtype=torch.bfloat16), **options)
    (step,) = module.captured_steps.values()
    assert step.net.autocast  # as the given network, whatever dtype is given
    assert (states[0] - states[1]).norm() / states[0].norm() < 0.01


def test_sizes_that_are_new_are_recorded_before_the_training(tiny, passed_through):
    """Each with the bias trained and frozen, though in this training it is never frozen."""
    loader = loader_of(airbench94_muon, tiny)
    options = dict(SMALL, epochs=1, compile=True)
    airbench94_muon.train(loader, **options)
    (step,) = airbench94_muon.captured_steps.values()
    assert len(step.recordings) == 6
    airbench94_muon.train(loader, sizes=((16, 0.5),), **options)
    assert list(airbench94_muon.captured_steps.values()) == [step]
    added = [(shape[-1], trained) for shape, trained in list(step.recordings)[6:]]
    assert added == [(16, True), (16, False)]


@pytest.mark.parametrize('make', [
    lambda filters: torch.optim.SGD(filters, lr=0.1),
    lambda filters: torch.optim.SGD(filters, lr=0.1, momentum=0.9, nesterov=True),
    lambda filters: torch.optim.AdamW(filters, lr=0.1),
    lambda filters: airbench94_muon.Muon(filters, lr=0.1),
])  # fmt: skip
@pytest.mark.skipif(VERSION < (2, 11), reason='it initialised CUDA even for fake tensors')
def test_optimizers_read_lr_on_the_device(make, monkeypatch):
    """On a GPU that has no memory: FakeTensorMode refuses to read a number, as a capture does."""
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: device)
    # The fake mode does not know this one, whose kernel reads lr on the GPU.
    monkeypatch.setattr(torch, '_fused_sgd_', lambda *args, **options: None)
    real_make_optimizer = airbench94_muon.make_optimizer

    def make_optimizer(net, h):
        sgd, muon = real_make_optimizer(net, h)
        return [sgd, make(muon.param_groups[0]['params'])]

    monkeypatch.setattr(airbench94_muon, 'make_optimizer', make_optimizer)
    net = airbench94_muon.Net(device='meta', dtype=torch.float16)
    with FakeTensorMode():
        for module in net.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.empty_strided(
                        p.shape, p.stride(), dtype=p.dtype, device='cuda:1'
                    )
        optimizers = airbench94_muon.make_optimizer(net, airbench94_muon.hyp)
        monkeypatch.setattr(airbench94_muon.CapturedStep, 'current_addresses', lambda step: [])
        captured = airbench94_muon.CapturedStep(net, optimizers, label_smoothing=0.2)
        assert captured.is_cuda and captured.stream == torch.device('cuda:1')
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        for group in captured.groups:
            group['lr'].fill_(0.1)  # no constant any more, which the fake mode would know
        for optimizer in captured.optimizers:
            optimizer.step()
            optimizer.step()


@pytest.mark.parametrize('module, size, trained, backend', [
    (airbench94_compiled, 32, True, 'aot_eager'),  # its head is for 32 pixels
    (airbench94_compiled, 32, False, 'aot_eager'),
    (airbench94_muon, 24, True, 'inductor'),
    (airbench94_muon, 28, False, 'aot_eager'),
    (airbench94_muon, 32, True, 'aot_eager'),
], ids=lambda value: getattr(value, '__name__', value))  # fmt: skip
def test_gradients_of_the_compiled_network(module, size, trained, backend):
    """With the pool's own gradient, as on CUDA, and all else that a compiler is given there."""
    lacks = module.what_compiling_lacks(torch.device('cpu'))
    if backend == 'inductor' and lacks:
        pytest.skip(lacks)
    torch.manual_seed(0)
    net = module.Net(module.hyp | dict(widths=(8, 16, 16))).train()
    for block in net.blocks:
        block.custom_backward = True
    module.init_whitening(net, torch.randn(50, 3, 32, 32))
    net.whiten.bias.requires_grad_(trained)
    images, labels = torch.randn(20, 3, size, size), torch.arange(20) % 10
    grads = []
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=False)
    for forward in (net, compiled):
        net.zero_grad()
        F.cross_entropy(forward(images), labels, reduction='sum').backward()
        grads.append({name: p.grad for name, p in net.named_parameters() if p.requires_grad})
    assert ('whiten.bias' in grads[0]) == trained
    for name, grad in grads[0].items():
        assert grad.norm() > 0
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-4)


@MODULES
def test_nothing_is_compiled_after_the_warm_up(module, tiny, monkeypatch):
    """All calls go through torch.compile, as on CUDA, though on to no compiler."""
    real_compile, real_net = torch.compile, module.Net

    def compiled(*args, **options):
        net = real_net(*args, **options)
        net.forward = real_compile(net.forward, backend='eager', dynamic=False, fullgraph=True)
        return net

    torch._dynamo.reset()
    loader, test_loader = loader_of(module, tiny), module.CifarLoader(tiny, False, device='cpu')
    options = dict(SMALL, compile=True)
    if module is airbench94_muon:
        options['sizes'] = ((24, 0.5),)
    with monkeypatch.context() as patch:
        patch.setattr(torch, 'compile', lambda function, **options: function)
        patch.setattr(module, 'Net', compiled)
        start = counters['stats']['unique_graphs']
        module.warmup(loader, test_loader, **{key: value for key, value in options.items()
                                              if key != 'verbose'})  # fmt: skip
        before = counters['stats']['unique_graphs']
        assert before >= start + 2
        (of_warmup,) = module.captured_steps.values()
        rows = []
        for seed, epochs in ((0, 2), (1, 5)):
            module.train(
                loader,
                test_loader,
                seed=seed,
                epochs=epochs,
                whiten_bias_epochs=1,
                callback=keep(rows),
                **options,
            )
    assert len(rows) == 3 + 6 and counters['stats']['unique_graphs'] == before
    assert list(module.captured_steps.values()) == [of_warmup]


@pytest.mark.parametrize('device, lacks, words, expected', [
    ('cpu', None, [], None),
    ('cuda', None, [], True),
    ('cuda', 'no Triton', [], None),
    ('cuda', None, ['--compile', 'False'], False),
    ('cpu', None, ['--compile', 'True'], True),
])  # fmt: skip
def test_the_command_line_compiles_on_cuda_alone(
    monkeypatch, capsys, device, lacks, words, expected
):
    """On CUDA where nothing is missing for it, and not where --compile False is said."""
    monkeypatch.setattr(airbench94_muon, 'what_compiling_lacks', lambda device: lacks)
    monkeypatch.setattr(torch, 'device', lambda text: SimpleNamespace(type=text))
    monkeypatch.setattr(torch, 'empty', lambda *args, **options: torch.zeros(1))
    monkeypatch.setattr(sys, 'argv', ['airbench94_muon.py', '--device', device, *words])
    args = airbench94_muon.parse_arguments()
    assert args.h['compile'] is expected and args.runs == (25 if device == 'cuda' else 1)
    note = f'note: not compiled, so slower. {lacks}\n' if lacks else ''
    assert capsys.readouterr() == ('', note)


@pytest.mark.parametrize('module, advice', [
    (airbench94_compiled, 'or use airbench94.py'),
    (airbench94_muon, 'or train without by --compile False'),
])  # fmt: skip
def test_the_command_line_says_what_it_lacks_to_compile(module, advice, monkeypatch):
    monkeypatch.setattr(module, 'what_compiling_lacks', lambda device: 'no Triton')
    monkeypatch.setattr(sys, 'argv', ['script.py', '--device', 'cpu', '--compile', 'True'])
    with pytest.raises(ValueError, match=f'no Triton, {advice}'):
        module.parse_arguments()


ON_CUDA = """
import sys, torch
import airbench94_compiled, airbench94_muon
for script in (airbench94_compiled, airbench94_muon):
    losses = {}
    real_step = script.train_step
    for compile in (False, True):
        loader = script.CifarLoader(sys.argv[1], True, 100, {}, shuffle=False, device='cuda')
        rows = []
        script.warmup(loader, compile=compile, widths=(16, 16, 16))
        for seed in (0, 1):
            net = script.train(loader, seed=seed, epochs=2, whiten_bias_epochs=1,
                               widths=(16, 16, 16), verbose=False, compile=compile,
                               lr=script.hyp['lr'] / 10,
                               callback=lambda net, row: rows.append(row.get('train_loss')))
            # BatchNorm counts the batches, in a replay too, but only in training mode.
            assert net.blocks[0].norm1.num_batches_tracked == 2 * len(loader)
        losses[compile] = torch.tensor([loss for loss in rows if loss])
    assert torch.allclose(losses[False], losses[True], rtol=0.05), losses
    (step,) = script.captured_steps.values()
    assert len(step.recordings) == 2 * len(script.image_sizes(script.hyp))
    static_inputs, static_labels, _ = next(iter(step.recordings.values()))
    torch.cuda.set_sync_debug_mode('error')
    for _ in range(5):
        step(static_inputs.clone(), static_labels, 0.5)
    torch.cuda.set_sync_debug_mode('default')
"""


def test_captured_steps_on_cuda(tiny, cuda):
    done = subprocess.run([sys.executable, '-c', ON_CUDA, tiny], cwd=ROOT, env=CUDA_ENVIRONMENT,
                          capture_output=True, text=True, timeout=400)  # fmt: skip
    assert done.returncode == 0, done.stderr
