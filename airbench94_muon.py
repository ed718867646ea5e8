"""airbench94_muon: trains a network to 94% test accuracy on CIFAR-10, for 0.24 PFLOPs a run.

Relative to airbench94.py: Muon, crops, 2x2 convolutions first, few channels before a pool, translations of the unsure.
Method: K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498 ("the paper").

With --data synthetic --epochs 1 it is a trial that needs neither data nor network. --help lists the options.
"""

import argparse
import ast
import copy
import ctypes
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'

# ---------------------------------------- Hyperparameters -----------------------------------------
# Each can be changed: --lr 10 on the command line, train(lr=10) in Python.

hyp = dict(
    epochs=15.92,
    batch_size=2000,
    lr=2.9,  # of the head; decoupled from momentum and batch_size, as weight_decay from all three; see make_optimizer
    momentum=0.85,
    weight_decay=0.0153,
    bias_scaler=144.0,  # the biases learn this much faster
    muon_lr=0.24,  # of the blocks' filters, which have no weight decay
    muon_momentum=0.6,
    label_smoothing=0.2,
    whiten_bias_epochs=3,  # the whitening layer's bias trains for so many epochs, then stays
    crops=((24, 0.4), (28, 0.7)),  # pixels, until this share of the steps
    aug=dict(flip=True, translate=2),
    altflip=True,
    widths=(72, 288, 384),
    bn_momentum=0.4,  # PyTorch's convention: the weight of the new batch
    scaling_factor=1 / 9,  # of the logits
    tta_level=2,  # 0: the image; 1: and its mirror; 2: and for the least sure eighth, one-pixel translations of both
)

# ---------------------------------------------- Data ----------------------------------------------

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


def batch_crop(padded, crop_size):
    """A random crop_size square of each of the (N, C, H, W) images."""
    crops = padded.unfold(2, crop_size, 1).unfold(3, crop_size, 1)
    y, x = torch.randint(crops.size(2), (2, len(padded)), device=padded.device)
    return crops[torch.arange(len(padded), device=padded.device), :, y, x]


class CifarLoader:
    """CIFAR-10 on one device, in batches of normalised and augmented (N, 3, 32, 32) inputs and (N,) labels.
    path: a folder (None: $AIRBENCH_DATA, else cifar10) or 'synthetic'. drop_last, shuffle: None is the value of train.
    altflip: mirror every other epoch, not at random (3.6). aug: flip=True mirrors, translate=r moves by up to r pixels.
    Attributes may be assigned to: images, float (N, 3, 32, 32) in [0, 1]; labels, int64 (N,).
    """

    def __init__(self, path=None, train=True, batch_size=500, aug=None, drop_last=None, shuffle=None,
                 altflip=True, device=None):
        self.path = str(path or os.environ.get('AIRBENCH_DATA') or 'cifar10')
        data, device = load_split(self.path, train), device or DEVICE
        # (N, 32, 32, 3) in memory is (N, 3, 32, 32) in channels_last: nothing moves.
        self.images = data['images'].to(device).permute(0, 3, 1, 2).float().div_(255)
        self.labels, self.classes = data['labels'].to(device), data['classes']
        self.sha256 = {key: hashlib.sha256(data[key].contiguous().numpy()).hexdigest() for key in ('images', 'labels')}
        self.mean, self.std = (torch.tensor(value, device=device).view(3, 1, 1) for value in (CIFAR_MEAN, CIFAR_STD))
        self.batch_size, self.aug, self.altflip = batch_size, aug or {}, altflip
        self.drop_last, self.shuffle = (train if given is None else given for given in (drop_last, shuffle))
        self.epoch, self.flip_mask = 0, None
        self.check()

    def check(self):
        if self.aug.keys() - {'flip', 'translate'} or not all(r in range(32) for r in self.aug.values()):
            raise ValueError(f'aug cannot be {self.aug} here; airbench.CifarLoader knows flip, translate and cutout')
        if not self.images.is_floating_point():
            raise ValueError(f'images must be floating point in [0, 1], as by .float() / 255, not {self.images.dtype}')
        if len(self.images) != len(self.labels) or self.batch_size < 1 or len(self) < 1:
            raise ValueError(f'no batch of {self.batch_size} from {len(self.images)} images, {len(self.labels)} labels')

    def normalize(self, images):
        return images.sub(self.mean.to(images)).div_(self.std.to(images))

    def __len__(self):
        return (len(self.images) if self.drop_last else len(self.images) + self.batch_size - 1) // self.batch_size

    def __iter__(self):
        self.check()
        n, device = len(self.images), self.images.device
        # With altflip these coins are tossed once, and turned over in odd epochs.
        if self.flip_mask is None or not self.altflip or len(self.flip_mask) != n:
            self.flip_mask = torch.rand(n, device=device) < 0.5
        flip_mask = self.flip_mask ^ bool(self.altflip and self.epoch % 2)
        self.epoch += 1

        order = (torch.randperm if self.shuffle else torch.arange)(n, device=device)
        # Batch by batch rather than for the whole set at once: the same work, in a cache instead of in memory.
        for indices in order.split(self.batch_size)[:len(self)]:
            inputs = self.normalize(self.images[indices])
            if self.aug.get('flip'):
                inputs = torch.where(flip_mask[indices].view(-1, 1, 1, 1), inputs.flip(-1), inputs)
            if translate := int(self.aug.get('translate', 0)):
                inputs = batch_crop(F.pad(inputs, (translate,) * 4, mode='reflect'), inputs.size(-1))
            yield inputs, self.labels[indices]


