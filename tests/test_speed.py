"""What a training step asks of the device: the number of ATen calls, which on a GPU are kernels, may not grow."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import airbench94
import airbench95
import airbench96


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
