"""What researchers change: callbacks, networks, optimizers, other data, indices, gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import EACH_TRAIN, Pixel, keep
from torch.func import functional_call, grad, vmap

import airbench
import airbench94
import airbench94_compiled
import airbench94_muon
from airbench94 import CifarLoader, hyp, infer, train

SMALL = dict(widths=(8, 8, 8), dtype=torch.float32, verbose=False)


# By default airbench94_compiled.py compiles, which takes long.
pytestmark = pytest.mark.usefixtures('passed_through')


def loader_of(module, tiny, aug=None):
    """Eleven steps an epoch."""
    aug = module.hyp['aug'] if aug is None else aug
    loader = module.CifarLoader(tiny, batch_size=10, aug=aug, device='cpu')
    loader.images, loader.labels = loader.images[:110], loader.labels[:110]
    return loader


@EACH_TRAIN
def test_a_callback_sees_each_epochs_network(module, tiny):
    logits, epochs = [], []
    test_loader = module.CifarLoader(tiny, train=False)

    def callback(net, row):
        epochs.append(row['epoch'])
        logits.append(module.infer(net, test_loader))

    net = module.train(loader_of(module, tiny), test_loader, epochs=2, callback=callback, **SMALL)
    assert epochs == [1, 2, 'eval'] and not torch.equal(logits[0], logits[1])
    torch.testing.assert_close(module.infer(net, test_loader), logits[2])


@EACH_TRAIN
@pytest.mark.parametrize('epoch', (1, 'eval'))
def test_a_callback_that_changes_the_tensors_of_the_network(module, epoch, tiny):
    """Lookahead would go on with the old ones, silently. At the end it does no harm."""

    def callback(net, row):
        if row['epoch'] == epoch:
            net.double().float()  # as net.cpu().cuda()

    options = dict(SMALL, epochs=2, callback=callback)
    if epoch == 'eval':
        module.train(loader_of(module, tiny), **options)
    else:
        with pytest.raises(RuntimeError, match='callback must not move net'):
            module.train(loader_of(module, tiny), **options)


@pytest.mark.parametrize('module', [airbench94, airbench94_muon], ids=lambda m: m.__name__)
def test_a_callback_that_adds_to_the_network(module, tiny):
    """A module that is kept in an attribute is part of the network, and of no training."""

    def callback(net, row):
        net.best = copy.deepcopy(net.linear)

    first, second = (
        module.train(loader_of(module, tiny), epochs=2, seed=1, callback=each, **SMALL)
        for each in (callback, lambda net, row: None)
    )
    assert first.linear.weight.equal(second.linear.weight)


@EACH_TRAIN
def test_a_network_that_is_given_is_trained_in_place(module, tiny):
    """Its first layer as it is; its bias is trained again, though it was frozen."""
    loader = loader_of(module, tiny)
    net = module.train(loader, epochs=2, whiten_bias_epochs=1, seed=1, **SMALL)
    before = copy.deepcopy(net.state_dict())
    assert not net.whiten.bias.requires_grad or module is airbench94_compiled
    options = dict(SMALL, epochs=2, whiten_bias_epochs=1)
    loader.images = loader.images**2  # which would be whitened otherwise
    assert module.train(loader, net=net, seed=2, **options) is net and not net.training
    after = net.state_dict()
    assert torch.equal(after['whiten.weight'], before['whiten.weight'])
    for name in ('whiten.bias', 'linear.weight', 'blocks.0.conv1.weight'):
        assert not torch.equal(after[name], before[name]), name


@EACH_TRAIN
def test_one_initialisation_with_two_orders_of_the_data(module, tiny):
    torch.manual_seed(0)
    loader = loader_of(module, tiny)
    start = module.Net(module.hyp | dict(widths=(8, 8, 8)))
    module.init_whitening(start, loader.normalize(loader.images))
    nets = [module.train(loader, net=copy.deepcopy(start), seed=seed, epochs=1, **SMALL)
            for seed in (1, 1, 2)]  # fmt: skip
    weights = [net.linear.weight for net in nets]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert all(torch.equal(net.whiten.weight, start.whiten.weight) for net in nets)


@pytest.mark.parametrize('make', [
    lambda net, h: torch.optim.AdamW(net.parameters(), lr=0.01),
    lambda net, h: torch.optim.RMSprop(net.parameters(), lr=0.001),
    lambda net, h: torch.optim.SGD(net.parameters(), lr=0.001),
])  # fmt: skip
def test_an_optimizer_of_ones_own(tiny, monkeypatch, make):
    """Assigned to the module; its lr follows the schedule."""
    seen, real_step = [], airbench94.train_step

    def step(net, optimizer, *args):
        seen.append((type(optimizer), optimizer.param_groups[0]['lr']))
        return real_step(net, optimizer, *args)

    monkeypatch.setattr(airbench94, 'make_optimizer', make)
    monkeypatch.setattr(airbench94, 'train_step', step)
    net = train(loader_of(airbench94, tiny), epochs=1, **SMALL)
    optimizer = make(net, hyp)
    lr = optimizer.param_groups[0]['lr']
    assert len(seen) == 11 and {kind for kind, _ in seen} == {type(optimizer)}
    factors = [airbench94.lr_factor(i, 11, hyp) for i in range(11)]
    assert [rate for _, rate in seen] == pytest.approx([lr * factor for factor in factors])


def test_a_list_of_optimizers_in_airbench94_muon(tiny, monkeypatch):
    """All of them take steps: without one, what it would train stays as it was."""
    module = airbench94_muon
    real_optimizer = module.make_optimizer

    def both(net, h):
        sgd, muon = real_optimizer(net, h)
        return [sgd, torch.optim.AdamW(muon.param_groups[0]['params'], lr=0.01)]

    torch.manual_seed(0)
    start = module.Net(module.hyp | dict(widths=(8, 8, 8)))
    for taken, head, filters in (
        (slice(0, 2), True, True),
        (slice(0, 1), True, False),
        (slice(1, 2), False, True),
    ):
        monkeypatch.setattr(module, 'make_optimizer', lambda *args, taken=taken: both(*args)[taken])
        net = copy.deepcopy(start)
        module.train(loader_of(module, tiny), net=net, epochs=1, seed=0, **SMALL)
        assert torch.equal(net.linear.weight, start.linear.weight) != head
        conv, before = net.blocks[0].conv1, start.blocks[0].conv1
        assert torch.equal(conv.weight, before.weight) != filters


@EACH_TRAIN
def test_a_parameter_that_is_added_is_trained(module, tiny, monkeypatch):
    """Such as a scale, or a matrix in a block."""

    class Added(module.Net):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.scale = torch.nn.Parameter(torch.ones(10))
            self.blocks[0].matrix = torch.nn.Parameter(torch.eye(10))

        def forward(self, x):
            return super().forward(x) @ self.blocks[0].matrix * self.scale

    monkeypatch.setattr(module, 'Net', Added)
    net = module.train(loader_of(module, tiny), epochs=1, seed=0, **SMALL)
    assert not torch.equal(net.scale, torch.ones(10))
    assert not torch.equal(net.blocks[0].matrix, torch.eye(10))
    assert net.whiten.weight.grad is None


@EACH_TRAIN
def test_the_mean_and_std_of_other_data(module, tiny):
    """Three numbers each; train gives them to the test loader."""
    loader = loader_of(module, tiny, aug={})
    loader.mean, loader.std = (0.5, 0.25, 0.125), [2.0, 1.0, 0.5]
    images = loader.images[:5]
    normalised = loader.normalize(images)
    for channel, (mean, std) in enumerate(((0.5, 2.0), (0.25, 1.0), (0.125, 0.5))):
        torch.testing.assert_close(normalised[:, channel], (images[:, channel] - mean) / std)
    rows, test_loader = [], module.CifarLoader(tiny, train=False)
    net = module.train(loader, test_loader, epochs=2, seed=0, callback=keep(rows), **SMALL)
    test_loader.mean, test_loader.std = loader.mean, loader.std
    assert module.evaluate(net, test_loader, 2, mirror=False) == rows[-1]['tta_val_acc']
    assert loader.mean == (0.5, 0.25, 0.125)


def test_images_of_one_channel(tiny):
    loader = CifarLoader(tiny, batch_size=100, aug=hyp['aug'], device='cpu')
    grey = loader.images.mean(1, keepdim=True)
    loader.images = grey
    with pytest.raises(ValueError, match=r'one channel, by .expand\(-1, 3, -1, -1\)'):
        train(loader, epochs=1, **SMALL)
    loader.images = grey.expand(-1, 3, -1, -1)
    test_loader = CifarLoader(tiny, train=False)
    test_loader.images = test_loader.images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    rows = []
    train(loader, test_loader, epochs=2, seed=0, callback=keep(rows), **SMALL)
    assert rows[1]['train_loss'] < rows[0]['train_loss'] < 4


@EACH_TRAIN
def test_digits_are_not_mirrored(module, tiny, monkeypatch):
    """Neither in training nor in the evaluation, and the compute says so."""
    seen = []
    real = module.evaluate

    def remember(net, loader, tta_level=0, mirror=True):
        seen.append((tta_level, mirror))
        return real(net, loader, tta_level, mirror)

    monkeypatch.setattr(module, 'evaluate', remember)
    for aug in (dict(translate=2), dict(flip=True)):
        module.train(loader_of(module, tiny, aug), epochs=1, callback=keep([]), **SMALL)
    assert seen[1] == (2, False) and seen[3] == (2, True)
    net, loader = Pixel(3, 7), module.CifarLoader(tiny, train=False)
    images = loader.normalize(loader.images)
    torch.testing.assert_close(module.infer(net, loader, 1, mirror=False), images[:, :, 3, 7])
    around = images[:, :, 2:5, 6:9]
    both = module.infer(net, loader, 2, mirror=False)
    if module is airbench94_muon:
        image = images[:, :, 3, 7]
        best, second = image.softmax(1).topk(2).values.unbind(1)
        unsure = (best - second).argsort()[:12]
        expected = image.clone()
        expected[unsure] = ((around.sum((2, 3)) + image) / 10)[unsure]
    else:
        corners = (around[:, :, 0, 0] + around[:, :, 2, 2]) / 4
        expected = images[:, :, 3, 7] / 2 + corners
    torch.testing.assert_close(both, expected)
    tested = [module.count_pflops(module.hyp | dict(aug=aug), 0, 10)
              for aug in (dict(flip=True), {})]  # fmt: skip
    assert tested[0] == 2 * tested[1]


def test_the_indices_of_a_batch(tiny):
    """As the docstring says: labels that are indices, and the labels by them."""
    loader = loader_of(airbench94, tiny, aug={})
    labels = loader.labels
    loader.labels = torch.arange(len(labels), device=labels.device)
    for inputs, indices in loader:
        assert torch.equal(inputs, loader.normalize(loader.images[indices]))
        assert labels[indices].max() < 10
    assert len(indices) == 10


@pytest.mark.parametrize('module', [airbench94, airbench94_muon], ids=lambda m: m.__name__)
def test_gradients_per_example_by_torch_func(module, tiny):
    torch.manual_seed(0)
    net = module.Net(module.hyp | dict(widths=(8, 8, 8))).eval()
    loader = loader_of(module, tiny)
    module.init_whitening(net, loader.normalize(loader.images))
    images, labels = loader.normalize(loader.images[:6]), loader.labels[:6]
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def loss(weights, image, label):
        logits = functional_call(net, weights, image[None])
        return F.cross_entropy(logits, label[None])

    grads = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images, labels)
    for i in range(6):
        net.zero_grad()
        F.cross_entropy(net(images[i : i + 1]), labels[i : i + 1]).backward()
        for name, p in net.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(grads[name][i], p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name, here', [
    ('learning_rate', 'lr'), ('make_net', 'net'), ('run', 'seed'), ('gpu', 'device'),
    ('train_epochs', 'epochs'), ('data', 'train_loader')])  # fmt: skip
def test_the_originals_names_are_answered(name, here, tiny):
    with pytest.raises(TypeError, match=f'there is no {name}: here it is called {here}'):
        airbench.train94(loader_of(airbench94, tiny), **{name: 1})


def test_the_originals_momentum_of_batchnorm_is_not_that_of_here(tiny):
    with pytest.raises(TypeError, match='no batchnorm_momentum: bn_momentum is 1 minus it'):
        airbench.train94(loader_of(airbench94, tiny), batchnorm_momentum=0.6)


def test_many_networks(tiny):
    """The same loader for all; their mean predicts."""
    loader, test_loader = loader_of(airbench94, tiny), CifarLoader(tiny, train=False)
    logits = torch.stack(
        [infer(train(loader, seed=seed, epochs=1, **SMALL), test_loader) for seed in range(3)]
    )
    assert logits.mean(0).shape == (96, 10) and logits.std(0).min() > 0
