"""
Trains a network to 94% test accuracy on CIFAR-10.

94.01% in the mean of 25 runs of 2.05 s on an NVIDIA H200; 0.36 PFLOPs a run (results/README.md).

The method is that of K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv
2404.00498), called "the paper" below. This is its base recipe: three blocks of two convolutions
each, trained for 9.9 epochs.

It needs PyTorch 2.6 or newer, and torchvision to read CIFAR-10. The README has a trial of
airbench94.py that downloads nothing. --help lists the options.
"""

import argparse
import ast
import copy
import ctypes
import glob
import hashlib
import json
import math
import numbers
import os
import platform
import signal
import statistics
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path

START_TIME = time.perf_counter()  # importing PyTorch takes seconds

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'

# ---------------------------------------- Hyperparameters -----------------------------------------
# Each can be changed: --lr 10 on the command line, train(lr=10) in Python.

hyp = dict(
    epochs=9.9,
    batch_size=1024,
    # lr and weight_decay are per 1,024 images, and can be tuned independently: see make_optimizer.
    lr=11.5,
    momentum=0.85,
    weight_decay=0.0153,
    bias_scaler=64.0,        # the lr of the BatchNorm biases is lr times this (D. Page)
    lr_start=0.2,            # the first step has lr times this
    lr_peak=0.23,            # lr is reached after this share of the steps
    lr_end=0.07,             # the last step has about lr times this
    label_smoothing=0.2,
    whiten_bias_epochs=3,    # then the whitening layer's bias is frozen
    lookahead=True,          # see lookahead_update
    lookahead_every=5,       # steps between its updates
    # When a share s of all steps is done, the decay of an update is
    # lookahead_decay**lookahead_every * s**lookahead_power.
    lookahead_decay=0.95,
    lookahead_power=3,
    aug=dict(flip=True, translate=2),  # translate is in pixels
    altflip=True,            # mirror in every other epoch, not at random
    widths=(64, 256, 256),   # channels of the three blocks
    bn_momentum=0.4,         # the weight of the new batch in BatchNorm's running averages
    scaling_factor=1 / 9,    # of the logits
    tta_level=2,             # 0: the image, 1: and its mirror, 2: and both moved by a pixel
)

# ---------------------------------------------- Data ----------------------------------------------

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


def load_split(path, train):
    """
    The training or the test images of a data set, as they are stored.

    path: 'synthetic', see synthetic_split; or a folder that has train.pt and test.pt, see
        load_file; or any other folder, in which torchvision looks for CIFAR-10, and to which it
        downloads it (170 MB) if it is not there.
    train: True for the training images, False for the test images.

    Returns dict(images=uint8 (N, 32, 32, 3), labels=int64 (N,), classes=list of names).
    Raises FileNotFoundError for data that cannot be had, ValueError for a file that is damaged.
    """
    if str(path) == 'synthetic':
        return synthetic_split(train)
    expanded = os.path.expanduser(path)
    if expanded.startswith('~'):
        raise FileNotFoundError(f'there is no home folder for {path}')
    folder = Path(expanded)
    if folder.is_file():
        raise ValueError(f'{folder} is a file: name the folder that it is in')
    files = [folder / 'train.pt', folder / 'test.pt']
    if files[0].exists() or files[1].exists():
        return load_file(files[0] if train else files[1])

    is_new = not folder.exists()
    try:
        from torchvision.datasets import CIFAR10  # here, because importing it takes a second
        split = CIFAR10(folder, train, download=True)
    except Exception as error:  # torchvision, the download, the disk or the archive is at fault
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # torchvision made it; fails unless it is empty
        raise FileNotFoundError(
            f'CIFAR-10 cannot be read from {path}, and cannot be downloaded ({error}). Put '
            'cifar-10-python.tar.gz, or train.pt and test.pt, there, or use --data DIR or '
            '--data synthetic') from error
    return dict(images=torch.from_numpy(split.data), labels=torch.tensor(split.targets),
                classes=split.classes)


def synthetic_split(train):
    """5,000 training or 1,000 test images of noise: the higher the class, the brighter."""
    generator = torch.Generator().manual_seed(int(train))
    labels = torch.randint(10, (5000 if train else 1000,), generator=generator)
    noise = torch.randint(64, (len(labels), 32, 32, 3), generator=generator)
    images = 20 * labels.view(-1, 1, 1, 1) + noise
    return dict(images=images.byte(), labels=labels, classes=list('0123456789'))


def load_file(file):
    """What torch.save wrote to train.pt or test.pt: a dict as load_split returns it."""
    if not file.exists():
        raise FileNotFoundError(f'there is no {file}, and its folder must hold both train.pt and '
                                'test.pt')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # PyTorch's guesses at what a damaged file may be
            data = torch.load(file, map_location='cpu', weights_only=True)
        images, labels, classes = data['images'], data['labels'], data['classes']
        found = (f'{images.dtype} {tuple(images.shape)}, {labels.dtype} {tuple(labels.shape)}, '
                 f'{classes!r:.50}')
        is_valid = (
            isinstance(classes, list)
            and images.dtype == torch.uint8
            and labels.dtype == torch.int64
            and labels.ndim == 1
            and len(labels) > 0
            and images.shape == (len(labels), 32, 32, 3)
            and 0 <= labels.min() <= labels.max() < len(classes)
        )
    except Exception as error:  # torch.load raises all kinds of errors for other files
        found = f'{error!r:.99}'
        is_valid = False
    if not is_valid:
        raise ValueError(f'{file} must hold dict(images=uint8 (N, 32, 32, 3), labels=int64 (N,) '
                         'from 0 to len(classes) - 1, classes=list), by torch.save, as '
                         f'tensors and not NumPy arrays. It holds {found}')
    return data


def batch_crop(images, crop_size):
    """A random square of crop_size pixels from each of the (N, C, H, W) images."""
    # All squares, as a view: (N, C, y, x, crop_size, crop_size).
    crops = images.unfold(2, crop_size, 1).unfold(3, crop_size, 1)
    y, x = torch.randint(crops.size(2), (2, len(images)), device=images.device)
    n = torch.arange(len(images), device=images.device)
    return crops[n, :, y, x]  # (N, C, crop_size, crop_size)


