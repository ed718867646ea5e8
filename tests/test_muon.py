"""
airbench94_muon.py: its optimiser, schedule, test-time augmentation and count of compute, against
their formulas.
"""

import functools
import math
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import IS_COUNTED, CountCalls, Pixel
from torch.utils.flop_counter import FlopCounterMode

import airbench94_muon
from airbench94_muon import (
    CifarLoader,
    Muon,
    Net,
    convolve_small_maps,
    count_pflops,
    hyp,
    image_size,
    infer,
    init_whitening,
    make_optimizer,
    merge,
    orthogonalize,
    train,
    train_step,
)

SMALL = dict(widths=(8, 16, 16), batch_size=100, scaling_factor=1 / 16)


def quintic(x):
    return 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5


def newton_schulz(matrix):
    """Three steps by the singular values."""
    u, s, v = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    return u @ torch.diag(quintic(quintic(quintic(s)))) @ v


def test_orthogonalize_maps_singular_values_by_three_quintics():
    torch.manual_seed(0)
    matrix = torch.randn(16, 50, dtype=torch.float64)
    for wide in (matrix, matrix.T):
        torch.testing.assert_close(orthogonalize(wide), newton_schulz(wide), rtol=1e-9, atol=1e-9)
    assert all(0.6 < value < 1.25 for value in torch.linalg.svdvals(orthogonalize(matrix)))


def test_orthogonalize_is_given_bfloat16_only_where_training_has_half_precision(monkeypatch):
    """A CPU without instructions for bfloat16 may train in float32, and is slow at bfloat16."""
    seen = []
    monkeypatch.setattr(
        airbench94_muon, 'orthogonalize', lambda x: (seen.append(x.dtype), orthogonalize(x))[1]
    )
    for dtype, expected in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ):
        net = Net(hyp | SMALL, device='meta', dtype=dtype)
        _, muon = make_optimizer(net, hyp | SMALL)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        seen.clear()
        muon.step()
        assert seen == [expected] * 6


