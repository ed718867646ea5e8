"""What makes a step fast may not change its mathematics, nor add to the ATen calls, which are kernels on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import airbench94
import airbench95
import airbench96


def plain_loss(weights, inputs, labels, hyp):
    """The network and its loss in so many words, contiguous and without modules."""
    def normed(x, name):
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-12).sqrt()
        x = x + weights[f'{name}.bias'].view(1, -1, 1, 1)
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    x = F.conv2d(inputs.contiguous(), weights['whiten.weight'], weights['whiten.bias'])
    x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    for block in (f'blocks.{i}' for i in range(3)):
        x = first = normed(F.max_pool2d(F.conv2d(x, weights[f'{block}.conv1.weight'], padding=1), 2), f'{block}.norm1')
        x = normed(F.conv2d(x, weights[f'{block}.conv2.weight'], padding=1), f'{block}.norm2')
        if f'{block}.conv3.weight' in weights:
            x = normed(F.conv2d(x, weights[f'{block}.conv3.weight'], padding=1), f'{block}.norm3') + first
    logits = x.amax((2, 3)) @ weights['linear.weight'].T * hyp['scaling_factor']
    targets = F.one_hot(labels, 10) * (1 - hyp['label_smoothing']) + hyp['label_smoothing'] / 10
    return -(targets * logits.log_softmax(1)).sum()


@pytest.mark.parametrize('script', [airbench94, airbench95, airbench96], ids=lambda script: script.__name__)
def test_ten_steps_are_those_of_the_plain_formulation(script, tiny):
    """In float32, losses and weights, the momentum and the decay included."""
    torch.manual_seed(0)
    hyp = script.hyp
    loader = script.CifarLoader(tiny, True, 100, hyp['aug'])
    net = script.make_net((16, 24, 32), dtype=torch.float32)
    script.init_whitening(net, loader.normalize(loader.images))
    lr, momentum, weight_decay = hyp['lr'] / 10, hyp['momentum'], hyp['weight_decay']
    optimizer = script.make_optimizer(net, lr, momentum, weight_decay, hyp['bias_scaler'], 100)
    scale = 1024 * (1 + 1 / (1 - momentum))  # the paper's
    weights = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    velocity = {name: torch.zeros_like(weights[name]) for name in trained}
    for inputs, labels in list(loader)[:10]:
        loss, _ = script.train_step(net, optimizer, inputs, labels, hyp['label_smoothing'])
        for name in trained:
            weights[name].requires_grad_()
        plain = plain_loss(weights, inputs, labels, hyp)
        grads = torch.autograd.grad(plain, [weights[name] for name in trained])
        assert loss.item() == pytest.approx(plain.item(), rel=1e-4)
        for name, grad in zip(trained, grads, strict=True):
            step = lr / scale * (hyp['bias_scaler'] if 'norm' in name else 1)
            grad = grad + weight_decay * 100 / scale / step * weights[name].detach()
            velocity[name] = momentum * velocity[name] + grad
            weights[name] = weights[name].detach() - step * (grad + momentum * velocity[name])
    for name in trained:
        difference = (net.state_dict()[name] - weights[name]).norm() / weights[name].norm()
        assert difference < 1e-3, (name, difference)


class CountCalls(TorchDispatchMode):
    """Counts the ATen calls that do work on a device: views and empty tensors cost a GPU nothing."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'aten' and not func.is_view and 'empty' not in func.name():
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('script, step_calls, loader_calls', [
    (airbench94, 86, 14), (airbench95, 86, 14), (airbench96, 113, 26)],
    ids=lambda value: getattr(value, '__name__', None))
def test_the_number_of_calls_on_the_path_of_cuda(script, step_calls, loader_calls, tiny):
    hyp = script.hyp
    net = script.make_net(device='meta', dtype=torch.float16)
    net.whiten.bias.requires_grad_(False)
    optimizer = script.make_optimizer(net, hyp['lr'], hyp['momentum'], hyp['weight_decay'], hyp['bias_scaler'],
                                      hyp['batch_size'])
    for group in optimizer.param_groups:
        group['foreach'] = True  # as SGD chooses on CUDA
    loader = script.CifarLoader(tiny, True, hyp['batch_size'], hyp['aug'], device='meta')
    loader.images = loader.images.half()
    batches = iter(loader)
    with CountCalls() as in_loader:
        inputs, labels = next(batches)
    script.train_step(net, optimizer, inputs, labels, hyp['label_smoothing'])  # makes the momentum
    with CountCalls() as in_step:
        script.train_step(net, optimizer, inputs, labels, hyp['label_smoothing'])
    assert len(in_step.calls) <= step_calls and len(in_loader.calls) <= loader_calls, (in_step.calls, in_loader.calls)
