"""
The network, its initialisation, the optimiser, the Lookahead and the evaluation, against their
formulas.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import VERSION, Pixel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import airbench94
import airbench94_muon
from airbench94 import (
    Net,
    count_pflops,
    hyp,
    infer,
    init_whitening,
    lookahead_update,
    lr_factor,
    make_optimizer,
    train_step,
)

SMALL = hyp | dict(widths=(8, 8, 8))


def test_size_and_compute():
    assert sum(p.numel() for p in Net().parameters()) == 1_972_792
    forward = count_pflops(hyp | dict(tta_level=0), steps=0, test_size=1) * 1e15
    assert 235e6 < forward < 237e6
    # By hand: twice the multiplications of each convolution and of the linear layer.
    sizes = [
        (3 * 4, 24, 31),
        (24 * 9, 64, 31),
        (64 * 9, 64, 15),
        (64 * 9, 256, 15),
        (256 * 9, 256, 7),
        (256 * 9, 256, 7),
        (256 * 9, 256, 3),
        (256, 10, 1),
    ]
    assert forward == 2 * sum(fan_in * out * size**2 for fan_in, out, size in sizes)
    assert round(count_pflops(hyp, 476, 10_000), 2) == 0.36
    assert count_pflops(hyp, 476, 10_000) == forward * (3 * 476 * 1024 + 6 * 10_000) / 1e15
    assert (
        count_pflops(hyp | dict(tta_level=1, batch_size=10), 7, 50)
        == forward * (3 * 7 * 10 + 2 * 50) / 1e15
    )
    assert (
        count_pflops(hyp | dict(tta_level=0), 0, 1, num_classes=3) * 1e15 == forward - 2 * 7 * 256
    )


def test_the_network_is_the_one_described():
    net = Net().eval()
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        assert norm.eps == 1e-12 and norm.momentum == 0.4
        assert (
            norm.bias.requires_grad and not norm.weight.requires_grad and (norm.weight == 1).all()
        )
    assert not net.whiten.weight.requires_grad and (net.whiten.bias == 0).all()
    nn.init.normal_(net.whiten.bias)
    x = torch.randn(2, 3, 32, 32)
    y = F.gelu(F.conv2d(x, net.whiten.weight, net.whiten.bias))
    for block in net.blocks:
        y = F.max_pool2d(F.conv2d(y, block.conv1.weight, padding=1), 2)
        y = F.gelu(block.norm1(y))
        y = F.gelu(block.norm2(F.conv2d(y, block.conv2.weight, padding=1)))
    y = F.max_pool2d(y, 3).flatten(1) @ net.linear.weight.T / 9
    torch.testing.assert_close(net(x), y)


def test_identity_initialisation():
    for block in Net().blocks:
        for conv in (block.conv1, block.conv2):
            n = conv.weight.size(1)
            x = torch.randn(2, n, 8, 8)
            torch.testing.assert_close(conv(x)[:, :n], x)
            if len(conv.weight) > n:
                assert conv.weight[n:].std() > 0.01


def test_whitening_makes_the_second_moment_diagonal():
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(300, 3, 8, 8), size=32, mode='bilinear').sub(0.47).div(0.25)
    net = Net()
    init_whitening(net, images)
    outputs = F.conv2d(images, net.whiten.weight).permute(0, 2, 3, 1).reshape(-1, 24).double()
    patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 12).double()
    eigenvalues = torch.linalg.eigvalsh(patches.T @ patches / len(patches))
    moment = outputs[:, :12].T @ outputs[:, :12] / len(outputs)
    torch.testing.assert_close(
        moment, torch.diag(eigenvalues / (eigenvalues + 5e-4)), rtol=1e-3, atol=1e-4
    )
    assert torch.equal(net.whiten.weight[12:], -net.whiten.weight[:12])


def test_learning_rates_and_weight_decays():
    net = Net()
    biases, others = make_optimizer(net, hyp | dict(batch_size=512)).param_groups
    k = 1024 * (1 + 1 / (1 - 0.85))
    assert others['lr'] == pytest.approx(11.5 / k) and biases['lr'] == pytest.approx(64 * 11.5 / k)
    for group in (biases, others):
        assert group['weight_decay'] * group['lr'] == pytest.approx(0.0153 * 512 / k)
        assert group['momentum'] == 0.85 and group['nesterov']
    expected = {id(norm.bias) for norm in net.modules() if isinstance(norm, nn.BatchNorm2d)}
    assert {id(p) for p in biases['params']} == expected
    convs = [module.weight for module in net.blocks.modules() if isinstance(module, nn.Conv2d)]
    assert {id(p) for p in others['params']} == {
        id(p) for p in (*convs, net.whiten.bias, net.linear.weight)
    }


@pytest.mark.parametrize('script', [airbench94, airbench94_muon], ids=lambda m: m.__name__)
def test_momentum_may_be_0(script):
    h = script.hyp | dict(momentum=0.0)
    made = script.make_optimizer(script.Net(), h)
    sgd = made[0] if isinstance(made, list) else made
    group = sgd.param_groups[0]
    assert group['lr'] == pytest.approx(h['bias_scaler'] * h['lr'] / 2048)
    assert not group['nesterov']


def test_lr_factor():
    assert lr_factor(0, 476, hyp) == pytest.approx(0.2)
    assert lr_factor(109, 476, hyp) == 1 and int(0.23 * 476) == 109
    assert lr_factor(54.5, 476, hyp) == pytest.approx(0.6)
    assert lr_factor(476, 476, hyp) == pytest.approx(0.07)
    assert lr_factor((109 + 476) / 2, 476, hyp) == pytest.approx(1.07 / 2)
    for total in range(1, 12):
        assert all(0.07 <= lr_factor(step, total, hyp) <= 1 for step in range(total))
    assert lr_factor(0, 1, hyp) == 1


def test_frozen_bias_stays():
    torch.manual_seed(0)
    net = Net(SMALL).train()
    init_whitening(net, torch.randn(50, 3, 32, 32))
    optimizer = make_optimizer(net, SMALL)
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    for _ in range(2):
        train_step(net, optimizer, x, y, 0.2)
    trained = net.whiten.bias.detach().clone()
    assert (trained != 0).any()
    weight = net.whiten.weight.clone()
    net.whiten.bias.requires_grad_(False)
    before = net.linear.weight.detach().clone()
    for _ in range(2):
        train_step(net, optimizer, x, y, 0.2)
    assert torch.equal(net.whiten.bias, trained) and torch.equal(net.whiten.weight, weight)
    assert not torch.equal(net.linear.weight, before)


def test_the_loss_is_the_sum_of_smoothed_cross_entropies():
    net = Net(SMALL).train()
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([1, 5, 5, 9])
    loss, logits = train_step(net, make_optimizer(net, SMALL), x, y, 0.2)
    targets = 0.8 * F.one_hot(y, 10) + 0.2 / 10
    torch.testing.assert_close(loss, -(targets * logits.log_softmax(1)).sum())


def test_lookahead_by_hand():
    net = nn.BatchNorm1d(1)
    state = list(net.state_dict().values())[
        :4
    ]  # weight, bias, running mean and variance; not the count of batches
    average = [tensor.clone() for tensor in state]
    net.bias.data.fill_(10.0)
    net.running_mean.fill_(4.0)
    lookahead_update(average, state, decay=0.75)
    assert net.bias.item() == average[1].item() == 2.5 and net.running_mean.item() == 1.0
    net.bias.data.fill_(8.0)
    lookahead_update(average, state, decay=1.0)
    assert net.bias.item() == 2.5


@pytest.mark.parametrize('y, x', [(13, 7), (0, 0), (31, 16)])
def test_tta_weights(y, x):
    loader = SimpleNamespace(images=torch.rand(5, 3, 32, 32), normalize=lambda images: images)
    image = loader.images
    padded = F.pad(image, (1,) * 4, mode='reflect')

    def pixel_and_mirror(y, x, of, offset=0):
        return (of[:, :, y, x] + of[:, :, y, 31 + 2 * offset - x]) / 2

    net = Pixel(y, x)
    torch.testing.assert_close(infer(net, loader, 0), image[:, :, y, x])
    torch.testing.assert_close(infer(net, loader, 1), pixel_and_mirror(y, x, image))
    up_left = (padded[:, :, y, x] + padded[:, :, y, 31 - x]) / 2
    down_right = (padded[:, :, y + 2, x + 2] + padded[:, :, y + 2, 33 - x]) / 2
    torch.testing.assert_close(
        infer(net, loader, 2), pixel_and_mirror(y, x, image) / 2 + up_left / 4 + down_right / 4
    )


@pytest.mark.parametrize(
    'script', [airbench94, airbench94_muon], ids=lambda script: script.__name__
)
def test_infer_is_in_evaluation_mode_and_leaves_the_mode_as_it_was(script):
    class Recorder(Pixel):
        def __init__(self):
            super().__init__(0, 0)
            self.factor = nn.Parameter(torch.ones(()))
            self.modes = set()

        def forward(self, images):
            self.modes.add(self.training)
            return self.factor * super().forward(images)

    net = Recorder()
    loader = SimpleNamespace(images=torch.rand(5, 3, 32, 32), normalize=lambda images: images)
    for mode in (True, False):
        net.train(mode)
        assert not script.infer(net, loader, 2).requires_grad
        assert net.training == mode
    assert net.modes == {False}


def test_float16_on_the_meta_device():
    """Whole steps of the CUDA recipe, for their dtypes and shapes, at full size."""
    net = Net(device='meta', dtype=torch.float16).train()
    optimizer = make_optimizer(net, hyp)
    for group in optimizer.param_groups:
        group['foreach'] = True  # fused, as on CUDA, there is no implementation for meta tensors
    state = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
    average = [tensor.clone() for tensor in state]
    for bias_trains in (True, False):
        net.whiten.bias.requires_grad_(bias_trains)
        inputs = torch.empty(1024, 3, 32, 32, dtype=torch.float16, device='meta')
        labels = torch.empty(1024, dtype=torch.int64, device='meta')
        loss, logits = train_step(net, optimizer, inputs, labels, hyp['label_smoothing'])
        lookahead_update(average, state, decay=0.5)
        assert (
            loss.dtype == logits.dtype == torch.float32
            and loss.shape == ()
            and logits.shape == (1024, 10)
        )
    for name, p in net.named_parameters():
        assert p.dtype == (torch.float32 if 'norm' in name else torch.float16), name
    momenta = [(p, optimizer.state[p]['momentum_buffer']) for p in optimizer.state]
    assert len(momenta) == 14 and all(buffer.dtype == p.dtype for p, buffer in momenta)
    loader = SimpleNamespace(
        images=torch.empty(10_000, 3, 32, 32, device='meta'), normalize=lambda images: images
    )
    logits = infer(net, loader, tta_level=2)
    assert (
        logits.shape == (10_000, 10)
        and logits.dtype == torch.float32
        and logits.device.type == 'meta'
    )


def test_float16_in_numbers_agrees_with_float32():
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    h = hyp | dict(widths=(16, 16, 16), batch_size=8)
    start = Net(h).state_dict()
    losses = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        net = Net(h, dtype=dtype).train()
        net.load_state_dict(start)
        init_whitening(net, x)
        optimizer = make_optimizer(net, h)
        convolved = set()
        net.blocks[0].conv1.register_forward_hook(
            lambda module, inputs, output, dtypes=convolved: dtypes.add(output.dtype)
        )
        losses[dtype] = torch.stack([train_step(net, optimizer, x, y, 0.2)[0] for _ in range(4)])
        assert losses[dtype].dtype == torch.float32 and net(x).dtype == torch.float32
        assert convolved == {dtype}
    assert losses[torch.float32][-1] < losses[torch.float32][0]
    torch.testing.assert_close(losses[torch.float16], losses[torch.float32], rtol=0.02, atol=0.1)
    torch.testing.assert_close(losses[torch.bfloat16], losses[torch.float32], rtol=0.05, atol=0.1)


def test_a_sum_of_losses_beyond_float16():
    torch.manual_seed(0)
    x, y = torch.randn(160, 3, 32, 32), torch.arange(160) % 100
    h = hyp | dict(widths=(4, 4, 4), batch_size=160)
    net = Net(h, num_classes=100, dtype=torch.float16).train()
    init_whitening(net, x)
    loss, logits = train_step(net, make_optimizer(net, h), x, y, 0.2)
    assert -logits.double().log_softmax(1).sum() > 65_504
    assert loss.isfinite() and all(tensor.isfinite().all() for tensor in net.state_dict().values())


@pytest.mark.skipif(VERSION < (2, 11), reason='it initialised CUDA even for fake tensors')
def test_forward_pass_on_fake_cuda():
    """No tensor of the forward pass is left on the CPU: the fake mode raises where devices mix."""
    net = Net(device='meta', dtype=torch.float16).train()
    with FakeTensorMode():
        for module in net.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = torch.empty_strided(
                            tensor.shape, tensor.stride(), dtype=tensor.dtype, device='cuda'
                        )
        logits = net(torch.empty(64, 3, 32, 32, device='cuda', dtype=torch.float16))
        assert (
            logits.device.type == 'cuda'
            and logits.dtype == torch.float32
            and logits.shape == (64, 10)
        )
        net.linear._parameters['weight'] = torch.empty(10, 256, dtype=torch.float16)
        with pytest.raises(RuntimeError, match='device'):
            net(torch.empty(64, 3, 32, 32, device='cuda', dtype=torch.float16))