class CifarLoader:
    """
    Batches of normalised and augmented images with their labels, made on one device.

    path: see load_split (default: $AIRBENCH_DATA, else the folder cifar10).
    train: True for the training images, False for the test images.
    batch_size: images in a batch.
    aug: flip=True mirrors, translate=r moves by up to r pixels along both axes (default: {}).
    drop_last: leave out a last batch that is smaller (default: the value of train).
    shuffle: take the images in a new order in each epoch (default: the value of train).
    altflip: mirror in every other epoch, not at random (the paper, section 3.6).
    device: where the images are kept and the batches are made (default: cuda if there is one, else
        cpu).

    Iterating yields inputs, float (B, 3, 32, 32), and labels, int64 (B,).

    These attributes can be replaced. For a subset: images, float (N, 3, 32, 32) from 0 to 1, and
    labels, int64 (N,). For other data also: mean and std, three numbers each, and classes, a list
    of names. Iterating raises ValueError if they do not fit together. A copy by copy.copy shares
    the tensors and the aug of the loader: assign new ones to it, and change none in place.

    For an augmentation of your own, override __iter__, and change the inputs that
    super().__iter__() yields.

    To know which images are in a batch, set labels = torch.arange(N, device=labels.device) in a
    copy. It is for loops of your own: train refuses such labels, and evaluate would compare with
    them.

    Each pass over the loader is an epoch, and is counted for altflip. Before another training in a
    loop of your own, set loader.epoch = 0 and loader.flip_mask = None; train does so by itself.
    """

    def __init__(self, path=None, train=True, batch_size=500, aug=None, drop_last=None,
                 shuffle=None, altflip=True, device=None):
        self.path = str(path or os.environ.get('AIRBENCH_DATA') or 'cifar10')
        device = DEVICE if device is None else device
        data = load_split(self.path, train)
        self.sha256 = {
            key: hashlib.sha256(data[key].contiguous().numpy()).hexdigest()
            for key in ('images', 'labels')
        }
        # (N, 32, 32, 3) in memory is what PyTorch calls channels_last: permute moves nothing. The
        # images that torchvision reads are not in that order yet.
        images = data['images'].contiguous().to(device)
        self.images = images.permute(0, 3, 1, 2).float().div_(255)
        self.labels = data['labels'].to(device)
        self.classes = data['classes']
        self.mean = torch.tensor(CIFAR_MEAN, device=device)
        self.std = torch.tensor(CIFAR_STD, device=device)
        self.batch_size = batch_size
        self.aug = {} if aug is None else copy.copy(aug)
        self.altflip = altflip
        self.drop_last = train if drop_last is None else drop_last
        self.shuffle = train if shuffle is None else shuffle
        self.epoch = 0
        self.flip_mask = None
        self.check()

    def check(self):
        """Raises ValueError where the attributes do not fit together."""
        if not isinstance(self.aug, dict):
            raise ValueError(f'aug must be a dict, as dict(flip=True), not {self.aug!r}')
        known = ('flip', 'translate')
        for name, value in self.aug.items():
            if name not in known or value not in range(32):
                raise ValueError(f'aug can have {" and ".join(known)}, from 0 to 31, not '
                                 f'{self.aug}')
        for name in ('images', 'labels'):
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor):
                raise ValueError(f'{name} must be a tensor, as by torch.from_numpy, not '
                                 f'{type(value).__name__}')
        n = len(self.images)
        if not self.images.is_floating_point() or self.images.shape != (n, 3, 32, 32):
            raise ValueError('images must be float (N, 3, 32, 32) from 0 to 1, as by / 255 and, of '
                             'one channel, by .expand(-1, 3, -1, -1), not '
                             f'{self.images.dtype} {tuple(self.images.shape)}')
        if self.labels.shape != (n,):
            raise ValueError(f'there must be a label for each of the {n} images, not '
                             f'{tuple(self.labels.shape)}')
        if torch.as_tensor(self.mean).numel() != 3 or torch.as_tensor(self.std).numel() != 3:
            raise ValueError(f'mean and std must be three numbers each, not {self.mean!r:.99} and '
                             f'{self.std!r:.99}')
        if not isinstance(self.batch_size, numbers.Integral):
            raise ValueError(f'batch_size must be a whole number, not {self.batch_size!r}')
        if self.batch_size < 1 or len(self) < 1:
            raise ValueError(f'no batch of {self.batch_size} from {n} images: batch_size must be '
                             f'from 1 to {n}, or more with drop_last=False')

    def normalize(self, images):
        """Images from 0 to 1, (N, 3, H, W), minus mean, divided by std, as a new tensor."""
        mean = torch.as_tensor(self.mean, dtype=images.dtype, device=images.device)
        std = torch.as_tensor(self.std, dtype=images.dtype, device=images.device)
        return images.sub(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))

    def __len__(self):
        if self.drop_last:
            return len(self.images) // self.batch_size
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self):
        self.check()
        n = len(self.images)
        device = self.images.device
        # Alternating flip: the first epoch mirrors each image with probability 0.5, and each epoch
        # after it mirrors what the one before did not. So two in a row show an image both ways.
        if self.flip_mask is None or not self.altflip or len(self.flip_mask) != n:
            self.flip_mask = torch.rand(n, device=device) < 0.5
        flip_mask = self.flip_mask.to(device)
        if self.altflip and self.epoch % 2 == 1:
            flip_mask = ~flip_mask
        self.epoch += 1

        if self.shuffle:
            order = torch.randperm(n, device=device)
        else:
            order = torch.arange(n, device=device)
        # On a CPU it is faster to augment batch by batch than all images first, as a batch fits
        # into the cache.
        batch_size = int(self.batch_size)  # split takes no NumPy integer
        for indices in order.split(batch_size)[:len(self)]:
            inputs = self.normalize(self.images[indices])
            if self.aug.get('flip'):
                mirrored = flip_mask[indices].view(-1, 1, 1, 1)
                inputs = torch.where(mirrored, inputs.flip(-1), inputs)
            translate = int(self.aug.get('translate', 0))
            if translate > 0:
                padded = F.pad(inputs, (translate,) * 4, mode='reflect')
                inputs = batch_crop(padded, inputs.size(-1))
            yield inputs, self.labels[indices]


# --------------------------------------------- Network --------------------------------------------

