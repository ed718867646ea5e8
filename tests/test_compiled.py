"""airbench94_compiled.py: the recipe of airbench94.py to the letter, compiled once for all runs."""

import shutil

import pytest
import torch
from conftest import forget_compiled, keep
from torch._dynamo.utils import counters

import airbench94
import airbench94_compiled
from airbench94_compiled import captured_step, compiled_net, train, warmup

SMALL = dict(widths=(8, 8, 8), dtype=torch.float32)

LACKS = airbench94_compiled.what_compiling_lacks(torch.device('cpu'))
needs_a_compiler = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))


def loader(tiny):
    """Eleven steps an epoch."""
    aug = dict(flip=True, translate=2)
    loader = airbench94_compiled.CifarLoader(tiny, True, 10, aug, device='cpu')
    loader.images, loader.labels = loader.images[:110], loader.labels[:110]
    return loader


def held_out(tiny):
    return airbench94_compiled.CifarLoader(tiny, False, device='cpu')


@needs_a_compiler
def test_nothing_is_compiled_after_the_warm_up(tiny):
    """
    The bias is trained, then frozen, and the test set evaluated with and without augmentation.
    """
    forget_compiled()
    start = counters['stats']['unique_graphs']
    warmup(loader(tiny), held_out(tiny), **SMALL)
    assert counters['stats']['unique_graphs'] > start
    before, history = counters['stats']['unique_graphs'], []
    for seed in range(2):
        train(
            loader(tiny),
            epochs=2,
            whiten_bias_epochs=1,
            seed=seed,
            verbose=False,
            callback=keep(history),
            **SMALL,
        )
    assert len(history) == 6 and counters['stats']['unique_graphs'] == before


def test_same_losses_as_those_of_airbench94(tiny):
    """
    20 steps in float32 from the same weights, on the same batches. On a CPU neither is compiled:
    this is about all the rest of a training.
    """
    forget_compiled()
    losses = {}
    for module in (airbench94, airbench94_compiled):
        real_step, losses[module] = module.train_step, []

        def step(*args, real_step=real_step, module=module):
            loss, logits = real_step(*args)
            losses[module].append(loss)
            return loss, logits

        module.train_step = step
        try:
            module.train(
                loader(tiny),
                lr=115,
                epochs=20 / 11,
                whiten_bias_epochs=1,
                seed=4,
                verbose=False,
                **SMALL,
            )
        finally:
            module.train_step = real_step
    a, b = (torch.stack(losses[module]) for module in losses)
    assert len(a) == 20 and len(b) == 20 + 2  # each kind of step was run once before
    torch.testing.assert_close(a, b[2:], rtol=1e-3, atol=0)


@needs_a_compiler
def test_the_compiled_network_computes_what_the_returned_one_does(tiny):
    net = train(loader(tiny), epochs=1, seed=1, verbose=False, callback=keep([]), **SMALL)
    h = SMALL['widths'], 0.4, 1 / 9
    twin = compiled_net(airbench94_compiled.Net, *h, 10, torch.device('cpu'), torch.float32).eval()
    images = torch.randn(96, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(twin(images), net(images))


def test_one_compiled_network_however_the_device_is_named(tiny, monkeypatch):
    """As cuda and cuda:0, or cpu and cpu:0, which are unequal too."""
    devices, nets = [], set()

    def recorded(h, num_classes, device, dtype):
        captured = captured_step(h, num_classes, device, dtype)
        devices.append(device)
        nets.add(captured.net)
        return captured

    monkeypatch.setattr(airbench94_compiled, 'captured_step', recorded)
    assert torch.device('cpu:0') != torch.device('cpu')
    for device in (None, 'cpu', 'cpu:0', torch.device('cpu'), torch.device('cpu:0')):
        train(loader(tiny), epochs=1 / 11, device=device, verbose=False, **SMALL)
    train(loader(tiny), epochs=1 / 11, verbose=False, **dict(SMALL, widths=[8, 8, 8]))
    assert devices == 6 * [torch.device('cpu')] and len(nets) == 1


def test_a_sweep_compiles_any_number_of_networks(monkeypatch):
    """PyTorch limits how often a function is compiled, for an object and in all."""

    class Small(torch.nn.Module):
        def __init__(self, h, num_classes, device, dtype):
            super().__init__()
            self.whiten = torch.nn.Conv2d(3, 1, 1)

        def forward(self, x):
            return x + 1

    real_compile = torch.compile
    monkeypatch.setattr(
        torch,
        'compile',
        lambda function, **options: real_compile(function, backend='eager', **options),
    )
    before = counters['stats']['unique_graphs']
    h = 0.4, 1.0, 10, torch.device('cpu'), torch.float32
    # Lower than PyTorch's own limits, to save time.
    with torch._dynamo.config.patch(cache_size_limit=8, accumulated_cache_size_limit=20):
        airbench94_compiled.set_up_compiler()
        for width in range(1, 4):
            net = compiled_net(Small, (width,), *h).eval()
            for size in range(1, 11):
                net(torch.zeros(size, width, 1, 1))
    assert counters['stats']['unique_graphs'] == before + 30


def test_no_compiler(main, monkeypatch, tmp_path):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    code, out, err = main(airbench94_compiled)
    assert code == 2 and out == '' and len(err.splitlines()) == 1
    assert 'g++' in err and 'airbench94.py' in err and list(tmp_path.iterdir()) == []
    monkeypatch.setenv('CXX', '/none/c++')
    assert '/none/c++' in main(airbench94_compiled)[2]
