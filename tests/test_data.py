"""The loader: what it normalises, flips, crops and shuffles, and what it refuses."""

import copy
import hashlib

import pytest
import torch
import torch.nn.functional as F
from conftest import keep

import airbench94
import airbench94_muon
from airbench94 import CifarLoader, batch_crop, infer, load_split, train

SMALL = dict(widths=(8, 8, 8), dtype=torch.float32, verbose=False)


def plain_loader(tiny, **options):
    return CifarLoader(tiny, train=True, batch_size=100, shuffle=False, device='cpu', **options)


def epoch_of(loader):
    return torch.cat([inputs for inputs, _ in loader])


def test_loader_holds_what_the_file_holds(tiny):
    loader, data = CifarLoader(tiny, train=False), load_split(tiny, train=False)
    assert loader.images.shape == (96, 3, 32, 32) and loader.images.dtype == torch.float32
    assert loader.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(loader.images[5, 2], data['images'][5, :, :, 2] / 255)
    assert torch.equal(loader.labels, data['labels']) and loader.classes == data['classes']
    assert loader.sha256 == {
        key: hashlib.sha256(data[key].numpy().tobytes()).hexdigest() for key in ('images', 'labels')
    }


def test_normalize_is_by_channel(tiny):
    loader = plain_loader(tiny)
    images = loader.images[:7]
    mean = (0.4914, 0.4822, 0.4465)  # of CIFAR-10, as everywhere in the field
    std = (0.2470, 0.2435, 0.2616)
    for channel in range(3):
        expected = (images[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(loader.normalize(images)[:, channel], expected)
    torch.testing.assert_close(epoch_of(loader), loader.normalize(loader.images)[:1100])


def test_training_loader_shuffles_and_drops_the_rest(tiny):
    loader = CifarLoader(tiny, train=True, batch_size=500)
    assert len(loader) == 2 and [len(labels) for _, labels in loader] == [500, 500]
    first, second = (torch.cat([labels for _, labels in loader]) for _ in range(2))
    assert not torch.equal(first, second)
    loader.drop_last = False
    assert len(loader) == 3 and [len(labels) for _, labels in loader] == [500, 500, 100]
    assert torch.equal(
        torch.cat([labels for _, labels in loader]).sort()[0], loader.labels.sort()[0]
    )


def test_inputs_stay_with_their_labels(tiny):
    loader = CifarLoader(tiny, train=True, batch_size=1100)
    loader.images = loader.images * 0 + loader.labels.view(-1, 1, 1, 1)
    inputs, labels = next(iter(loader))
    torch.testing.assert_close(
        inputs, loader.normalize(torch.ones_like(inputs) * labels.view(-1, 1, 1, 1))
    )


def test_alternating_flip(tiny):
    loader = plain_loader(tiny, aug=dict(flip=True))
    plain = loader.normalize(loader.images)
    epochs = [epoch_of(loader) for _ in range(5)]
    upright = (epochs[0] == plain).flatten(1).all(1)
    assert torch.equal(torch.where(upright.view(-1, 1, 1, 1), plain, plain.flip(-1)), epochs[0])
    assert 0.4 < upright.float().mean() < 0.6
    for epoch, inputs in enumerate(epochs):
        assert torch.equal(inputs, epochs[0].flip(-1) if epoch % 2 else epochs[0])


def test_a_loader_in_use_can_move_to_another_device(tiny):
    loader = plain_loader(tiny, aug=dict(flip=True, translate=2))
    epoch_of(loader)
    loader.images, loader.labels = loader.images.to('meta'), loader.labels.to('meta')
    assert {inputs.device.type for inputs, _ in loader} == {'meta'}


def test_independent_flip(tiny):
    loader = plain_loader(tiny, aug=dict(flip=True), altflip=False)
    plain = loader.normalize(loader.images)
    upright = torch.stack([(epoch_of(loader) == plain).flatten(1).all(1) for _ in range(3)])
    assert ((upright.float().mean(1) - 0.5).abs() < 0.1).all()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert 0.4 < (upright[a] == upright[b]).float().mean() < 0.6


def test_crops_come_from_the_padded_image_at_all_25_offsets(tiny):
    loader = plain_loader(tiny, aug=dict(translate=2))
    padded = F.pad(loader.normalize(loader.images), (2,) * 4, mode='reflect')
    windows = torch.stack(
        [padded[:, :, y : y + 32, x : x + 32] for y in range(5) for x in range(5)]
    )
    seen = []
    for _ in range(2):
        matches = (windows == epoch_of(loader)).flatten(2).all(2)
        assert (matches.sum(0) == 1).all()
        counts = matches.sum(1)
        assert (counts > 15).all(), counts  # 44 expected of each
        seen.append(matches)
    assert not torch.equal(*seen)


def test_crop_moves_x_and_y_independently():
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(5), torch.arange(5), indexing='ij')
    corners = batch_crop(torch.stack((y, x)).float().expand(5000, 2, 5, 5), 1).flatten(1)
    assert abs(torch.corrcoef(corners.T)[0, 1]) < 0.05


def test_edits_are_honoured_after_epochs_have_run(tiny):
    loader = CifarLoader(tiny, train=True, batch_size=100, aug=dict(flip=True, translate=2))
    list(loader)
    mask = loader.labels < 6
    loader.images = loader.images[mask]
    loader.labels = loader.labels[mask]
    assert len(loader) == int(mask.sum()) // 100
    assert all((labels < 6).all() for _, labels in loader)
    loader.images, loader.labels = loader.images.repeat(3, 1, 1, 1), loader.labels.repeat(3)
    assert len(list(loader)) == 3 * int(mask.sum()) // 100
    loader.images = torch.full_like(loader.images, 0.25)
    torch.testing.assert_close(
        next(iter(loader))[0], loader.normalize(torch.full((100, 3, 32, 32), 0.25))
    )


def test_augmentation_can_be_turned_on_later(tiny):
    loader = plain_loader(tiny)
    plain = epoch_of(loader)
    loader.aug = dict(flip=True)
    flipped = epoch_of(loader)  # the loader's second epoch, and the first that flips
    upright = (flipped == plain).flatten(1).all(1)
    assert 0.4 < upright.float().mean() < 0.6 and torch.equal(epoch_of(loader), flipped.flip(-1))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(aug=dict(flip=True, rotate=3)), 'aug can have flip and translate, .* not .*rotate'),
        (dict(aug=dict(cutout=12)), 'aug can have flip and translate, .* not .*cutout'),
        (dict(aug=dict(translate=32)), 'from 0 to 31, not .*32'),
        (dict(aug=dict(translate=-1)), 'from 0 to 31, not .*-1'),
        (dict(batch_size=1101), 'batch of 1101 from 1100 images'),
        (dict(batch_size=0), 'batch of 0'),
    ],
)
def test_what_makes_no_sense_is_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        CifarLoader(tiny, train=True, **options)