class Conv(nn.Conv2d):
    """A 3x3 convolution whose first filters begin as the identity (the paper, section 3.3)."""

    def __init__(self, channels_in, channels_out):
        super().__init__(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
        nn.init.dirac_(self.weight.data[:channels_in])


class BatchNorm(nn.BatchNorm2d):
    """Its bias is trained, its weight stays 1 (D. Page, How to Train Your ResNet 8)."""

    def __init__(self, channels, momentum):
        super().__init__(channels, eps=1e-12, momentum=momentum)
        self.weight.requires_grad = False


class Block(nn.Module):
    def __init__(self, channels_in, channels_out, bn_momentum):
        super().__init__()
        self.conv1 = Conv(channels_in, channels_out)
        self.norm1 = BatchNorm(channels_out, bn_momentum)
        self.conv2 = Conv(channels_out, channels_out)
        self.norm2 = BatchNorm(channels_out, bn_momentum)

    def forward(self, x):
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.gelu(self.norm1(x))
        x = self.conv2(x)
        x = F.gelu(self.norm2(x))
        return x


class Net(nn.Module):
    """
    From normalised images, (N, 3, 32, 32), to float32 (N, num_classes) logits.

    h: hyperparameters, of which it takes widths, bn_momentum and scaling_factor.
    dtype: float32; float16 for all but the BatchNorms, which stay float32; or bfloat16, which is
        autocast over float32 weights.

    Its first layer is random until init_whitening is called.
    """

    def __init__(self, h=hyp, num_classes=10, device='cpu', dtype=torch.float32):
        super().__init__()
        width1, width2, width3 = h['widths']
        # 24: the 12 eigenvectors of 2x2 patches of three channels, and their negatives, as GELU
        # lets little of a negative value pass.
        self.whiten = nn.Conv2d(3, 24, kernel_size=2)
        self.whiten.weight.requires_grad = False
        nn.init.zeros_(self.whiten.bias)
        self.blocks = nn.Sequential(
            Block(24, width1, h['bn_momentum']),
            Block(width1, width2, h['bn_momentum']),
            Block(width2, width3, h['bn_momentum']),
        )
        self.linear = nn.Linear(width3, num_classes, bias=False)
        self.scaling_factor = h['scaling_factor']
        self.autocast = dtype == torch.bfloat16
        weight_dtype = torch.float32 if self.autocast else dtype
        self.to(device, weight_dtype, memory_format=torch.channels_last)
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.float()

    def forward(self, x):
        x = x.to(self.whiten.weight.dtype)
        # Not autocast(enabled=False): it refuses the meta device, on which compute is counted.
        autocast = torch.autocast(x.device.type, torch.bfloat16) if self.autocast else nullcontext()
        with autocast:
            x = F.gelu(self.whiten(x))
            x = self.blocks(x)
            x = F.max_pool2d(x, 3)
            logits = self.linear(x.flatten(1))
        # In float32, as the sum of a batch's losses can exceed what float16 holds.
        return logits.float() * self.scaling_factor


@torch.no_grad()
def init_whitening(net, images, eps=5e-4):
    """
    Makes the first layer whiten 2x2 patches (the paper, section 3.2).

    Its filters are the eigenvectors of the second moment of the patches, each divided by the root
    of its eigenvalue, and their negatives.

    images: normalised, (N, 3, 32, 32).
    eps: added to the eigenvalues, so that the noise in directions of little variance is not scaled
        up.
    """
    patches = images.float().unfold(2, 2, 1).unfold(3, 2, 1)  # (N, 3, 31, 31, 2, 2)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    second_moment = patches.T @ patches / len(patches)
    # On the CPU, as CUDA's solver takes long to load.
    eigenvalues, eigenvectors = torch.linalg.eigh(second_moment.cpu())
    filters = (eigenvectors / torch.sqrt(eigenvalues + eps)).T.reshape(12, 3, 2, 2)
    net.whiten.weight.copy_(torch.cat((filters, -filters)))


# ------------------------------------------ Optimisation ------------------------------------------

def make_optimizer(net, h):
    """
    Nesterov SGD, its hyperparameters decoupled (the paper, appendix; D. Page, How to Train Your
    ResNet 5).

    The loss is the sum over a batch, so h['lr'], which is for 1,024 images, is divided by 1,024.

    It is also divided by 1 + 1 / (1 - momentum). Where the gradient g stays the same, a step of
    PyTorch's Nesterov SGD is lr * g times 1 / (1 - momentum). The division makes this factor
    1 / (2 - momentum): 0.83 to 0.95 for a momentum of 0.8 to 0.95. So lr and momentum can be tuned
    independently. A division by 1 / (1 - momentum) alone would make the factor 1, but the paper's
    hyperparameters were tuned with this one.

    PyTorch adds weight_decay * weight to the gradient, which it then multiplies by the lr. So the
    decay is divided by the group's peak lr: h['lr'] and bias_scaler do not change it, the schedule
    does. It grows with batch_size, so that an epoch decays the weights alike at any batch size.

    What has norm in its name gets lr times bias_scaler, all else lr.

    Any optimizer of PyTorch whose step needs no closure can be returned; its lr follows the
    schedule. A schedule-free one does not fit, as train does not call its eval(). In float16 Adam
    gives NaN, as its eps of 1e-8 is 0 there: train in another dtype, or with eps=1e-4.
    """
    scale = 1024 * (1 + 1 / (1 - h['momentum']))
    lr = h['lr'] / scale
    lr_biases = h['bias_scaler'] * h['lr'] / scale
    decay = h['weight_decay'] * h['batch_size'] / scale
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    norm_biases = [p for name, p in trained if 'norm' in name]
    others = [p for name, p in trained if 'norm' not in name]
    groups = [
        dict(params=norm_biases, lr=lr_biases, weight_decay=decay / lr_biases),
        dict(params=others, lr=lr, weight_decay=decay / lr),
    ]
    fused = net.linear.weight.is_cuda  # one kernel for all weights
    return torch.optim.SGD(groups, momentum=h['momentum'], nesterov=h['momentum'] > 0, fused=fused)


def lr_factor(step, total_steps, h):
    """The factor of lr at a step: it rises from lr_start to 1 at lr_peak and falls to lr_end."""
    peak = int(h['lr_peak'] * total_steps)
    if step < peak:
        return h['lr_start'] + (1 - h['lr_start']) * step / peak
    return 1 - (1 - h['lr_end']) * (step - peak) / (total_steps - peak)


def lookahead_update(average, state, decay):
    """
    Moves the average towards the network, and sets the network to the average.

    This is Lookahead (the paper, section 3.4; arXiv 1907.08610).

    average: a list of tensors.
    state: the network's own tensors, in the same order.
    decay: the share of the old average that is kept. At 1 the average stays as it is.
    """
    # By dtype, as a GPU takes many tensors of one dtype in one launch.
    for dtype in {tensor.dtype for tensor in state}:
        slow = [tensor for tensor in average if tensor.dtype == dtype]
        fast = [tensor for tensor in state if tensor.dtype == dtype]
        torch._foreach_lerp_(slow, fast, 1 - decay)
        torch._foreach_copy_(fast, slow)


def train_step(net, optimizer, inputs, labels, label_smoothing):
    """
    A step of training.

    inputs: normalised, (B, 3, 32, 32).
    labels: int64 (B,).

    Returns the loss, float32, summed over the batch, and the logits, float32 (B, num_classes).
    """
    # The loss is a sum, so gradients are large, and float16 needs no loss scaling.
    logits = net(inputs)
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction='sum')
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()


# ------------------------------------------- Evaluation -------------------------------------------

def views_of(images, tta_level, mirror):
    """
    The views of normalised images over which logits are averaged (the paper, section 3.5).

    images: (N, 3, 32, 32).
    tta_level: 0 for the images; 1 for their mirror images too; 2 for these two, and for the same
        two moved by one pixel, once down and right, once up and left. Half of the total weight is
        on those that are not moved.
    mirror: False leaves all mirror images out.

    Returns pairs of a weight and a view. The weights add up to 1. Raises ValueError for another
    level.
    """
    if tta_level not in (0, 1, 2):
        raise ValueError(f'tta_level must be 0, 1 or 2, not {tta_level!r}')
    views = [(1.0, images)]
    if tta_level == 2:
        padded = F.pad(images, (1,) * 4, mode='reflect')
        down_right = padded[..., :-2, :-2]
        up_left = padded[..., 2:, 2:]
        views = [(0.5, images), (0.25, down_right), (0.25, up_left)]
    if tta_level == 0 or not mirror:
        return views
    with_mirrored = []
    for weight, view in views:
        with_mirrored += [(weight / 2, view), (weight / 2, view.flip(-1))]
    return with_mirrored