# --------------------------------------------- Network --------------------------------------------

def convolution(channels_in, channels_out, size):
    """The first channels_in filters begin as the identity (the paper, section 3.3). 2x2 is without padding."""
    conv = nn.Conv2d(channels_in, channels_out, kernel_size=size, padding=size // 3, bias=False)
    nn.init.dirac_(conv.weight.data[:channels_in])
    return conv


class Block(nn.Module):
    def __init__(self, channels_in, channels_out, bn_momentum, size, pool_first):
        super().__init__()
        self.pool_first, channels_mid = pool_first, min(2 * channels_in, channels_out)  # few on large maps
        self.conv1 = convolution(channels_in, channels_mid, size)
        self.norm1 = nn.BatchNorm2d(channels_mid, eps=1e-12, momentum=bn_momentum)
        self.conv2 = convolution(channels_mid, channels_out, size)
        self.norm2 = nn.BatchNorm2d(channels_out, eps=1e-12, momentum=bn_momentum)

    def forward(self, x):
        x = self.conv1(F.max_pool2d(x, 2)) if self.pool_first else F.max_pool2d(self.conv1(x), 2)
        x = F.gelu(self.norm1(x))
        return F.gelu(self.norm2(self.conv2(x)))


class Net(nn.Module):
    """Normalised (N, 3, 32, 32) images -> float32 (N, num_classes) logits. float16: all but the BatchNorms, which are
    float32. bfloat16: autocast over float32 weights. init_whitening has yet to initialise the first layer.
    """

    def __init__(self, h=hyp, num_classes=10, device='cpu', dtype=torch.float32):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, kernel_size=2)
        self.whiten.weight.requires_grad = False
        nn.init.zeros_(self.whiten.bias)
        widths = (24, *h['widths'])
        self.blocks = nn.Sequential(*(Block(*widths[i:i + 2], h['bn_momentum'], 2 + (i > 0), i == 2) for i in range(3)))
        self.linear = nn.Linear(h['widths'][-1], num_classes, bias=False)
        self.scaling_factor, self.autocast = h['scaling_factor'], dtype == torch.bfloat16
        self.to(device, torch.float32 if self.autocast else dtype, memory_format=torch.channels_last)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float().weight.requires_grad = False

    def forward(self, x):
        x = x.to(self.whiten.weight.dtype, memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16) if self.autocast else nullcontext():
            x = F.gelu(self.whiten(x))
            x = self.blocks(x).amax((2, 3))  # on an H200 a run is a sixth shorter than with adaptive_max_pool2d
            logits = self.linear(x.flatten(1))
        return logits.float() * self.scaling_factor  # float32, since the sum of a batch's losses can exceed float16