def test_lengths_that_disagree_are_refused_when_iteration_starts(tiny):
    loader = CifarLoader(tiny, train=True, batch_size=100)
    loader.labels = loader.labels[:-1]
    with pytest.raises(ValueError, match=r'each of the 1100 images, not \(1099,\)'):
        next(iter(loader))


def test_images_that_are_not_floating_point_are_refused(tiny):
    loader = CifarLoader(tiny, train=True, batch_size=100)
    loader.images = loader.images.mul(255).byte()
    for use in (lambda: next(iter(loader)), lambda: train(loader, **SMALL)):
        with pytest.raises(ValueError, match=r'from 0 to 1, as by / 255 .* not torch.uint8'):
            use()


def test_a_hundred_classes(tmp_path):
    data = dict(
        images=torch.randint(256, (200, 32, 32, 3), dtype=torch.uint8),
        labels=torch.arange(200) % 100,
        classes=[f'class {i}' for i in range(100)],
    )
    for name in ('train.pt', 'test.pt'):
        torch.save(data, tmp_path / name)
    assert load_split(tmp_path, train=True)['classes'] == data['classes']
    loader = CifarLoader(tmp_path, train=True, batch_size=100, device='cpu')
    history = []
    net = train(loader, epochs=1, callback=keep(history), **SMALL)
    assert infer(net, loader).shape == (200, 100) and 0 <= history[-1]['tta_val_acc'] <= 1