@torch.no_grad()
def infer(net, loader, tta_level=0, mirror=True):
    """
    The float32 (N, num_classes) logits of loader.images, in their order.

    loader: a CifarLoader, on the network's device. Its mean and std are to be those of the
        training. Its labels are not used.
    tta_level, mirror: of test-time augmentation, see views_of.
    """
    was_training = net.training
    net.eval()
    logits = []
    for images in loader.images.split(2000):
        views = views_of(loader.normalize(images), tta_level, mirror)
        logits.append(sum(weight * net(view) for weight, view in views))
    net.train(was_training)
    return torch.cat(logits)


def evaluate(net, loader, tta_level=0, mirror=True):
    """
    The share of loader.images, from 0 to 1, that the network classifies correctly.

    The arguments are those of infer. Raises ValueError if there is not a label for each image.
    """
    predictions = infer(net, loader, tta_level, mirror).argmax(1)
    if loader.labels.shape != predictions.shape:
        raise ValueError(f'there must be a label for each of the {len(predictions)} images, not '
                         f'{tuple(loader.labels.shape)}')
    return (predictions == loader.labels).sum().item() / len(loader.labels)


# -------------------------------------------- Training --------------------------------------------

def train(train_loader=None, test_loader=None, *, net=None, seed=None, device=None, dtype=None,
          verbose=True, callback=None, **overrides):
    """
    Trains a network and returns it, in evaluation mode. Its attribute classes names the classes.

    train_loader: a CifarLoader, which stays as it is (default: CIFAR-10, by the recipe, read anew
        in each call). A copy of it is used: what a callback assigns to it has no effect. Its first
        5,000 images decide how a new network whitens: shuffle images that are sorted. An epoch is a
        pass over its images: for as many steps, half as many images need twice the epochs, and
        twice the whiten_bias_epochs. CifarLoader(batch_size=hyp['batch_size'], aug=hyp['aug']) is
        the recipe's.
    test_loader: what to evaluate on (default: the test images of train_loader's folder, even if
        train_loader.images were replaced). Its images are normalised by train_loader's mean and
        std.
    net: a Net to train, in place, its first layer as it is (default: a new one, whitened). It
        has its own device, dtype, widths, bn_momentum and scaling_factor, whatever is given here.
        The schedule, the optimizer and Lookahead begin anew.
    seed: sets PyTorch's global generators (default: they go on from where they are). With the same
        seed, what you draw from these after the training is the same too: for random subsets or
        labels, use a torch.Generator of your own. Trainings in two threads share the global ones,
        and cannot be reproduced. On a GPU the same seed does not give the same network: save a
        network that you will need again.
    device: to train on (default: that of train_loader.images).
    dtype: see Net; or its name (default: the fastest on the device, see default_dtype).
    verbose: print a table.
    callback: is called as callback(net, row) after each epoch and after the final evaluation,
        with the table's row as a dict: epoch, train_loss, train_acc, val_acc, time_seconds and
        steps. In the last row epoch is 'eval', and tta_val_acc takes the place of train_loss,
        train_acc and val_acc. The train_loss and train_acc are those of the epoch's last batch. If
        it returns True, the training ends with that epoch, and the network becomes Lookahead's
        average, as it always does at the end. A callback that draws from PyTorch's global
        generators changes the training. No callback may move net or change its dtype: use copies
        of net.state_dict().
    overrides: hyperparameters, as in lr=10. Where batch_size, aug and altflip are not among
        them, those of train_loader are taken.

    Nothing is evaluated if neither verbose nor callback asks for it. Call warmup first, once.
    Raises TypeError for an unknown hyperparameter, another kind of net, or a callback that returns
    neither None nor a bool; ValueError for values and data that make no sense; RuntimeError if a
    callback moves net; and FloatingPointError if the training diverges.
    """
    evaluates = verbose or callback is not None
    h, loader, test_loader, device, dtype = check_arguments(
        train_loader, test_loader, net, device, dtype, evaluates, overrides)

    if seed is not None:
        torch.manual_seed(seed)
    total_steps = math.ceil(h['epochs'] * len(loader))
    is_new = net is None
    if is_new:
        net = Net(h, len(loader.classes), device, dtype)
    net.whiten.bias.requires_grad_(True)  # a net that was trained has it frozen
    net.classes = loader.classes
    optimizer = make_optimizer(net, h)
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, total_steps, h))
    loader.images = loader.images.to(device, net.whiten.weight.dtype)
    loader.labels = loader.labels.to(device)
    loader.mean = torch.as_tensor(loader.mean, device=device)
    loader.std = torch.as_tensor(loader.std, device=device)
    if evaluates:
        test_loader = copy.copy(test_loader)
        test_loader.images = test_loader.images.to(device)
        test_loader.labels = test_loader.labels.to(device)
        test_loader.mean = loader.mean
        test_loader.std = loader.std
    # Images that are not mirrored in training, as digits, are not mirrored in the evaluation.
    mirror = bool(h['aug'].get('flip'))

    if verbose:
        print_table_head()
    # The clock runs during training and the final evaluation, not during the validations.
    start = synchronized_time(device)
    seconds = 0.0
    if is_new:
        init_whitening(net, loader.normalize(loader.images[:5000]))
    # All weights and biases, and BatchNorm's running averages.
    state = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
    average = [tensor.clone() for tensor in state]
    step = 0
    for epoch in range(math.ceil(total_steps / len(loader))):
        net.train()
        net.whiten.bias.requires_grad_(epoch < h['whiten_bias_epochs'])
        for inputs, labels in loader:
            loss, logits = train_step(net, optimizer, inputs, labels, h['label_smoothing'])
            scheduler.step()
            step += 1
            # The decay grows: the network moves fast at first, and is averaged strongly at the end.
            if h['lookahead'] and step % h['lookahead_every'] == 0:
                decay = h['lookahead_decay']**h['lookahead_every']
                decay = decay * (step / total_steps)**h['lookahead_power']
                lookahead_update(average, state, decay)
            if step == total_steps:
                break
        # The network becomes the average, which lacks the steps since its last update. Before the
        # first update the average is the untrained network.
        if h['lookahead'] and step == total_steps and step >= h['lookahead_every']:
            lookahead_update(average, state, decay=1.0)
        seconds += synchronized_time(device) - start

        net.eval()
        stop = False
        if evaluates:
            row = dict(
                epoch=epoch + 1,
                train_loss=loss.item() / len(labels),
                train_acc=(logits.argmax(1) == labels).float().mean().item(),
                val_acc=evaluate(net, test_loader),
                time_seconds=seconds,
                steps=step,
            )
            stop = report(row, net, state, verbose, callback)
        if not all(tensor.isfinite().all() for tensor in state):
            raise FloatingPointError(f'the training diverged in epoch {epoch + 1}: its weights '
                                     'are not finite')
        start = synchronized_time(device)
        if stop:
            if h['lookahead'] and step >= h['lookahead_every']:
                lookahead_update(average, state, decay=1.0)
            break

    if evaluates:
        tta_val_acc = evaluate(net, test_loader, h['tta_level'], mirror)
        seconds += synchronized_time(device) - start
        row = dict(epoch='eval', tta_val_acc=tta_val_acc, time_seconds=seconds, steps=step)
        report(row, net, state, verbose, callback)
    return net.eval()


