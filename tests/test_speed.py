"""
What makes a step fast may not change its mathematics, nor add to the ATen calls, which are kernels
on a GPU.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import CUDA_ENVIRONMENT, IS_COUNTED, ROOT, CountCalls

import airbench94
import airbench96


def plain_loss(weights, inputs, labels, h):
    """The network and its loss in so many words, contiguous and without modules."""

    def normed(x, name):
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (
            x.var((0, 2, 3), keepdim=True, correction=0) + 1e-12
        ).sqrt()
        x = x + weights[f'{name}.bias'].view(1, -1, 1, 1)
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    x = F.conv2d(inputs.contiguous(), weights['whiten.weight'], weights['whiten.bias'])
    x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    for block in (f'blocks.{i}' for i in range(3)):
        x = first = normed(
            F.max_pool2d(F.conv2d(x, weights[f'{block}.conv1.weight'], padding=1), 2),
            f'{block}.norm1',
        )
        x = normed(F.conv2d(x, weights[f'{block}.conv2.weight'], padding=1), f'{block}.norm2')
        if f'{block}.conv3.weight' in weights:
            x = (
                normed(F.conv2d(x, weights[f'{block}.conv3.weight'], padding=1), f'{block}.norm3')
                + first
            )
    logits = x.amax((2, 3)) @ weights['linear.weight'].T * h['scaling_factor']
    targets = (
        F.one_hot(labels, 10).to(logits) * (1 - h['label_smoothing']) + h['label_smoothing'] / 10
    )
    return -(targets * logits.log_softmax(1)).sum()


@pytest.mark.parametrize('script', [airbench94, airbench96], ids=lambda script: script.__name__)
def test_ten_steps_are_those_of_the_plain_formulation(script, tiny, monkeypatch):
    """
    Losses and weights, the momentum and the decay included. In float64, and without cutout, in
    whose squares values are equal: whose gradient max-pooling takes then depends on the processor.
    """
    monkeypatch.setattr(torch.Tensor, 'float', torch.Tensor.double)
    torch.manual_seed(0)
    lr, momentum, weight_decay = (
        script.hyp['lr'] / 10,
        script.hyp['momentum'],
        script.hyp['weight_decay'],
    )
    h = script.hyp | dict(widths=(8, 12, 16), batch_size=10, lr=lr)
    loader = script.CifarLoader(tiny, True, 10, dict(flip=True, translate=h['aug']['translate']))
    net = script.Net(h, dtype=torch.float64).train()
    script.init_whitening(net, loader.normalize(loader.images))
    optimizer = script.make_optimizer(net, h)
    scale = 1024 * (1 + 1 / (1 - momentum))  # the paper's
    weights = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    velocity = {name: torch.zeros_like(weights[name]) for name in trained}
    for (inputs, labels), _ in zip(loader, range(10), strict=False):
        loss, _ = script.train_step(net, optimizer, inputs, labels, h['label_smoothing'])
        assert loss.dtype == torch.float64
        for name in trained:
            weights[name].requires_grad_()
        plain = plain_loss(weights, inputs, labels, h)
        grads = torch.autograd.grad(plain, [weights[name] for name in trained])
        assert loss.item() == pytest.approx(plain.item(), rel=1e-9)
        for name, grad in zip(trained, grads, strict=True):
            step = lr / scale * (h['bias_scaler'] if 'norm' in name else 1)
            grad = grad + weight_decay * 10 / scale / step * weights[name].detach()
            velocity[name] = momentum * velocity[name] + grad
            weights[name] = weights[name].detach() - step * (grad + momentum * velocity[name])
    for name in trained:
        difference = (net.state_dict()[name] - weights[name]).norm() / weights[name].norm()
        assert difference < 1e-9, (name, difference)


@pytest.mark.skipif(not IS_COUNTED, reason='the calls were counted on PyTorch 2.11 and 2.14')
@pytest.mark.parametrize(
    'script, step_calls, loader_calls',
    [
        (airbench94, 92, 17),
        (airbench96, 119, 29),
    ],  # of a step 4 fewer in PyTorch 2.14
    ids=lambda value: getattr(value, '__name__', None),
)
def test_the_number_of_calls_on_the_path_of_cuda(script, step_calls, loader_calls, tiny):
    hyp = script.hyp
    net = script.Net(device='meta', dtype=torch.float16)
    net.whiten.bias.requires_grad_(False)
    optimizer = script.make_optimizer(net, hyp)
    for group in optimizer.param_groups:
        group['foreach'] = True  # fused, as on CUDA, there is no implementation for meta tensors
    loader = script.CifarLoader(tiny, True, hyp['batch_size'], hyp['aug'], device='meta')
    loader.images = loader.images.half()
    batches = iter(loader)
    with CountCalls() as in_loader:
        inputs, labels = next(batches)
    script.train_step(net, optimizer, inputs, labels, hyp['label_smoothing'])  # makes the momentum
    with CountCalls() as in_step:
        script.train_step(net, optimizer, inputs, labels, hyp['label_smoothing'])
    assert len(in_step.calls) <= step_calls and len(in_loader.calls) <= loader_calls, (
        in_step.calls,
        in_loader.calls,
    )


STEPS_ON_CUDA = """
import sys, torch
import airbench94, airbench94_muon, airbench95, airbench96
for script in (airbench94, airbench94_muon, airbench95, airbench96):
    h = script.hyp | dict(widths=(16, 16, 16), batch_size=100)
    loader = script.CifarLoader(sys.argv[1], True, 100, h['aug'], device='cuda')
    net = script.Net(h, 10, 'cuda', torch.float16).train()
    loader.images = loader.images.half()
    script.init_whitening(net, loader.normalize(loader.images))
    optimizer = script.make_optimizer(net, h)
    first = optimizer[0] if isinstance(optimizer, list) else optimizer
    assert all(group["fused"] for group in first.param_groups)
    script.train_step(net, optimizer, *next(iter(loader)), h['label_smoothing'])
    torch.cuda.set_sync_debug_mode('error')
    losses = [
        script.train_step(net, optimizer, *batch, h['label_smoothing'])[0]
        for batch, _ in zip(loader, range(10))
    ]
    torch.cuda.set_sync_debug_mode('default')
    assert len(losses) == 10 and torch.stack(losses).isfinite().all()
"""


def test_ten_steps_on_cuda_never_wait_for_it(tiny, cuda):
    done = subprocess.run(
        [sys.executable, '-c', STEPS_ON_CUDA, tiny],
        cwd=ROOT,
        env=CUDA_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