def test_muon_is_for_any_network():
    """Wide and tall matrices, and one that has no gradient; the norms stay free on request."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 20, bias=False), torch.nn.Linear(20, 4, bias=False)
    )
    unused = torch.nn.Parameter(torch.ones(3, 3))
    muon = Muon(
        [*net.parameters(), unused], lr=0.1, momentum=0.5, normalize=False, dtype=torch.float32
    )
    x = torch.randn(50, 6)
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    for _ in range(3):
        before = [p.detach().clone() for p in net.parameters()]
        net.zero_grad()
        net(x).square().sum().backward()
        muon.step()
        for p, old, v in zip(net.parameters(), before, velocity, strict=True):
            v.mul_(0.5).add_(p.grad)
            update = newton_schulz((p.grad + 0.5 * v).double()).float()
            torch.testing.assert_close(p.detach(), old - 0.1 * update, rtol=1e-3, atol=1e-4)
    assert torch.equal(unused, torch.ones(3, 3)) and unused not in muon.state


def plain_logits(weights, inputs, h):
    """The network in so many words."""

    def normed(x, name):
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (
            x.var((0, 2, 3), keepdim=True, correction=0) + 1e-12
        ).sqrt()
        return F.gelu(x + weights[f'{name}.bias'].view(1, -1, 1, 1))

    x = F.gelu(F.conv2d(inputs, weights['whiten.weight'], weights['whiten.bias']))
    for block in ('blocks.0', 'blocks.1', 'blocks.2'):
        padding = int(block != 'blocks.0')
        x = F.conv2d(x, weights[f'{block}.conv1.weight'], padding=padding)
        x = normed(x if block == 'blocks.2' else F.max_pool2d(x, 2), f'{block}.norm1')
        x = F.conv2d(x, weights[f'{block}.conv2.weight'], padding=padding)
        x = normed(F.max_pool2d(x, 2) if block == 'blocks.1' else x, f'{block}.norm2')
    return x.amax((2, 3)) @ weights['linear.weight'].T * h['scaling_factor']


def test_six_steps_are_those_of_the_plain_formulation(tiny, monkeypatch):
    """
    Losses and weights in float64, Muon filter by filter. A step before the last freezes the
    whitening bias.
    """
    monkeypatch.setattr(torch.Tensor, 'float', torch.Tensor.double)
    torch.manual_seed(0)
    h, scale = hyp | SMALL | dict(batch_size=10), 1024 * (1 + 1 / 0.15)
    loader = CifarLoader(tiny, True, 10, dict(flip=True))
    net = Net(h, dtype=torch.float64).train()
    init_whitening(net, loader.normalize(loader.images))
    optimizers = make_optimizer(net, h)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group['lr'] for group in groups]
    weights = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    velocity = {name: torch.zeros_like(weights[name]) for name in trained}
    for (inputs, labels), step in zip(loader, range(6), strict=False):
        inputs = inputs[..., 4:28, 4:28] if step < 3 else inputs
        for group, peak in zip(groups, peaks, strict=True):
            group['lr'] = peak * (1 - step / 6)
        if step == 4:
            net.whiten.bias.requires_grad_(False)
            trained.remove('whiten.bias')
        loss, _ = train_step(net, optimizers, inputs, labels, h['label_smoothing'])
        for name in trained:
            weights[name].requires_grad_()
        plain = F.cross_entropy(
            plain_logits(weights, inputs, h), labels, label_smoothing=0.2, reduction='sum'
        )
        grads = torch.autograd.grad(plain, [weights[name] for name in trained])
        assert loss.item() == pytest.approx(plain.item(), rel=1e-9)
        for name, grad in zip(trained, grads, strict=True):
            weight = weights[name] = weights[name].detach()
            if 'conv' in name:
                velocity[name] = 0.6 * velocity[name] + grad
                update = newton_schulz((grad + 0.6 * velocity[name]).flatten(1)).view_as(weight)
                weights[name] = (
                    weight * len(weight) ** 0.5 / weight.norm()
                    - hyp['muon_lr'] * (1 - step / 6) * update
                )
            else:
                peak = 2.9 / scale if name == 'linear.weight' else 2.9 * 144 / scale
                grad = grad + 0.0153 * 10 / scale / peak * weight
                velocity[name] = 0.85 * velocity[name] + grad
                weights[name] = weight - peak * (1 - step / 6) * (grad + 0.85 * velocity[name])
    for name in weights:
        if weights[name].is_floating_point() and 'running' not in name:
            difference = (net.state_dict()[name] - weights[name]).norm() / weights[name].norm()
            assert difference < 1e-8, (name, difference)


@pytest.mark.parametrize('side, products', [(1, 1), (2, 16), (3, 63)])
def test_convolutions_of_small_maps(side, products):
    """Values, gradients, layout; and the products for each image and pair of channels."""
    torch.manual_seed(0)
    images = torch.randn(5, 4, side, side, dtype=torch.float64)
    images = images.to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        found = convolve_small_maps(images, weight)
    assert counter.get_total_flops() == 2 * 5 * 4 * 6 * products
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = F.conv2d(images, weight, padding=1)
    torch.testing.assert_close(found, expected)
    by = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (images, weight), by),
        torch.autograd.grad(expected, (images, weight), by),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_needless_products_are_not_computed():
    """
    What a pool would drop, and the padding of small maps. The logits are those of convolutions that
    compute it all, for images of odd and even size.
    """
    torch.manual_seed(0)
    h = hyp | SMALL
    net, whole = Net(h).eval(), Net(h).eval()
    whole.load_state_dict(net.state_dict())
    for module in whole.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.forward = functools.partial(torch.nn.Conv2d.forward, module)
    for size in range(12, 33):
        images = torch.randn(2, 3, size, size)
        with FlopCounterMode(display=False) as counter:
            logits = net(images)
        torch.testing.assert_close(logits, whole(images))
        if size < 17:
            continue  # block 2 has small maps too
        side = ((size - 2) // 2 - 1) // 2 * 2  # of block 2's maps before the first pool, then
        for conv, filters in (('conv1', 16 * 8), ('conv2', 16 * 16)):
            flops = counter.get_flop_counts()[f'Net.blocks.1.{conv}']
            assert sum(flops.values()) == 2 * 2 * side**2 * 9 * filters
            if conv == 'conv1':
                side = side // 2 // 2 * 2
        products = {1: 1, 2: 16, 3: 63}[side // 2]  # of each pair of channels in block 3
        for conv in ('conv1', 'conv2'):
            flops = counter.get_flop_counts()[f'Net.blocks.2.{conv}']
            assert sum(flops.values()) == 2 * 2 * products * 16 * 16


def test_the_filters_of_each_block():
    """
    A first convolution at most doubles the channels; Muon's author's lr of head and biases, in the
    paper's units.
    """
    net = Net()
    assert [tuple(p.shape[:3]) for p in net.blocks.parameters() if p.ndim == 4] == [
        (48, 24, 2),
        (72, 48, 2),
        (144, 72, 3),
        (288, 144, 3),
        (384, 288, 3),
        (384, 384, 3),
    ]
    biases, head = make_optimizer(net, hyp)[0].param_groups
    assert biases['lr'] == pytest.approx(0.053, rel=0.01)
    assert head['lr'] == pytest.approx(
        0.67 * (9 / 384) ** 2, rel=0.01
    )  # his logits: divided by 384, not by 9
    assert biases['lr'] * biases['weight_decay'] == pytest.approx(2e-6 * 2000, rel=0.03)


def test_the_schedule_of_image_sizes_and_lr(tiny, monkeypatch):
    seen, real_step = [], train_step
    monkeypatch.setattr(
        airbench94_muon,
        'train_step',
        lambda net, optimizer, inputs, *rest: (
            seen.append(tuple(inputs.shape)),
            real_step(net, optimizer, inputs, *rest),
        )[1],
    )
    loader = CifarLoader(tiny, True, 100, hyp['aug'])
    train(loader, epochs=20 / 11, verbose=False, dtype=torch.float32, **SMALL)
    assert [shape[-1] for shape in seen] == [22] * 6 + [26] * 6 + [32] * 8
    assert all(shape == (100, 3, shape[-1], shape[-1]) for shape in seen)
    assert [image_size(step, 263, hyp) for step in (0, 78, 79, 157, 158, 262)] == [
        22,
        22,
        26,
        26,
        32,
        32,
    ]
    # A straight line from 1 at the first step to 0.05 at step 24 of 25, then constant.
    factors = [airbench94_muon.lr_factor(step, 25, hyp) for step in (0, 12, 23, 24)]
    assert factors == pytest.approx([1, 0.525, 0.05 + 0.95 / 24, 0.05])
    longer = hyp | dict(lr_peak=0.2, lr_start=0.5, lr_end=0.2, lr_tail=0.4)
    factors = [airbench94_muon.lr_factor(step, 10, longer) for step in (0, 1, 2, 4, 6, 9)]
    assert factors == pytest.approx([0.5, 0.75, 1, 0.6, 0.2, 0.2])


@pytest.mark.filterwarnings('ignore:Detected call of `lr_scheduler')  # as no step is taken
def test_images_are_reduced_whole(tiny, monkeypatch):
    """Bilinearly: a step on smaller images sees what the loader yields, all of it."""
    seen = []
    monkeypatch.setattr(
        airbench94_muon,
        'train_step',
        lambda net, optimizers, inputs, labels, *rest: (
            seen.append(inputs),
            (torch.zeros(()), torch.zeros(len(labels), 10)),
        )[1],
    )
    loader = CifarLoader(tiny, True, 100, hyp['aug'])
    train(loader, sizes=((16, 1.0),), epochs=1, seed=3, verbose=False, dtype=torch.float32, **SMALL)
    torch.manual_seed(3)
    Net(hyp | SMALL)
    for inputs, whole in zip(seen, loader, strict=True):
        # At half of the side a pixel lies between four, and is their mean.
        torch.testing.assert_close(inputs, F.avg_pool2d(whole[0], 2))


@pytest.mark.filterwarnings('ignore:Detected call of `lr_scheduler')  # as no step is taken
@pytest.mark.parametrize('lr_tail', [0.0, 0.28, 0.35, 0.98])
def test_lookahead_in_the_last_steps_only(tiny, monkeypatch, lr_tail):
    """On the bias of the whitening layer, which a step adds 1 to here."""
    after = []

    def add_one(net, optimizers, inputs, labels, *rest):
        after.append(net.whiten.bias.mean().item())  # of the step before
        net.whiten.bias.data.add_(1.0)
        return torch.zeros(()), torch.zeros(len(labels), 10)

    monkeypatch.setattr(airbench94_muon, 'train_step', add_one)
    loader = CifarLoader(tiny, True, 100, hyp['aug'])
    options = dict(lr_tail=lr_tail, epochs=20 / 11, lookahead_every=3, lookahead_decay=0.5)
    net = train(loader, verbose=False, dtype=torch.float32, **SMALL, **options)
    after.append(net.whiten.bias.mean().item())
    start = {0.0: 20, 0.28: 14, 0.35: 13, 0.98: 0}[lr_tail]
    value = average = 0.0
    for step in range(1, 21):
        value += 1
        if step <= start:
            average = value
        elif (20 - step) % 3 == 0:
            value = average = (value + average) / 2
        assert after[step] == pytest.approx(value), step


@pytest.mark.parametrize(
    'key, value',
    [
        ('sizes', ((24, 0.5), (40, 0.9))),
        ('sizes', ((11, 0.1),)),
        ('sizes', ((24.0, 0.4),)),
        ('sizes', ((24, math.nan),)),
        ('sizes', (24, 0.4)),
        ('sizes', 24),
        ('sizes', ((24, 1.5),)),
        ('sizes', ((24, -0.5),)),
        ('lr_tail', 1.0),
        ('lookahead_every', 0),
        ('lookahead_decay', 1.5),
        ('muon_momentum', 1),
        ('muon_lr', 0),
        ('muon_lr', math.nan),
        ('muon_lr', math.inf),
        ('bias_scaler', -1),
    ],
)
def test_values_that_make_no_sense(key, value):
    with pytest.raises(ValueError, match=f'{key} must be'):
        merge({key: value})


def test_the_rise_of_lr_and_its_tail_cannot_overlap():
    assert merge(dict(lr_peak=0.5, lr_tail=0.5))
    with pytest.raises(ValueError, match='lr_tail must be at most 1 - lr_peak, not 0.6'):
        merge(dict(lr_peak=0.5, lr_tail=0.6))


def test_translations_for_the_least_sure_eighth():
    torch.manual_seed(0)
    loader = SimpleNamespace(images=torch.rand(41, 3, 32, 32), normalize=lambda images: images)
    net, image = Pixel(13, 7), loader.images
    pair = (image[:, :, 13, 7] + image[:, :, 13, 24]) / 2
    torch.testing.assert_close(infer(net, loader, 0), image[:, :, 13, 7])
    torch.testing.assert_close(infer(net, loader, 1), pair)
    best = pair.softmax(1).sort(1).values
    unsure = (best[:, -1] - best[:, -2]).argsort()[:6]  # an eighth, rounded up
    around = (image[:, :, 12:15, 6:9].sum((2, 3)) + image[:, :, 12:15, 23:26].sum((2, 3))) / 2
    logits = infer(net, loader, 2)
    pair[unsure] = (around + pair)[
        unsure
    ] / 10  # the pair counts twice, each of the eight translations once
    torch.testing.assert_close(logits, pair)


def test_pflops_are_those_of_a_whole_run(tiny, monkeypatch):
    """
    Every forward pass and every orthogonalisation of a training and its evaluation, counted as they
    happen.
    """
    flops, real_forward, real_orthogonalize = Counter(), Net.forward, orthogonalize

    def counted(kind, function, *args):
        with FlopCounterMode(display=False) as counter:
            result = function(*args)
        flops[kind] += counter.get_total_flops()
        return result

    monkeypatch.setattr(
        Net,
        'forward',
        lambda net, x: counted('training' if net.training else 'evaluation', real_forward, net, x),
    )
    monkeypatch.setattr(
        airbench94_muon, 'orthogonalize', lambda x: counted('muon', real_orthogonalize, x)
    )
    h = merge(SMALL | dict(epochs=20 / 11))
    net = train(
        CifarLoader(tiny, True, 100, hyp['aug']),
        verbose=False,
        dtype=torch.float32,
        epochs=20 / 11,
        **SMALL,
    )
    infer(net, CifarLoader(tiny, False), 2)
    counts = dict(flops)
    assert set(counts) == {'training', 'evaluation', 'muon'} and min(counts.values()) > 0
    monkeypatch.undo()
    assert (
        count_pflops(h, 20, 96) * 1e15
        == 3 * counts['training'] + counts['evaluation'] + counts['muon']
    )
    assert count_pflops(h, 20, 0) * 1e15 == 3 * counts['training'] + counts['muon']
    tested = [count_pflops(h | dict(tta_level=level), 0, 96) for level in (0, 1, 2)]
    assert tested == [tested[0], 2 * tested[0], 4 * tested[0]]
    assert count_pflops(h | dict(tta_level=0, aug={}), 0, 96) == tested[0] > 0
    assert count_pflops(h | dict(tta_level=1, aug={}), 0, 96) == tested[0]


@pytest.mark.parametrize('dtype', (torch.float32, torch.float16))
@pytest.mark.parametrize('size', (12, 22, 26, 31))
def test_images_are_reduced_as_by_interpolate(size, dtype):
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reduced = airbench94_muon.resize(images.to(dtype), size)
    expected = F.interpolate(images, size=size, mode='bilinear')
    assert reduced.dtype == dtype and reduced.shape == expected.shape
    assert (reduced.float() - expected).abs().max() < 4 * torch.finfo(dtype).eps


def test_a_recorded_step_updates_each_weight_on_its_own_stream(monkeypatch):
    """Each stream waits for what was before the step, and what comes after waits for each."""
    log = []

    class Stream:
        def __init__(self, device='cpu'):
            self.device = device
            self.name = f'stream {len(streams)}'
            streams.append(self)

        def wait_stream(self, other):
            log.append(f'{self.name} waits for {other.name}')

    @contextmanager
    def enter(stream):
        log.append(f'{stream.name} begins')
        yield
        log.append(f'{stream.name} ends')

    streams = []
    current = Stream()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: current)
    monkeypatch.setattr(torch.cuda, 'Stream', Stream)
    monkeypatch.setattr(torch.cuda, 'stream', enter)
    weights = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
    others = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    for weight, other in zip(weights, others, strict=True):
        weight.grad = torch.randn(4, 3)
        other.grad = weight.grad
    weights[1].grad = None
    muon = Muon(weights, lr=0.1, dtype=torch.float32)
    muon.step()
    assert log == [
        *('stream 1 waits for stream 0', 'stream 1 begins', 'stream 1 ends'),
        *('stream 2 waits for stream 0', 'stream 2 begins', 'stream 2 ends'),
        *('stream 0 waits for stream 1', 'stream 0 waits for stream 2'),
    ]
    # Also after an error: else the capture could not end, and would hide the error.
    with monkeypatch.context() as patch:
        patch.setattr(muon, 'update', lambda *args: {}['memory'])
        with pytest.raises(KeyError, match='memory'):
            muon.step()
    assert log[8:] == [
        'stream 1 waits for stream 0',
        'stream 1 begins',
        'stream 0 waits for stream 1',
    ]
    del log[8:]
    # The next recording has the same streams. If it had new ones, the 32nd of them would be the
    # recording's own, on which nothing else runs meanwhile.
    muon.step()
    assert log[8:] == log[:8]
    monkeypatch.undo()
    muon = Muon(others, lr=0.1, dtype=torch.float32)
    muon.step()
    muon.step()
    assert weights[0].equal(others[0]) and weights[2].equal(others[2])


def test_float16_steps_on_the_meta_device():
    """Whole steps of the CUDA recipe at full size: dtypes, and how many calls."""
    net = Net(device='meta', dtype=torch.float16).train()
    optimizers = make_optimizer(net, hyp)
    for group in optimizers[0].param_groups:
        group['foreach'] = True  # fused, as on CUDA, there is no implementation for meta tensors
    labels = torch.empty(2000, dtype=torch.int64, device='meta')
    for size in (22, 26, 32):
        inputs = torch.empty(2000, 3, size, size, dtype=torch.float16, device='meta')
        with CountCalls() as counted:
            loss, logits = train_step(net, optimizers, inputs, labels, hyp['label_smoothing'])
        assert (
            loss.dtype == logits.dtype == torch.float32
            and loss.shape == ()
            and logits.shape == (2000, 10)
        )
        net.whiten.bias.requires_grad_(False)
    assert all(
        p.dtype == (torch.float32 if 'norm' in name else torch.float16)
        for name, p in net.named_parameters()
    )
    calls = Counter(counted.calls)
    assert calls['aten.addmm.default'] == 6 * 3 * 2  # 6 filters, no two of a shape, 3 steps
    if IS_COUNTED:
        assert len(counted.calls) <= 284, calls  # 277 in PyTorch 2.14, and 4 more in 2.11
    assert not {
        call for call in calls if 'local_scalar' in call or 'nonzero' in call
    }  # which wait for the GPU