def warmup(train_loader=None, test_loader=None, *, net=None, seed=None, device=None, dtype=None,
           verbose=None, callback=None, **overrides):
    """
    Sets the process up and, on a GPU, trains for a moment. To be called once, before the timing.

    On a GPU the first use of each kernel is slow. The arguments are those of train; net, seed,
    verbose and callback have no effect. It draws from PyTorch's global generators: seed these after
    it.
    """
    if device is None:
        device = DEVICE if train_loader is None else train_loader.images.device
    device = torch.empty(0, device=device).device  # with its number, as in train
    set_up_process(device)
    if device.type == 'cpu':
        return
    if train_loader is None:
        train_loader = CifarLoader(batch_size=hyp['batch_size'], aug=hyp['aug'], device=device)
    loader = copy.copy(train_loader)
    batch_size = overrides.get('batch_size', loader.batch_size)
    n = 3 * batch_size
    if not loader.drop_last:
        n += len(loader.images) % batch_size  # the last batch of an epoch is smaller
    loader.images = loader.images[:n]
    loader.labels = loader.labels[:n]
    # An epoch with the bias trained, an epoch with it frozen. The lr is a safe one. There is
    # no weight decay: divided by this lr, it could exceed what float16 holds.
    overrides |= dict(epochs=2, whiten_bias_epochs=1, lr=1e-3, weight_decay=0)
    # The callback makes it evaluate, so that the evaluation is warm too.
    with suppress(FloatingPointError):  # if it diverges, the run itself is to say so
        train(loader, test_loader, device=device, dtype=dtype, verbose=False,
              callback=lambda net, row: None, **overrides)


# -------------------------------------------- Harness ---------------------------------------------

def merge(overrides):
    """
    Returns hyp with these changes.

    Raises TypeError for a name that hyp lacks, and ValueError for a value that makes no sense.
    """
    # Names in Jordan's scripts, and on the command line.
    names_here = dict(learning_rate='lr', train_epochs='epochs', run='seed', gpu='device',
                      make_net='net', data='train_loader')
    for key in overrides:
        if key in names_here:
            raise TypeError(f'there is no {key}: here it is called {names_here[key]}')
        if key == 'batchnorm_momentum':
            raise TypeError(f'there is no {key}: bn_momentum is 1 minus it, as in PyTorch')
        if key not in hyp:
            raise TypeError(f'no argument {key}: there are train_loader, test_loader, net, seed, '
                            f'device, dtype, verbose, callback, {", ".join(hyp)}')
    h = hyp | overrides

    def require(key, what, condition):
        if not condition:
            raise ValueError(f'{key} must be {what}, not {h[key]!r}')

    def is_number(value):
        return isinstance(value, numbers.Real) and not isinstance(value, bool)

    def is_count(value):
        return is_number(value) and isinstance(value, numbers.Integral) and value > 0

    for key in ('epochs', 'lr', 'bias_scaler', 'scaling_factor'):
        require(key, 'a number above 0', is_number(h[key]) and 0 < h[key] < math.inf)
    for key in ('weight_decay', 'lr_start', 'lr_end', 'lookahead_power', 'whiten_bias_epochs'):
        require(key, 'a number from 0 up', is_number(h[key]) and 0 <= h[key] < math.inf)
    for key in ('momentum', 'lr_peak'):
        require(key, 'a number from 0 to below 1', is_number(h[key]) and 0 <= h[key] < 1)
    for key in ('label_smoothing', 'lookahead_decay'):
        require(key, 'a number from 0 to 1', is_number(h[key]) and 0 <= h[key] <= 1)
    require('bn_momentum', 'a number above 0, at most 1',
            is_number(h['bn_momentum']) and 0 < h['bn_momentum'] <= 1)
    require('batch_size', 'a whole number above 0', is_count(h['batch_size']))
    require('widths', 'three whole numbers above 0, as (8, 16, 16)',
            isinstance(h['widths'], (tuple, list)) and len(h['widths']) == 3
            and all(is_count(width) for width in h['widths']))
    require('aug', 'a dict, as {"flip": True}', isinstance(h['aug'], dict))
    require('altflip', 'True or False', h['altflip'] in (True, False))
    require('tta_level', '0, 1 or 2', h['tta_level'] in (0, 1, 2))
    require('lookahead', 'True or False', h['lookahead'] in (True, False))
    require('lookahead_every', 'a whole number above 0', is_count(h['lookahead_every']))
    return h


def check_arguments(train_loader, test_loader, net, device, dtype, evaluates, overrides):
    """
    Checks the arguments of train and fills in those that are not given.

    evaluates: whether test_loader is needed.

    Returns the hyperparameters, a copy of train_loader, test_loader, device and dtype. Raises as
    train does.
    """
    h = merge(overrides)
    if train_loader is None:
        train_loader = CifarLoader(batch_size=h['batch_size'], aug=h['aug'],
                                   altflip=h['altflip'], device=device)
    check_loaders(train_loader, test_loader)
    loader = copy.copy(train_loader)
    loader.epoch = 0
    loader.flip_mask = None
    for key in ('batch_size', 'aug', 'altflip'):
        if key in overrides:
            setattr(loader, key, overrides[key])
        h[key] = getattr(loader, key)
    if net is not None:
        if not hasattr(net, 'whiten'):
            raise TypeError(f'net must be a Net, not {type(net).__name__}. For another '
                            'architecture change Net in a copy of this script')
        device = net.linear.weight.device
    elif device is None:
        device = loader.images.device
    # With its number: cuda becomes the current one, as cuda:0.
    device = torch.empty(0, device=device).device
    if evaluates and test_loader is None:
        test_loader = CifarLoader(loader.path, train=False, device=device)
    check_data(loader, test_loader)
    if net is not None and net.linear.out_features != len(loader.classes):
        raise ValueError(f'net has {net.linear.out_features} outputs, and train_loader '
                         f'{len(loader.classes)} classes')
    if dtype is None:
        dtype = default_dtype(device)
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f'dtype must be float32, float16 or bfloat16, not {dtype}')
    return h, loader, test_loader, device, dtype