@pytest.fixture
def iterated(monkeypatch):
    """The loaders that train iterates over, as they were at the first batch."""
    seen, real_iter = [], CifarLoader.__iter__

    def remember(loader):
        seen.append(copy.copy(loader))
        return real_iter(loader)

    monkeypatch.setattr(CifarLoader, '__iter__', remember)
    return seen


def test_overrides_are_applied_to_trains_copy_of_the_loader(tiny, iterated):
    loader = plain_loader(tiny, aug=dict(flip=True), altflip=True)
    before, history = copy.copy(vars(loader)), []
    train(
        loader,
        epochs=1,
        test_loader=CifarLoader(tiny, train=False),
        batch_size=250,
        aug=dict(translate=1),
        altflip=False,
        callback=keep(history),
        **SMALL,
    )
    assert (iterated[0].batch_size, iterated[0].aug, iterated[0].altflip) == (
        250,
        dict(translate=1),
        False,
    )
    assert history[-1]['steps'] == 4
    assert vars(loader).keys() == before.keys() and all(
        vars(loader)[key] is before[key] for key in before
    )
    train(loader, epochs=0.1, **SMALL)
    assert (iterated[1].batch_size, iterated[1].aug, iterated[1].altflip) == (
        100,
        dict(flip=True),
        True,
    )


def test_changes_of_hyp_change_train(tiny, iterated, monkeypatch):
    monkeypatch.setenv('AIRBENCH_DATA', str(tiny))
    for key, value in dict(
        epochs=2, batch_size=500, aug=dict(flip=True), widths=(8, 8, 16), lr=1.0
    ).items():
        monkeypatch.setitem(airbench94.hyp, key, value)
    rates, real_optimizer = [], airbench94.make_optimizer
    monkeypatch.setattr(
        airbench94, 'make_optimizer', lambda net, h: rates.append(h['lr']) or real_optimizer(net, h)
    )
    history = []
    net = train(dtype=torch.float32, device='cpu', verbose=False, callback=keep(history))
    assert history[-1]['steps'] == 4 and net.linear.in_features == 16 and rates == [1.0]
    assert (iterated[0].batch_size, iterated[0].aug) == (500, dict(flip=True))
    train(lr=2.0, epochs=0.5, dtype=torch.float32, device='cpu', verbose=False)
    assert rates == [1.0, 2.0]


@pytest.mark.parametrize('module', [airbench94, airbench94_muon], ids=lambda m: m.__name__)
def test_infer_keeps_the_order_of_the_images(module, tiny):
    loader = module.CifarLoader(tiny, train=True, batch_size=100, aug=dict(flip=True, translate=2))
    loader.images = loader.images.repeat(2, 1, 1, 1)  # more than one batch of an evaluation
    loader.images[1100:] *= 0.5
    brightness = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 1, bias=False))
    torch.nn.init.ones_(brightness[1].weight)
    expected = loader.normalize(loader.images).flatten(1).sum(1)
    found = module.infer(brightness, loader)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize('module', [airbench94, airbench94_muon], ids=lambda m: m.__name__)
def test_accuracy_needs_a_label_for_each_image(module, tiny):
    loader = module.CifarLoader(tiny, train=False)
    loader.labels = loader.labels[:1]
    with pytest.raises(ValueError, match='a label for each of the 96 images'):
        module.evaluate(module.Net(module.hyp | dict(widths=(8, 8, 8))), loader)


def test_synthetic_split_is_cifar_shaped_and_fixed():
    splits = {train: load_split('synthetic', train) for train in (True, False)}
    for half, n in ((True, 5000), (False, 1000)):
        data = splits[half]
        assert data['images'].shape == (n, 32, 32, 3) and data['images'].dtype == torch.uint8
        assert data['labels'].dtype == torch.int64 and len(data['classes']) == 10
        assert data['labels'].bincount(minlength=10).min() > 0.06 * n
        assert torch.equal(load_split('synthetic', half)['images'], data['images'])
        assert data['images'].float().std() > 10
        brightness = data['images'].float().mean((1, 2, 3))
        means = torch.stack([brightness[data['labels'] == i].mean() for i in range(10)])
        assert (means.diff() > 10).all()
    assert not torch.equal(splits[True]['images'][:1000], splits[False]['images'])