@torch.no_grad()
def init_whitening(net, images, eps=5e-4):
    """The eigenvectors of 2x2 patches' second moment, each over its eigenvalue's root, and their negatives (3.2)."""
    patches = images.float().unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    eigenvalues, eigenvectors = torch.linalg.eigh((patches.T @ patches / len(patches)).cpu())  # spares CUDA its solver
    filters = (eigenvectors / torch.sqrt(eigenvalues + eps)).T.reshape(12, 3, 2, 2)
    net.whiten.weight.copy_(torch.cat((filters, -filters)))


# ------------------------------------------ Optimisation ------------------------------------------

def orthogonalize(matrix):
    """Moves singular values to about 1, by three quintic Newton-Schulz steps (K. Jordan, "Muon", 2024)."""
    x = F.normalize(matrix, dim=(0, 1))
    for _ in range(3):
        gram = x.mm(x.T)
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


@torch.no_grad()
def muon(optimizer):
    """Before an SGD step: gives the filters the norm sqrt(out), and as gradients their orthogonalised momentum."""
    group = optimizer.param_groups[-1]
    filters, buffers, grads = group['params'], group['buffers'], [p.grad for p in group['params']]
    torch._foreach_mul_(buffers, group['muon_momentum'])
    torch._foreach_add_(buffers, grads)
    torch._foreach_add_(grads, buffers, alpha=group['muon_momentum'])
    for grad in grads:
        matrix = grad.to(group['dtype'], memory_format=torch.contiguous_format).flatten(1)
        grad.copy_(orthogonalize(matrix).view_as(grad))
    # BatchNorm hides the norm, which sets how far a step turns the filters.
    torch._foreach_div_(filters, torch._foreach_div(torch._foreach_norm(filters), [len(p)**0.5 for p in filters]))


def make_optimizer(net, h):
    """Nesterov SGD for the sum of a batch's losses. lr and weight_decay are per 1,024 images and divided by the factor
    1 + 1 / (1 - momentum) by which momentum lengthens a constant gradient's steps, so that each can be tuned alone;
    PyTorch multiplies a group's decay by its lr (the paper's listing).
    """
    scale = 1024 * (1 + 1 / (1 - h['momentum']))
    biases = [p for name, p in net.named_parameters() if name.endswith('bias')]
    others, filters = [net.linear.weight], [p for p in net.blocks.parameters() if p.ndim == 4]
    groups = [dict(params=params, lr=lr, peak_lr=lr, weight_decay=h['weight_decay'] * h['batch_size'] / scale / lr)
              for params, lr in ((biases, h['bias_scaler'] * h['lr'] / scale), (others, h['lr'] / scale))]
    dtype = torch.bfloat16 if net.autocast or others[0].dtype == torch.float16 else others[0].dtype
    # muon makes these gradients, in bfloat16 unless the training is in float32, as CPUs may lack bfloat16.
    groups.append(dict(params=filters, lr=h['muon_lr'], peak_lr=h['muon_lr'], momentum=0, nesterov=False,
                       muon_momentum=h['muon_momentum'], buffers=[torch.zeros_like(p) for p in filters], dtype=dtype))
    return torch.optim.SGD(groups, momentum=h['momentum'], nesterov=True, fused=net.linear.weight.is_cuda)


def lr_factor(step, total_steps):
    """From 1 down to 0."""
    return 1 - step / total_steps


def image_size(h, step, total_steps):
    """The side in pixels of the crops that a step trains on."""
    return next((size for size, until in h['crops'] if step < until * total_steps), 32)


def train_step(net, optimizer, inputs, labels, label_smoothing):
    """Returns the loss, summed over the batch, and the logits."""
    logits = net(inputs)
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction='sum')
    optimizer.zero_grad()
    loss.backward()
    muon(optimizer)
    optimizer.step()
    return loss.detach(), logits.detach()