def report(row, net, state, verbose, callback):
    """
    Prints a row of the table, if verbose, and calls the callback with it.

    state: the tensors that net had at first.

    Returns whether the training is to end.
    """
    if verbose:
        print_row(row)
    stop = None if callback is None else callback(net, row)
    # A number is a mistake, such as what file.write returns. But True and False are numbers too.
    is_number = isinstance(stop, numbers.Number) and not isinstance(stop, bool)
    is_array = getattr(stop, 'ndim', 0) > 0  # such as the logits
    if is_number or is_array or stop not in (None, False, True):
        raise TypeError('callback must return None, or True to end the training, not '
                        f'{stop!r:.50}')
    # Lookahead would go on with the tensors that the network had.
    now = {tensor.data_ptr() for tensor in net.state_dict().values()}
    if row['epoch'] != 'eval' and any(tensor.data_ptr() not in now for tensor in state):
        raise RuntimeError('callback must not move net or change its dtype: use copies of its '
                           'state_dict()')
    return stop


def check_loaders(train_loader, test_loader):
    """Raises TypeError for what is no loader. That of another script will do."""
    for name, loader in (('train_loader', train_loader), ('test_loader', test_loader)):
        if loader is not None and not hasattr(loader, 'normalize'):
            raise TypeError(f'{name} must be a CifarLoader, which has the batch size and the '
                            f'augmentation too, not {type(loader).__name__}')


def check_data(train_loader, test_loader):
    """Raises ValueError for data that would fail later, or train in vain."""
    num_classes = len(train_loader.classes)
    for name, loader in (('train_loader', train_loader), ('test_loader', test_loader)):
        if loader is None:
            continue
        loader.check()
        lowest, highest = loader.images.aminmax()
        if not 0 <= lowest <= highest <= 1:
            raise ValueError(f'{name}.images must be from 0 to 1, as by / 255, not from '
                             f'{lowest:.3g} to {highest:.3g}')
        if loader.labels.dtype != torch.int64:
            raise ValueError(f'{name}.labels must be int64, as by .long(), not '
                             f'{loader.labels.dtype}')
        if not 0 <= loader.labels.min() <= loader.labels.max() < num_classes:
            raise ValueError(f'{name}.labels must be from 0 to {num_classes - 1}, as train_loader '
                             f'has {num_classes} classes: set labels in both loaders')
    mean = torch.as_tensor(train_loader.mean)  # those of test_loader are not used
    std = torch.as_tensor(train_loader.std)
    if not (0 <= mean.min() <= mean.max() <= 1 and 0 < std.min() <= std.max()):
        raise ValueError('train_loader.mean must be from 0 to 1, as the images are, and std above '
                         f'0, not {mean.tolist()} and {std.tolist()}')


def cpu_capabilities():
    """What PyTorch knows of the processor, a dict. It is empty before PyTorch 2.11."""
    if hasattr(torch.cpu, 'get_capabilities'):
        return torch.cpu.get_capabilities()
    return {}


def device_name(device):
    """As in 'NVIDIA H200' or, with the instruction set, 'AMD EPYC (AVX512-BF16)'."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type != 'cpu':
        return f'{device.type} ({platform.machine()})'
    capabilities = cpu_capabilities()
    name = capabilities.get('cpu_name', 'CPU')
    sets = dict(amx_bf16='AMX', avx512_bf16='AVX512-BF16', avx512_f='AVX512', avx2='AVX2')
    for key, instruction_set in sets.items():
        if capabilities.get(key):
            return f'{name} ({instruction_set})'
    return f'{name} ({platform.machine()})'


def default_dtype(device):
    """
    The fastest for training: float16 on CUDA, bfloat16 on some CPUs, float32 elsewhere. Before
    2.11 PyTorch does not tell CPUs apart, and it is float32 on all of them: give bfloat16 where
    that is faster.
    """
    if device.type == 'cuda':
        return torch.float16
    capabilities = cpu_capabilities()
    # With AVX512-BF16 alone, AMD's CPUs are faster in bfloat16 than in float32 (results/README.md),
    # and Intel's slower.
    is_amd = capabilities.get('cpu_name', '').startswith('AMD')
    if capabilities.get('amx_bf16') or (is_amd and capabilities.get('avx512_bf16')):
        return torch.bfloat16
    return torch.float32


def set_up_process(device):
    """Settings for the whole process that make training faster."""
    torch.backends.cudnn.benchmark = True
    if device.type == 'cpu' and platform.libc_ver()[0] == 'glibc':
        # Freed memory is kept, since the operating system clears each page that it hands out
        # again, which takes time.
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # from malloc.h
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def synchronized_time(device):
    """Seconds of a clock, read when the device has done all that it was given."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
    return time.perf_counter()


COLUMNS = ('epoch', 'train_loss', 'train_acc', 'val_acc', 'tta_val_acc', 'time_seconds')


def print_table_head():
    print('|  ' + '  |  '.join(COLUMNS) + '  |', flush=True)


def print_row(row):
    cells = []
    for column in COLUMNS:
        cell = row.get(column, '')
        if isinstance(cell, float):
            cell = f'{cell:.4f}'
        cells.append(str(cell).rjust(len(column)))
    print('|  ' + '  |  '.join(cells) + '  |', flush=True)


def print_summary(runs, synthetic, changed):
    """changed: what differs between the versions of these runs, see open_log."""
    finished = [run for run in runs if not run['diverged']]
    if synthetic:
        print('SYNTHETIC data: ', end='')
    if changed:
        print(f'With runs of another {" and ".join(changed)}: ', end='')
    print(f'{len(runs)} runs, {len(runs) - len(finished)} diverged')
    for key in ('tta_val_acc', 'seconds', 'pflops'):
        values = [run[key] for run in finished]
        if not values:
            continue
        line = f'{key:13} mean {statistics.fmean(values):.4f}'
        if len(values) > 1:
            std = statistics.stdev(values)
            line += f'   std {std:.4f}   stderr {std / math.sqrt(len(values)):.4f}'
        print(f'{line}   n {len(values)}', flush=True)


