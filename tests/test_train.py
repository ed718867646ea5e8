"""Whole trainings, of small networks on tiny data; half an epoch of the real thing where the data can be found."""

import copy
import functools
import io
import itertools
import sys
import time

import pytest
import torch

import airbench94
from airbench94 import CifarLoader, evaluate, hyp, infer, train, warmup

SMALL = dict(widths=(8, 16, 16), dtype=torch.float32)


def tiny_loader(tiny, **options):
    return CifarLoader(tiny, train=True, batch_size=100, aug=hyp['aug'], device='cpu', **options)


def test_it_learns(tiny):
    torch.manual_seed(0)
    loader = tiny_loader(tiny)
    net = train(loader, epochs=4, verbose=False, **SMALL)
    assert not net.training
    assert evaluate(net, CifarLoader(tiny, train=False)) > 0.3
    logits = infer(net, loader, tta_level=2)
    assert logits.shape == (1100, 10) and logits.dtype == torch.float32


def test_same_seed_same_result(tiny):
    nets = [train(tiny_loader(tiny), epochs=1.3, seed=seed, verbose=False, **SMALL) for seed in (5, 5, 6)]
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert not torch.equal(nets[0].linear.weight, nets[2].linear.weight)


def test_the_callers_loader_is_not_changed_and_serves_again(tiny):
    loader = tiny_loader(tiny)
    list(loader)
    before = copy.copy(loader.__dict__)
    first = train(loader, epochs=2, seed=1, verbose=False, **SMALL)
    assert loader.__dict__.keys() == before.keys() and all(loader.__dict__[key] is before[key] for key in before)
    second = train(loader, epochs=2, seed=1, verbose=False, **SMALL)
    assert torch.equal(first.linear.weight, second.linear.weight)


def test_table_and_history(tiny, capsys):
    history = []
    train(tiny_loader(tiny), epochs=1.5, seed=1, history=history, **SMALL)
    out, err = capsys.readouterr()
    assert err == ''
    assert [line.split('|')[2].strip() for line in out.splitlines() if '|' in line] == ['epoch', '1', '2', 'eval']
    assert [row['epoch'] for row in history] == [1, 2, 'eval']
    assert [row['steps'] for row in history] == [11, 17, 17]  # ceil(1.5 * 11)
    assert 1 < history[0]['train_loss'] < 4 and 0 <= history[1]['train_acc'] <= 1 and 0 <= history[1]['val_acc'] <= 1
    times = [row['time_seconds'] for row in history]
    assert 0 < times[0] < times[1] < times[2]
    quiet = []
    train(tiny_loader(tiny), epochs=1.5, seed=1, verbose=False, history=quiet, **SMALL)
    assert capsys.readouterr() == ('', '')
    assert [row.get('val_acc') for row in quiet] == [row.get('val_acc') for row in history]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_on_a_terminal_once_a_second(monkeypatch, tiny, capsys):
    monkeypatch.setattr(sys, 'stderr', Terminal())
    shown = airbench94.show_progress(time.perf_counter() - 2, seconds=10.0, step=100, total_steps=1000)
    assert sys.stderr.getvalue().endswith('step 100/1000, 1:30 to go')
    assert airbench94.show_progress(shown, 10.0, 101, 1000) == shown and '101' not in sys.stderr.getvalue()
    assert airbench94.show_progress(shown - 1, 10.0, 102, 1000) > shown and '102/1000' in sys.stderr.getvalue()
    sys.stderr.seek(0)
    sys.stderr.truncate()
    monkeypatch.setattr(airbench94.time, 'perf_counter', functools.partial(next, itertools.count(0, 2)))
    train(tiny_loader(tiny), epochs=0.2, **SMALL)
    assert '/3, ' in sys.stderr.getvalue() and '/3, ' not in capsys.readouterr().out


def test_nothing_of_it_without_a_terminal(capsys):
    assert airbench94.show_progress(0.0, 10.0, 100, 1000) == 0.0 and capsys.readouterr() == ('', '')


def test_without_a_table_nothing_is_printed_or_evaluated(tiny, capsys, tmp_path):
    (tmp_path / 'train.pt').write_bytes((tiny / 'train.pt').read_bytes())  # and no test.pt
    train(CifarLoader(tmp_path, train=True, batch_size=500), epochs=0.5, verbose=False, **SMALL)
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('steps', [1, 2, 4, 5])
def test_any_number_of_steps(tiny, steps):
    loader, history = tiny_loader(tiny), []
    train(loader, epochs=steps / len(loader), verbose=False, history=history, **SMALL)
    assert history[-1]['steps'] == steps


def test_lookahead_ends_with_the_average(tiny):
    """In four steps the average is never updated, and so the network returns to where it began."""
    def after(steps, **options):
        return train(tiny_loader(tiny), epochs=steps / 11, seed=3, verbose=False, **options, **SMALL).linear.weight

    assert torch.equal(after(1), after(4))
    assert not torch.equal(after(1), after(5))
    assert not torch.equal(after(1, lookahead=False), after(4, lookahead=False))


def test_whitening_bias_trains_for_three_epochs(tiny):
    def bias(epochs, **options):
        return train(tiny_loader(tiny), epochs=epochs, seed=3, lookahead=False, verbose=False, lr=1e-3,
                     weight_decay=0, **options, **SMALL).whiten.bias

    assert (bias(1, whiten_bias_epochs=0) == 0).all()
    assert (bias(1, whiten_bias_epochs=1) != 0).any()
    trained, longer = bias(2, whiten_bias_epochs=1), bias(2, whiten_bias_epochs=2)
    assert not torch.equal(trained, longer)


def test_divergence_is_an_error_in_its_epoch(tiny):
    history = []
    with pytest.raises(FloatingPointError, match='epoch 1'):
        train(tiny_loader(tiny), epochs=3, lr=1e30, verbose=False, history=history, **SMALL)
    assert [row['epoch'] for row in history] == [1]


@pytest.mark.parametrize('arguments', [dict(epochs=0), dict(epochs=-1), dict(epochs=float('nan'))])
def test_arguments_that_make_no_sense(tiny, arguments):
    with pytest.raises(ValueError, match='epochs'):
        train(tiny_loader(tiny), verbose=False, **arguments)


def test_unknown_hyperparameters_are_errors(tiny):
    with pytest.raises(TypeError, match='label_smoothin'):
        train(tiny_loader(tiny), label_smoothin=0)


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_warmup(capsys, device):
    warmup(device=device, dtype=torch.float16, test_size=4100)
    assert capsys.readouterr() == ('', '')


def test_half_an_epoch_on_the_real_data(real):
    """As long as a fast suite allows. 0.58 of these 2,000 images were right on a CPU in bfloat16."""
    test_loader = CifarLoader(real, train=False)
    test_loader.images, test_loader.labels = test_loader.images[:2000], test_loader.labels[:2000]
    history = []
    train(CifarLoader(real, train=True, batch_size=1024, aug=hyp['aug']), epochs=0.5, seed=0, verbose=False,
          test_loader=test_loader, history=history, tta_level=0)
    assert history[0]['steps'] == 24
    assert history[0]['val_acc'] > 0.50