# ------------------------------------------- Evaluation -------------------------------------------

@torch.no_grad()
def infer(net, loader, tta_level=0):
    """The float32 (N, num_classes) logits of loader.images, in order. tta_level as in hyp (the paper, section 3.5)."""
    was_training, logits = net.training, []
    net.eval()
    for images in map(loader.normalize, loader.images.split(2000)):
        views = [(1.0, images)]
        if tta_level == 3:
            padded = F.pad(images, (1,) * 4, mode='reflect')
            views = [(1 / 8, padded[..., i // 3:i // 3 + 32, i % 3:i % 3 + 32]) for i in range(9) if i != 4]
        if tta_level >= 1:
            views = [(weight / 2, mirrored) for weight, view in views for mirrored in (view, view.flip(-1))]
        logits.append(sum(weight * net(view).float() for weight, view in views))
    net.train(was_training)
    logits = torch.cat(logits)
    if tta_level == 2:  # Hiverge, 2025: more views of the least sure, here an eighth; the pair counts twice
        few, unsure = copy.copy(loader), logits.softmax(1).topk(2).values.diff()[:, 0].argsort()[-len(logits) // 8:]
        few.images = loader.images[unsure]
        logits[unsure] = (2 * logits[unsure] + 8 * infer(net, few, tta_level=3)) / 10
    return logits


def evaluate(net, loader, tta_level=0):
    """The share of loader.images that the network gets right."""
    return (infer(net, loader, tta_level).argmax(1) == loader.labels).sum().item() / len(loader.labels)


# -------------------------------------------- Training --------------------------------------------

def train(train_loader=None, *, seed=None, device=None, dtype=None, verbose=True, test_loader=None, history=None,
          **overrides):
    """Trains a network and returns it, in evaluation mode. train_loader: a CifarLoader, which stays as it is (None:
    CIFAR-10). seed: for PyTorch's global generators (None: as they are). device: None is the loader's. dtype: see Net,
    and describe for None. verbose: print a table. history: a list to which its rows are added, as dicts.
    test_loader: what to evaluate on (None: the loader's test set, if there is a table or history to fill). overrides:
    hyperparameters, as in lr=10; batch_size, aug and altflip that are not named are the loader's. Raises TypeError for
    an unknown one, ValueError for values and data that make no sense, FloatingPointError if the training diverges.
    """
    h, of_loader = merge(overrides), ('batch_size', 'aug', 'altflip')
    loader = CifarLoader(batch_size=h['batch_size'], device=device) if train_loader is None else copy.copy(train_loader)
    h |= {key: vars(loader)[key] for key in of_loader if train_loader is not None and key not in overrides}
    vars(loader).update({key: h[key] for key in of_loader}, epoch=0, flip_mask=None)
    loader.check()
    if not 0 <= loader.labels.min() <= loader.labels.max() < len(loader.classes):
        raise ValueError(f'labels must be 0 to {len(loader.classes) - 1}, as there are {len(loader.classes)} classes')
    device = torch.empty(0, device=device or loader.images.device).device  # with its index, as cuda:0
    if test_loader is None and (verbose or history is not None):
        test_loader = CifarLoader(loader.path, train=False, device=device)
    if seed is not None:
        torch.manual_seed(seed)

    net = Net(h, len(loader.classes), device, dtype or describe(device)[1])
    optimizer = make_optimizer(net, h)
    loader.images, loader.labels = loader.images.to(device, net.whiten.weight.dtype), loader.labels.to(device)
    loader.mean, loader.std = loader.mean.to(device), loader.std.to(device)
    total_steps = math.ceil(h['epochs'] * len(loader))

    # The clock stands still during the validation after each epoch.
    seconds, start = 0.0, synchronized_time(device)
    init_whitening(net, loader.normalize(loader.images[:5000]))
    state = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]  # BatchNorm's averages too
    for epoch in range(math.ceil(total_steps / len(loader))):
        net.whiten.bias.requires_grad_(epoch < h['whiten_bias_epochs'])
        for done, (inputs, labels) in zip(range(epoch * len(loader) + 1, total_steps + 1), loader, strict=False):
            for group in optimizer.param_groups:
                group['lr'] = group['peak_lr'] * lr_factor(done - 1, total_steps)
            inputs = batch_crop(inputs, image_size(h, done - 1, total_steps))
            loss, logits = train_step(net, optimizer, inputs, labels, h['label_smoothing'])
            if verbose and done == 10 and (minutes := (seconds + time.perf_counter() - start) * total_steps / 600) > 1:
                print(f'about {minutes:.0f} minutes a run', file=sys.stderr)  # the first row can be minutes away
        seconds += synchronized_time(device) - start

        if test_loader is not None:
            report(dict(epoch=epoch + 1, train_loss=loss.item() / len(labels),
                        train_acc=(logits.argmax(1) == labels).float().mean().item(),
                        val_acc=evaluate(net, test_loader), time_seconds=seconds, steps=done), verbose, history)
        if not all(tensor.isfinite().all() for tensor in state):
            raise FloatingPointError(f'the training diverged in epoch {epoch + 1}: its weights are not finite')
        start = synchronized_time(device)

    if test_loader is not None:
        tta_val_acc = evaluate(net, test_loader, h['tta_level'])
        seconds += synchronized_time(device) - start
        report(dict(epoch='eval', tta_val_acc=tta_val_acc, time_seconds=seconds, steps=done), verbose, history)
    return net.eval()


def warmup(train_loader=None, test_loader=None, *, device=None, dtype=None, **overrides):
    """Before the timing: sets the process up, and on CUDA, where a kernel's first use is slow, trains for a moment."""
    device = torch.device(device or (DEVICE if train_loader is None else train_loader.images.device))
    torch.backends.cudnn.benchmark = True
    if device.type == 'cpu':
        if platform.libc_ver()[0] == 'glibc':
            # M_MMAP_MAX, M_TRIM_THRESHOLD: keep freed blocks, whose pages the kernel would clear again. A tenth faster.
            ctypes.CDLL(None).mallopt(-4, 0)
            ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
        return
    if train_loader is None:
        train_loader = CifarLoader(None, True, hyp['batch_size'], hyp['aug'], device=device)
    loader, n = copy.copy(train_loader), 3 * overrides.get('batch_size', train_loader.batch_size)  # three batches
    loader.images, loader.labels = loader.images[:n], loader.labels[:n]
    train(loader, device=device, dtype=dtype, verbose=False, test_loader=test_loader, history=[],
          **overrides | dict(epochs=2, whiten_bias_epochs=1, lr=1e-3))


# -------------------------------------------- Harness ---------------------------------------------

def merge(overrides):
    """hyp with these changes, as far as they make sense."""
    if unknown := overrides.keys() - hyp.keys():
        raise TypeError(f'no hyperparameter {", ".join(unknown)}: there are {", ".join(hyp)}')
    h = hyp | overrides
    sense = {key: 0 < h[key] < math.inf for key in ('epochs', 'lr', 'bias_scaler', 'scaling_factor')} | dict(
        batch_size=type(h['batch_size']) is int and h['batch_size'] > 0, momentum=0 < h['momentum'] < 1,
        weight_decay=0 <= h['weight_decay'] < math.inf, label_smoothing=0 <= h['label_smoothing'] <= 1,
        whiten_bias_epochs=h['whiten_bias_epochs'] >= 0, muon_lr=0 < h['muon_lr'] < math.inf,
        muon_momentum=0 <= h['muon_momentum'] < 1,
        crops=all(type(size) is int and 16 < size <= 32 for size, _ in h['crops']),
        aug=isinstance(h['aug'], dict), altflip=h['altflip'] in (True, False), bn_momentum=0 < h['bn_momentum'] <= 1,
        widths=[type(width) for width in h['widths'] if width > 0] == [int] * 3, tta_level=h['tta_level'] in (0, 1, 2))
    if wrong := [f'{key} cannot be {h[key]}' for key in sense if not sense[key]]:
        raise ValueError(', '.join(wrong))
    return h


def describe(device):
    """The device's name, with a CPU's instruction set, as in 'AMD EPYC (AVX512-BF16)', and the fastest dtype on it."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device), torch.float16
    cpu = getattr(torch.cpu, 'get_capabilities', dict)()  # PyTorch before 2.11 cannot tell
    sets = dict(amx_bf16='AMX', avx512_bf16='AVX512-BF16', avx512_f='AVX512', avx2='AVX2')
    name = f'{cpu.get("cpu_name", "CPU")} ({next((sets[key] for key in sets if cpu.get(key)), platform.machine())})'
    # With AVX512-BF16 alone, AMD's are 1.7 times faster in bfloat16 than in float32, Xeons 1.6 times slower.
    fast = name.endswith('(AMX)') or name.endswith('(AVX512-BF16)') and name.startswith('AMD')
    return name, torch.bfloat16 if fast else torch.float32


def synchronized_time(device):
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def load_split(path, train):
    """dict(images=uint8 (N, 32, 32, 3), labels=int64 (N,), classes=list of names) of path/train.pt or path/test.pt.
    Without both, it is CIFAR-10's from torchvision's files there, or downloaded to it; for 'synthetic', made up. Raises
    ValueError for a file that is not in order, FileNotFoundError for data that cannot be had.
    """
    file = Path(path, 'train.pt' if train else 'test.pt')
    if str(path) == 'synthetic':  # the class is the brightness, under noise
        generator = torch.Generator().manual_seed(int(train))
        labels = torch.randint(10, (5000 if train else 1000,), generator=generator)
        images = 20 * labels.view(-1, 1, 1, 1) + torch.randint(64, (len(labels), 32, 32, 3), generator=generator)
        return dict(images=images.byte(), labels=labels, classes=list('0123456789'))
    if not any(Path(path, name).exists() for name in ('train.pt', 'test.pt')):
        try:
            from torchvision.datasets import CIFAR10  # here, because it takes as long to import as PyTorch
            half = CIFAR10(path, train, download=True)
        except Exception as error:
            raise FileNotFoundError(f'no CIFAR-10 in {path}, and it cannot be downloaded ({error}). Put train.pt and '
                                    'test.pt or the archive there, or use --data DIR or --data synthetic') from error
        return dict(images=torch.from_numpy(half.data), labels=torch.tensor(half.targets), classes=half.classes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # its guesses at what a damaged file may be
            data = torch.load(file, map_location='cpu', weights_only=True)
        images, labels, classes = data['images'], data['labels'], data['classes']
        ok = (images.dtype, labels.dtype, type(classes)) == (torch.uint8, torch.int64, list) and len(labels) > 0
        if not (ok and images.shape == (*labels.shape, 32, 32, 3) and 0 <= labels.min() <= labels.max() < len(classes)):
            raise ValueError(f'{images.dtype} {tuple(images.shape)}, {labels.dtype} {tuple(labels.shape)}, {classes}')
        return data
    except Exception as error:  # whatever the zip reader, the unpickler and wrong types make of it
        raise ValueError(f'{file} must hold dict(images=uint8 (N, 32, 32, 3), labels=int64 (N,) from 0, classes=list '
                         f'of names): mend or delete it. Found: {error!r:.99}') from error


def report(row, verbose, history):
    """Adds a row to history and to the printed table, under its head if it is the first."""
    if history is not None:
        history.append(row)
    if verbose:
        columns = dict(epoch=5, train_loss=10, train_acc=9, val_acc=7, tta_val_acc=11, time_seconds=12)
        if row['epoch'] == 1:
            print('|  ' + '  |  '.join(columns) + '  |')
        cells = [f'{row[key]:.4f}' if isinstance(row.get(key), float) else str(row.get(key, '')) for key in columns]
        print('|  ' + '  |  '.join(map(str.rjust, cells, columns.values())) + '  |', flush=True)


def count_pflops(h, steps, test_size, num_classes=10):
    """By the paper's convention: a training image costs three forward passes, a view in test-time augmentation one."""
    from torch.utils.flop_counter import FlopCounterMode  # here, because it can import Triton, which takes a while
    net, sizes = Net(h, num_classes, 'meta'), [image_size(h, step, steps) for step in range(steps)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for size in set(sizes):
            net(torch.empty(3 * h['batch_size'] * sizes.count(size), 3, size, size, device='meta'))
        net(torch.empty((1, 2, 2 + 16 // 8)[int(h['tta_level'])] * test_size, 3, 32, 32, device='meta'))
    muon_flops = sum(6 * len(p)**2 * (2 * p[0].numel() + len(p)) for p in net.blocks.parameters() if p.ndim == 4)
    return (counter.get_total_flops() + steps * muon_flops) / 1e15


def continue_log(path, header, device):
    """The log's runs, and whether it lacks this header, whose seed and dtype are filled in. A torn line is dropped."""
    *lines, torn = path.read_bytes().split(b'\n') if path.is_file() else [b'']
    new = header | dict(seed=time.time_ns() % 2**32, dtype=str(describe(device)[1]).removeprefix('torch.'))
    try:
        records = [json.loads(line) for line in lines]
        runs = [record for record in records if record['type'] == 'run']
        old = [record for record in records if record['type'] == 'header'][-1] if lines or torn else new
        header |= {key: old[key] for key in ('seed', 'dtype') if header[key] is None}
        ours, theirs = (of['hyperparameters'] | {key: of[key] for key in ('script', 'seed', 'dtype', 'data')}
                        for of in (header, old))
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f'{path} is not a log of this script: name another file with --log') from error
    for key in ours if lines else ():
        if ours[key] != theirs.get(key):
            raise ValueError(f'{path} is of another {key}, {theirs.get(key)}, not {ours[key]}: name another with --log')
    if torn:
        print(f'note: {path} ended in a torn line, which was dropped', file=sys.stderr)
        os.truncate(path, path.stat().st_size - len(torn))
    return runs, not lines or any(old[key] != header[key] for key in ('source', 'torch', 'device', 'threads'))


def print_summary(runs, header):
    done = [run for run in runs if not run['diverged']]
    print(f'{"SYNTHETIC data: " * header["synthetic"]}{len(runs)} runs, {len(runs) - len(done)} diverged')
    for key in ('tta_val_acc', 'seconds', 'pflops') if done else ():
        values = torch.tensor([run[key] for run in done], dtype=torch.float64)
        spread = f'   std {values.std():.4f}   stderr {values.std() / len(done)**0.5:.4f}' if len(done) > 1 else ''
        print(f'{key:13} mean {values.mean():.4f}{spread}   n {len(done)}', flush=True)


def parse_arguments():
    parser = argparse.ArgumentParser(usage='%(prog)s [options]', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, help='(default: 25 on CUDA, else 1)')
    parser.add_argument('--seed', type=int, help="run i, from 0, uses SEED + i (default: the log's, or a new one)")
    parser.add_argument('--data', help='a folder, or "synthetic" (default: $AIRBENCH_DATA, else cifar10)')
    parser.add_argument('--device', type=torch.device, default=DEVICE, help='(default: cuda if there is one, else cpu)')
    parser.add_argument('--dtype', choices=('float16', 'bfloat16', 'float32'), help="(default: the fastest)")
    parser.add_argument('--log', type=Path, help='JSON lines; continued if it exists (default: a new one in logs/)')
    parser.add_argument('--save', type=Path, help='a folder for the weights of run i, run<i>.pt (default: none)')
    for key, value in hyp.items():
        parser.add_argument(f'--{key}', type=ast.literal_eval, default=value, help='(default: %(default)s)')
    args = parser.parse_args()
    args.h = merge({key: getattr(args, key) for key in hyp})
    if 'LOCAL_RANK' in os.environ:  # torchrun gives each of its processes one thread, and all of them GPU 0
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
        if args.device.type == 'cuda':
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    torch.empty(1, device=args.device).cpu()
    if not (args.runs is None or args.runs > 0) or not 0 <= (args.seed or 0) < 2**62:
        raise ValueError('--runs must be at least 1, and --seed from 0 to 2**62')
    return args


def main():
    """The command line; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130))
    script, rank, world_size = Path(__file__).stem, int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    try:
        args = parse_arguments()
        h, path = args.h, args.log or Path('logs', f'{script}-{time.strftime("%Y%m%d-%H%M%S")}-{os.getpid()}.jsonl')
        path = path.with_suffix(f'.rank{rank}{path.suffix}') if 'RANK' in os.environ else path
        loaders = [CifarLoader(args.data, of, h['batch_size'], h['aug'], device=args.device) for of in (True, False)]
        header = dict(
            type='header', script=script, hyperparameters=json.loads(json.dumps(h)), dtype=args.dtype, seed=args.seed,
            data=dict(train=loaders[0].sha256, test=loaders[1].sha256), synthetic=loaders[0].path == 'synthetic',
            torch=torch.__version__, device=describe(args.device)[0], threads=torch.get_num_threads(),
            time=time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()), source=Path(__file__).read_text())
        runs, is_new = continue_log(path, header, args.device)
        if header['dtype'] in dict(cpu=('float16',), mps=('float16', 'bfloat16')).get(args.device.type, ()):
            raise ValueError(f'dtype {header["dtype"]} is missing or far too slow on {args.device}')
        dtype, seed = getattr(torch, header['dtype']), header['seed']
        warmup(*loaders, dtype=dtype, **h)
        for folder in filter(None, (args.save, path.parent)):
            folder.mkdir(parents=True, exist_ok=True)
        with open(path, 'a') as log:
            log.write((json.dumps(header) + '\n') * is_new)
    except (AssertionError, OSError, RuntimeError, SyntaxError, TypeError, ValueError) as error:
        print(f'{script}: error: {str(error).splitlines()[0]}', file=sys.stderr)
        return 2

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends with its reader, as in `| head -1`; the log has what is done
    sys.stdout = open(os.devnull, 'w') if rank else sys.stdout
    print(f'{script}: {loaders[0].path} data, {header["dtype"]} on {header["device"]}, log {path}', flush=True)
    numbers = range(rank, args.runs or (25 if args.device.type == 'cuda' else 1), world_size)
    try:
        for i in sorted(set(numbers) - {run['run'] for run in runs}):
            print(f'run {i}, seed {seed + i}', flush=True)
            rows, net = [], None
            try:
                net = train(loaders[0], seed=seed + i, dtype=dtype, test_loader=loaders[1], history=rows, **h)
            except FloatingPointError as error:
                print(f'run {i}: {error}', file=sys.stderr)
            columns = {key: [row[key] if math.isfinite(row[key]) else None for row in rows if key in row]
                       for key in ('train_loss', 'train_acc', 'val_acc', 'time_seconds', 'steps')}  # JSON: no NaN
            pflops = count_pflops(h, rows[-1]['steps'], len(loaders[1].images), len(loaders[0].classes))
            runs.append(dict(type='run', run=i, seed=seed + i, diverged=net is None, **columns, pflops=pflops,
                             tta_val_acc=rows[-1].get('tta_val_acc'), seconds=rows[-1]['time_seconds']))
            with open(path, 'a') as log:
                log.write(json.dumps(runs[-1]) + '\n')
            if args.save and net:
                torch.save(dict(script=script, state_dict=net.state_dict(), hyperparameters=h, dtype=header['dtype'],
                                classes=loaders[0].classes), args.save / f'run{i}.pt')
    finally:
        print_summary(runs, header)
    return int(world_size == 1 and bool(runs) and all(run['diverged'] for run in runs))


if __name__ == '__main__':
    sys.exit(main())