def count_pflops(h, steps, test_size, num_classes=10):
    """
    The compute of a run in PFLOPs, by the paper's convention.

    An image costs three forward passes in training, and one for each view that it is tested on.

    h: hyperparameters.
    steps: of training.
    test_size: how many images were tested with test-time augmentation.
    num_classes: outputs of the network.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, because it can import Triton
    mirror = bool(h['aug'].get('flip'))  # as in train
    views = views_of(torch.empty(1, 3, 32, 32), h['tta_level'], mirror)
    images = 3 * steps * h['batch_size'] + len(views) * test_size
    net = Net(h, num_classes, device='meta')
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.empty(images, 3, 32, 32, device='meta'))
    return counter.get_total_flops() / 1e15


def is_record(line):
    """Whether a line is whole. One that was cut off has no closing brace."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def read_log(path):
    """
    The headers and the runs of a log, or [] and [] if there is no such file yet.

    A log is JSON lines: a header, then a line for each run. Another header stands before the runs
    of another source, PyTorch, device or number of threads. In what is returned, a header of which
    there are runs has the key has_runs. Left out are a header that another one follows at once, and
    a last line that was cut off, as the process was killed or the disk was full. Raises ValueError
    for another file, and for a log that holds a seed twice.
    """
    if not path.is_file() or path.stat().st_size == 0:
        return [], []
    *lines, last = path.read_bytes().split(b'\n')
    if is_record(last):  # else it is empty, or was cut off
        lines.append(last)
    try:
        records = [json.loads(line) for line in lines]
        headers = []
        runs = []
        was_header = False
        for record in records:
            is_header = record['type'] == 'header'
            if is_header and was_header:
                headers.pop()  # no run of it ended
            if is_header:
                headers.append(record)
            elif record['type'] == 'run':
                runs.append(record)
                headers[-1]['has_runs'] = True
            was_header = is_header
        is_log = len(headers) > 0
        seeds = [run['seed'] for run in runs]
    except (ValueError, TypeError, LookupError):
        is_log = False
    if not is_log:
        raise ValueError(f'{path} is not a log of this script: name another file with --log')
    if len(set(seeds)) < len(seeds):
        raise ValueError(f'{path} holds a seed twice, so that its means are wrong: delete one of '
                         'the lines, or name another file with --log')
    return headers, runs


def check_experiment(path, header, old):
    """Raises ValueError if old, the header of the log at path, is that of another experiment."""
    ours = {key: header[key] for key in ('script', 'dtype', 'data')}
    theirs = {key: old.get(key) for key in ours}
    ours |= header['hyperparameters']
    # For a hyperparameter that is newer than the log, its default is taken.
    theirs |= json.loads(json.dumps(hyp)) | old.get('hyperparameters', {})
    for key, value in theirs.items():
        if ours.get(key) != value:
            # The data are hashes, which say nothing to a reader.
            values = '' if key == 'data' else f', {value}, not {ours.get(key)}'
            raise ValueError(f'{path} is of another {key}{values}: name another log with --log')


def lock(file):
    """Raises BlockingIOError or PermissionError if another process holds the lock of this file."""
    try:
        import fcntl
    except ImportError:
        # Windows locks bytes, which others then cannot read: lock one beyond the end.
        import msvcrt
        os.lseek(file.fileno(), 2**30, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def open_log(path, header):
    """
    Opens a log to add runs to it. Returns the file, the runs that it holds, and a list of what
    differs between header and the headers of these runs, as ['device'].

    Drops a last line that was cut off. Adds the header if source, PyTorch, device or threads differ
    from those of the log's last header, and prints a note if the log has runs of others. Raises
    ValueError if the log is that of another experiment, if another process writes to it, or if it
    cannot be written.
    """
    header = json.loads(json.dumps(header))  # tuples become lists, as they are in the file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = open(path, 'a', buffering=1, newline='\n')
        with suppress(OSError):  # of file systems that have no locks
            try:
                lock(log)
            except (BlockingIOError, PermissionError) as error:
                raise ValueError(f'another process writes to the log {path}: wait until it ends, '
                                 'or name another log with --log') from error
        headers, runs = read_log(path)
        if headers:
            check_experiment(path, header, headers[-1])
            text = path.read_bytes()
            size = text.rfind(b'\n') + 1
            if is_record(text[size:]):
                print(file=log)  # the end of the line, which an editor may leave out
            elif size < len(text):
                print(f'note: {path} ended in a torn line, which was dropped', file=sys.stderr)
                log.truncate(size)
        version = dict(source='version of the script', torch='PyTorch', device='device',
                       threads='number of threads')
        if not headers or any(headers[-1].get(key) != header[key] for key in version):
            print(json.dumps(header), file=log)
        changed = [
            name for key, name in version.items()
            if any(old.get(key) != header[key] for old in headers if 'has_runs' in old)
        ]
        if changed:
            print(f'note: {path} has runs of another {" and ".join(changed)}. The means include '
                  'them, and their seeds are not run again. To measure without them, name another '
                  'log with --log', file=sys.stderr)
    except OSError as error:
        raise ValueError(f'cannot write the log {path} ({error.strerror}): name another log '
                         'with --log') from error
    return log, runs, changed


def run_once(train_loader, test_loader, seed, dtype, h):
    """Trains once. Returns the network (None if it diverged) and the line for the log, a dict."""
    rows = []
    net = None
    try:
        net = train(train_loader, test_loader, seed=seed, dtype=dtype,
                    callback=lambda net, row: rows.append(row), **h)
    except FloatingPointError as error:
        print(f'seed {seed}: {error}', file=sys.stderr)
    last = rows[-1]
    tested = 0 if net is None else len(test_loader.images)
    pflops = count_pflops(h, last['steps'], tested, len(train_loader.classes))
    run = dict(
        type='run',
        seed=seed,
        diverged=net is None,
        tta_val_acc=last.get('tta_val_acc'),
        seconds=last['time_seconds'],
        pflops=pflops,
    )
    for key in ('train_loss', 'train_acc', 'val_acc', 'time_seconds', 'steps'):
        values = [row[key] for row in rows if key in row]
        run[key] = [value if math.isfinite(value) else None for value in values]  # JSON has no NaN
    return net, run


def save_net(net, file, recipe):
    """Writes under another name first, so that the file is whole or not there."""
    part = file.with_suffix('.part')
    torch.save(dict(recipe, state_dict=net.state_dict()), part)
    part.replace(file)


def check_saved(file, recipe):
    """Raises ValueError unless the file is of this recipe, and so may be overwritten."""
    try:
        saved = torch.load(file, map_location='cpu', weights_only=True)
        del saved['state_dict']
        saved['hyperparameters'] = hyp | saved['hyperparameters']  # as in check_experiment
        # By way of JSON, after which a tuple and a list are the same, as in a log.
        is_same = json.loads(json.dumps(saved)) == json.loads(json.dumps(recipe))
    except Exception:  # torch.load raises all kinds of errors for other files
        is_same = False
    if not is_same:
        raise ValueError(f'{file} is not a network of this recipe and these data: name another '
                         'folder with --save')


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)  # main prints it, in one line


def parse_arguments():
    def device(text):
        """Raises ArgumentTypeError where there is no such device."""
        try:
            torch.empty(1, device=text).cpu()
        except (AssertionError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise argparse.ArgumentTypeError(f'no device {text}: {reason}') from error
        return torch.device(text)

    def path(text):
        expanded = os.path.expanduser(text)
        if expanded.startswith('~'):
            raise argparse.ArgumentTypeError(f'there is no home folder for {text}')
        return Path(expanded)

    def value(text):
        """A Python value, or the text itself, which merge then refuses by its flag's name."""
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return text

    parser = Parser(usage='%(prog)s [options]', description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--runs', type=int,
        help='how many, of the seeds SEED, SEED + 1 and so on (default: 25 on CUDA, else 1)')
    add('--seed', type=int, help='of the first run (default: 0, or that of the log)')
    add('--data', help='a folder, or "synthetic" (default: $AIRBENCH_DATA, else cifar10). All are '
        "normalised by CIFAR-10's mean and std")
    add('--device', type=device, default=DEVICE, help='(default: cuda if there is one, else cpu)')
    add('--dtype', choices=('float16', 'bfloat16', 'float32'), help='(default: the fastest)')
    add('--log', type=path,
        help='JSON lines; the runs that it holds are not run again (default: a new one in logs/)')
    add('--save', type=path, help='a folder for the trained networks (default: none)')
    for key, default in hyp.items():
        flags = [f'--{key}']
        if '_' in key:
            flags.append(f'--{key.replace("_", "-")}')
        add(*flags, type=value, default=default, metavar='X', help='(default: %(default)s)')
    args = parser.parse_args()
    args.h = merge({key: getattr(args, key) for key in hyp})
    if args.runs is None:
        args.runs = 25 if args.device.type == 'cuda' else 1
    if args.runs < 1:
        raise ValueError(f'--runs must be at least 1, not {args.runs}')
    if args.seed is not None and not 0 <= args.seed < 2**62:
        raise ValueError(f'--seed must be from 0 to below 2**62, not {args.seed}')
    return args


def main():
    """The command line. Returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130))  # a summary, no traceback
    script = Path(__file__).stem
    # torchrun starts a process for each device, which takes its share of the seeds.
    rank = int(os.environ.get('RANK', 0))
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    local_world_size = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    gpus = torch.cuda.device_count()
    if 'LOCAL_RANK' in os.environ:
        # torchrun sets 1 where there are several processes and the user has set no number. This is
        # replaced by the process's share of the cores. A user's own 1 looks the same.
        if os.environ.get('OMP_NUM_THREADS') == '1':
            torch.set_num_threads(max(1, os.cpu_count() // local_world_size))
        if local_rank < gpus:
            torch.cuda.set_device(local_rank)
    try:  # what is caught here are the user's mistakes: arguments, data, log
        args = parse_arguments()
        h = args.h
        if args.device.type == 'cuda' and local_rank >= gpus:
            raise ValueError(f'torchrun starts more processes than the {gpus} GPUs: give it a '
                             'lower --nproc-per-node')
        if args.device.type == 'cuda' and args.device.index is not None and local_world_size > 1:
            raise ValueError(f'torchrun would start all on {args.device}: use --device cuda')
        train_loader = CifarLoader(args.data, batch_size=h['batch_size'], aug=h['aug'],
                                   altflip=h['altflip'], device=args.device)
        test_loader = CifarLoader(args.data, train=False, device=args.device)
        check_data(train_loader, test_loader)

        now = time.strftime('%Y%m%d-%H%M%S')
        path = args.log or Path('logs', f'{script}-{now}-{os.getpid()}.jsonl')
        headers, others = [], []
        if 'RANK' in os.environ:
            # The runs of all ranks: the series may have begun with more or fewer of them.
            for other in path.parent.glob(f'{glob.escape(path.stem)}.rank*{path.suffix}'):
                with suppress(ValueError):  # its own rank has yet to begin it, or will refuse it
                    their_headers, their_runs = read_log(other)
                    headers += their_headers
                    others += their_runs
            path = path.with_suffix(f'.rank{rank}{path.suffix}')
        own_headers, own_runs = read_log(path)
        headers += own_headers
        old = headers[-1] if headers else {}
        fastest = str(default_dtype(args.device)).removeprefix('torch.')
        dtype = args.dtype or old.get('dtype', fastest)
        refused = {'cpu': ['float16'], 'mps': ['float16', 'bfloat16']}
        if dtype in refused.get(args.device.type, []):
            raise ValueError(f'dtype {dtype} is missing or far too slow on {args.device}')
        first_seed = old.get('seed', 0) if args.seed is None else args.seed
        header = dict(
            type='header',
            script=script,
            hyperparameters=h,
            dtype=dtype,
            seed=first_seed,
            data=dict(train=train_loader.sha256, test=test_loader.sha256),
            synthetic=train_loader.path == 'synthetic',
            torch=torch.__version__,
            device=device_name(args.device),
            threads=torch.get_num_threads(),
            time=time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
            source=Path(__file__).read_text(encoding='utf-8'),
        )
        seeds = range(first_seed + rank, first_seed + args.runs, world_size)
        missing = []
        if args.save:
            if args.save.is_file():
                raise ValueError(f'{args.save} is a file: name a folder with --save')
            args.save.mkdir(parents=True, exist_ok=True)
            recipe = dict(script=script, hyperparameters=h, dtype=dtype,
                          classes=train_loader.classes, data=header['data'])
            has_net = {run['seed'] for run in own_runs + others if not run['diverged']}
            for seed in seeds:
                file = args.save / f'{script}-seed{seed}.pt'
                if file.exists():
                    check_saved(file, dict(recipe, seed=seed))
                elif seed in has_net:
                    missing.append(seed)
        log, runs, changed = open_log(path, header)  # last, as it writes to the log
        done = {run['seed'] for run in runs + others}
        if missing:
            print(f'note: {args.save} lacks the networks of {len(missing)} logged runs, of seed '
                  f'{missing[0]} for example. To train them again, name another --log',
                  file=sys.stderr)
    except (OSError, ValueError) as error:
        first_line = str(error).partition('\n')[0]
        print(f'{script}: error: {first_line}', file=sys.stderr)
        return 2

    if rank > 0:
        sys.stdout = open(os.devnull, 'w')
    print(f'{script}: {train_loader.path} data, {dtype} on {header["device"]}, log {path}',
          flush=True)
    # A network whose compute cannot be counted is to fail now, and not after its training.
    count_pflops(h, 1, 1, len(train_loader.classes))
    if not done.issuperset(seeds):
        warmup(train_loader, test_loader, dtype=dtype, **h)
    ready_seconds = time.perf_counter() - START_TIME
    try:
        for seed in seeds:
            if seed in done:
                continue
            print(f'seed {seed}', flush=True)
            net, run = run_once(train_loader, test_loader, seed, dtype, h)
            if args.save and net is not None:  # before the run is logged as done
                save_net(net, args.save / f'{script}-seed{seed}.pt', dict(recipe, seed=seed))
            run['ready_seconds'] = ready_seconds
            print(json.dumps(run), file=log)
            runs.append(run)
    finally:
        if world_size > 1:
            print(f'These are the runs of rank 0, of {world_size} ranks:')
        print_summary(runs, header['synthetic'], changed)
    return 0


if __name__ == '__main__':
    sys.exit(main())
