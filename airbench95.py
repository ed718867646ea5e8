"""
airbench95: trains a network to 95% test accuracy on CIFAR-10, for 1.4 PFLOPs a run.

Relative to airbench94.py the blocks are wider and the training is longer, since a larger network gains more
from longer training; the lr is lower, which suits both (the paper).

Run it with python; --help lists the options, and with --data synthetic it needs neither data nor network.
Method: K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498 ("the paper").
The scripts airbench94.py, airbench94_compiled.py, airbench95.py and airbench96.py each stand alone, and differ
by their recipes and by nothing else, which `diff airbench94.py airbench95.py` shows.
"""

import argparse
import copy
import ctypes
import functools
import hashlib
import json
import math
import os
import platform
import secrets
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

####################################################################################################
# Hyperparameters (the paper's)
####################################################################################################

# lr and weight_decay are decoupled from each other, from the momentum and from the batch size: make_optimizer
# turns them into PyTorch's.
hyp = dict(
    epochs=15.0,
    batch_size=1024,
    lr=10.0,
    momentum=0.85,
    weight_decay=0.0153,
    bias_scaler=64.0,  # the BatchNorm biases learn this much faster
    label_smoothing=0.2,
    whiten_bias_epochs=3,  # the whitening layer's bias trains for so many epochs, then stays
    lookahead=True,
    aug=dict(flip=True, translate=2),
    altflip=True,
    widths=(128, 384, 384),
    bn_momentum=0.4,  # PyTorch's convention: the weight of the new batch
    scaling_factor=1 / 9,  # of the logits
    tta_level=2,  # 0: the image; 1: and its mirror; 2: and two one-pixel translations of both
)

####################################################################################################
# Data
####################################################################################################

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)
AUGMENTATIONS = ('flip', 'translate')


@functools.cache  # because to make them on a GPU waits for it
def channel_statistics(dtype, device):
    return [torch.tensor(values, dtype=dtype, device=device).view(1, 3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD)]


def normalize(images):
    """(N, 3, H, W) images in [0, 1] -> the same shape, standardised by CIFAR-10's channel statistics."""
    mean, std = channel_statistics(images.dtype, images.device)
    return images.sub(mean).div_(std)


def batch_flip_lr(images, mask):
    """Mirrors those of the (N, C, H, W) images left-right for which the bool (N,) mask is set."""
    return torch.where(mask.view(-1, 1, 1, 1), images.flip(-1), images)


def batch_crop(padded, crop_size):
    """A random crop_size square of each of the (N, C, H, W) images: (N, C, crop_size, crop_size)."""
    offsets = padded.size(-1) - crop_size + 1
    crops = padded.unfold(2, crop_size, 1).unfold(3, crop_size, 1)
    y, x = torch.randint(offsets, (2, len(padded)), device=padded.device)
    return crops[torch.arange(len(padded), device=padded.device), :, y, x]


class CifarLoader:
    """
    The images of CIFAR-10 on one device, and batches of them, normalised and augmented there.

        train_loader = CifarLoader('cifar10', train=True, batch_size=500, aug=dict(flip=True, translate=2))
        mask = train_loader.labels < 6                     # an experiment on the first six classes
        train_loader.images = train_loader.images[mask]
        train_loader.labels = train_loader.labels[mask]
        for inputs, labels in train_loader:                # (500, 3, 32, 32), (500,)
            ...

    path: a folder (None: $AIRBENCH_DATA, else cifar10), or 'synthetic'; see load_split.
    aug: flip=True mirrors images left-right, translate=r moves them by up to r pixels each way.
    drop_last, shuffle: None means what training and testing need: the value of train.
    altflip: mirror each image in every other epoch, instead of at random (the paper, section 3.6).

    Attributes, which may be assigned to at any time; the next iteration honours it:
    images: float32 (N, 3, 32, 32) in [0, 1], channels_last, not normalised. labels: int64 (N,).
    classes: the ten names. normalize: what turns a batch of images into the network's input.
    epoch: the number of iterations begun so far.
    Raises ValueError for an unknown augmentation, for images and labels that differ in number, and
    for a batch larger than the data with drop_last.
    """

    def __init__(self, path=None, train=True, batch_size=500, aug=None, drop_last=None, shuffle=None,
                 altflip=True, device=None):
        self.path = default_path() if path is None else path
        data = load_split(self.path, train)
        # (N, 32, 32, 3) in memory is (N, 3, 32, 32) in channels_last: nothing moves.
        images = data['images'].to(device or default_device()).permute(0, 3, 1, 2)
        self.images = images.float().div_(255)
        self.labels = data['labels'].to(images.device)
        self.classes = data['classes']
        self.normalize = normalize
        self.batch_size = batch_size
        self.aug = aug or {}
        self.drop_last = train if drop_last is None else drop_last
        self.shuffle = train if shuffle is None else shuffle
        self.altflip = altflip
        self.epoch = 0
        self.flip_mask = torch.empty(0, dtype=torch.bool)
        self.check()

    def check(self):
        if not set(self.aug) <= set(AUGMENTATIONS):
            raise ValueError(f'unknown augmentation among {list(self.aug)}: there are {AUGMENTATIONS}')
        if len(self.images) != len(self.labels):
            raise ValueError(f'the loader has {len(self.images)} images but {len(self.labels)} labels')
        if self.batch_size < 1 or len(self) < 1:
            raise ValueError(f'a batch of {self.batch_size} cannot be had from {len(self.images)} images')

    def __len__(self):
        return (len(self.images) if self.drop_last else len(self.images) + self.batch_size - 1) // self.batch_size

    def __iter__(self):
        self.check()
        images, labels, epoch = self.images, self.labels.to(self.images.device), self.epoch
        flip, translate = self.aug.get('flip', False), self.aug.get('translate', 0)
        # With altflip these coins are tossed once, and turned over in odd epochs.
        if flip and (epoch == 0 or not self.altflip or len(self.flip_mask) != len(images)):
            self.flip_mask = torch.rand(len(images), device=images.device) < 0.5
        flip_mask = self.flip_mask.to(images.device) ^ (self.altflip and epoch % 2 == 1)
        self.epoch += 1

        order = (torch.randperm if self.shuffle else torch.arange)(len(images), device=images.device)
        # Batch by batch rather than for the whole set at once: the same work, in a cache instead of in memory.
        for indices in order.split(self.batch_size)[:len(self)]:
            inputs = self.normalize(images[indices])
            if flip:
                inputs = batch_flip_lr(inputs, flip_mask[indices])
            if translate:
                inputs = F.pad(inputs, (translate,) * 4, mode='reflect')
                inputs = batch_crop(inputs, inputs.size(-1) - 2 * translate)
            yield inputs, labels[indices]


####################################################################################################
# Network
####################################################################################################


def conv3x3(channels_in, channels_out):
    """A 3x3 convolution whose first channels_in filters begin as the identity (the paper, section 3.3)."""
    conv = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:channels_in])
    return conv


def batchnorm(channels, momentum):
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=momentum)
    norm.weight.requires_grad = False
    return norm


class Block(nn.Module):
    def __init__(self, channels_in, channels_out, bn_momentum):
        super().__init__()
        self.conv1 = conv3x3(channels_in, channels_out)
        self.norm1 = batchnorm(channels_out, bn_momentum)
        self.conv2 = conv3x3(channels_out, channels_out)
        self.norm2 = batchnorm(channels_out, bn_momentum)

    def forward(self, x):
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        x = F.gelu(self.norm2(self.conv2(x)))
        return x


class Net(nn.Module):
    """(N, 3, 32, 32) normalised images -> (N, 10) logits in the weights' dtype."""

    def __init__(self, widths, bn_momentum, scaling_factor):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, kernel_size=2, bias=True)
        self.whiten.weight.requires_grad = False
        nn.init.zeros_(self.whiten.bias)
        self.blocks = nn.Sequential(*(Block(channels_in, channels_out, bn_momentum)
                                      for channels_in, channels_out in zip((24, *widths), widths, strict=False)))
        self.linear = nn.Linear(widths[-1], 10, bias=False)
        self.scaling_factor = scaling_factor
        self.autocast = False

    def forward(self, x):
        dtype = self.whiten.weight.dtype
        x = x.to(dtype, memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16) if self.autocast else nullcontext():
            x = F.gelu(self.whiten(x))
            x = F.max_pool2d(self.blocks(x), 3)
            logits = self.linear(x.flatten(1))
        return logits.to(dtype) * self.scaling_factor


def make_net(widths=hyp['widths'], bn_momentum=hyp['bn_momentum'], scaling_factor=hyp['scaling_factor'], *,
             device='cpu', dtype=torch.float32):
    """
    A new network, its whitening layer not yet initialised, in one of three precisions:
    float16 throughout but for the BatchNorms (float32); bfloat16 by autocast over float32 weights; float32.
    """
    net = Net(widths, bn_momentum, scaling_factor)
    net.autocast = dtype == torch.bfloat16
    net = net.to(device, torch.float32 if net.autocast else dtype, memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return net


@torch.no_grad()
def init_whitening(net, images, eps=5e-4):
    """
    Makes net's first layer whiten the 2x2 patches of these (N, 3, H, W) normalised images: its filters are
    the eigenvectors of the patches' second moment, each over the root of its eigenvalue, and their
    negatives (the paper, section 3.2; the idea is tysam-code's, from hlb-CIFAR10).
    """
    patches = images.float().unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    eigenvalues, eigenvectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (eigenvectors / torch.sqrt(eigenvalues + eps)).T.reshape(12, 3, 2, 2)
    net.whiten.weight.copy_(torch.cat((filters, -filters)))


####################################################################################################
# Optimisation
####################################################################################################


def make_optimizer(net, lr, momentum, weight_decay, bias_scaler, batch_size):
    """
    Nesterov SGD for the sum of a batch's losses. A constant gradient moves a weight by lr * (1 + 1 / (1 - momentum))
    of PyTorch's lr; dividing by that and by 1,024 images leaves an lr that means the same for any momentum and batch
    size. The decay of a group is divided by its lr, by which PyTorch multiplies it (the paper's listing).
    """
    scale = 1024 * (1 + 1 / (1 - momentum))
    biases = [p for name, p in net.named_parameters() if p.requires_grad and 'norm' in name]
    others = [p for name, p in net.named_parameters() if p.requires_grad and 'norm' not in name]
    groups = [dict(params=params, lr=peak_lr, peak_lr=peak_lr, weight_decay=weight_decay * batch_size / scale / peak_lr)
              for params, peak_lr in ((biases, bias_scaler * lr / scale), (others, lr / scale))]
    return torch.optim.SGD(groups, momentum=momentum, nesterov=True)


def lr_factor(step, total_steps):
    """The share of its peak that the lr has at a step, from 0: 0.2, up to 1 at 23% of the steps, down to 0.07."""
    peak = int(0.23 * total_steps)
    if step < peak:
        return 0.2 + 0.8 * step / peak
    return 1 - 0.93 * (step - peak) / (total_steps - peak)


def train_step(net, optimizer, inputs, labels, label_smoothing):
    """One step of the optimiser; returns the loss, summed over the batch, and the (N, 10) logits, both detached."""
    logits = net(inputs)
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction='sum')
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()


def lookahead_state(net):
    """What the Lookahead averages: all floating-point tensors of the network, BatchNorm statistics too."""
    return [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]


def lookahead_update(average, state, decay):
    """Moves the average towards the network's state, and the network to the average (the paper, section 3.4)."""
    for slow, fast in zip(average, state, strict=True):
        slow.lerp_(fast, 1 - decay)
        fast.copy_(slow)


####################################################################################################
# Evaluation
####################################################################################################

EVAL_BATCH_SIZE = 2000


@torch.no_grad()
def infer(net, loader, tta_level=0):
    """
    The network's float32 (N, 10) logits for loader.images, in their order, whatever the loader's shuffling
    and augmentation. tta_level 1 averages each image's logits with its mirror's; 2 takes half of that and
    half the mean of the same for the image moved by one pixel up-left and down-right (the paper, section 3.5).
    """
    if tta_level not in (0, 1, 2):
        raise ValueError(f'tta_level is 0, 1 or 2, not {tta_level}')

    def mirrored(images):
        if tta_level == 0:
            return net(images).float()
        return 0.5 * net(images).float() + 0.5 * net(images.flip(-1)).float()

    def translated(images):
        padded = F.pad(images, (1,) * 4, mode='reflect')
        return 0.5 * (mirrored(padded[..., :-2, :-2]) + mirrored(padded[..., 2:, 2:]))

    was_training = net.training
    net.eval()
    logits = []
    for images in loader.images.split(EVAL_BATCH_SIZE):
        images = loader.normalize(images)
        logits.append(0.5 * (mirrored(images) + translated(images)) if tta_level == 2 else mirrored(images))
    net.train(was_training)
    return torch.cat(logits)


def evaluate(net, loader, tta_level=0):
    """The share of loader.images that the network gets right."""
    logits = infer(net, loader, tta_level)
    return (logits.argmax(1) == loader.labels.to(logits.device)).sum().item() / len(logits)


####################################################################################################
# Training
####################################################################################################


def train(train_loader=None, *, epochs=hyp['epochs'], batch_size=hyp['batch_size'], lr=hyp['lr'],
          momentum=hyp['momentum'], weight_decay=hyp['weight_decay'], bias_scaler=hyp['bias_scaler'],
          label_smoothing=hyp['label_smoothing'], whiten_bias_epochs=hyp['whiten_bias_epochs'],
          lookahead=hyp['lookahead'], aug=hyp['aug'], altflip=hyp['altflip'], widths=hyp['widths'],
          bn_momentum=hyp['bn_momentum'], scaling_factor=hyp['scaling_factor'], tta_level=hyp['tta_level'],
          device=None, dtype=None, seed=None, verbose=True, test_loader=None, history=None, run=None):
    """
    Trains a network and returns it, in evaluation mode, ready for infer and evaluate.

    train_loader: a CifarLoader, which stays as it is: a copy of it is used. None: CIFAR-10 as the scripts
        find it, with this batch_size, aug and altflip; a loader brings its own.
    device: None is the loader's, or else CUDA where there is one, or else the CPU.
    epochs: fractions count. The schedule follows from the number of steps.
    dtype: torch.float16, bfloat16 or float32, see make_net. None: the fastest that suits the device.
    seed: seeds PyTorch's global generators; None leaves them as they are.
    verbose: prints a table with a row an epoch. history: a list that takes its rows, as dicts. test_loader:
        for the accuracies; None: the test set from the loader's path. Without verbose and history nothing
        is evaluated. run: a name for the table's first column.
    Raises ValueError for arguments that make no sense, FloatingPointError where the training diverges.
    """
    if train_loader is None:
        train_loader = CifarLoader(None, True, batch_size, aug, altflip=altflip, device=device)
    device = torch.device(device or train_loader.images.device)
    if not (math.isfinite(epochs) and epochs > 0):
        raise ValueError(f'epochs must be more than 0, not {epochs}')
    if len(train_loader) < 1:
        raise ValueError(f'{len(train_loader.images)} images are less than one batch of {train_loader.batch_size}')
    if seed is not None:
        torch.manual_seed(seed)

    net = make_net(widths, bn_momentum, scaling_factor, device=device, dtype=dtype or default_dtype(device))
    optimizer = make_optimizer(net, lr, momentum, weight_decay, bias_scaler, train_loader.batch_size)
    loader = copy.copy(train_loader)
    loader.images, loader.epoch = loader.images.to(device, net.whiten.weight.dtype), 0
    evaluated = verbose or history is not None
    if evaluated and test_loader is None:
        test_loader = CifarLoader(loader.path, train=False, device=device)
    total_steps = math.ceil(epochs * len(loader))
    step, shown = 0, time.perf_counter()
    if verbose and run is None:
        print_head(loader.path)

    # The clock stands still during the validation after each epoch.
    seconds, start = 0.0, synchronized_time(device)
    init_whitening(net, loader.normalize(loader.images[:5000]))
    state = lookahead_state(net)
    average = [tensor.clone() for tensor in state]
    for epoch in range(math.ceil(total_steps / len(loader))):
        net.train()
        net.whiten.bias.requires_grad_(epoch < whiten_bias_epochs)
        losses = []
        for inputs, labels in loader:
            for group in optimizer.param_groups:
                group['lr'] = group['peak_lr'] * lr_factor(step, total_steps)
            loss, logits = train_step(net, optimizer, inputs, labels, label_smoothing)
            losses.append(loss)
            step += 1
            if lookahead and step % 5 == 0:
                lookahead_update(average, state, decay=0.95**5 * (step / total_steps)**3)
            if verbose:
                shown = show_progress(shown, seconds + time.perf_counter() - start, step, total_steps)
            if step == total_steps:
                break
        if lookahead and step == total_steps:
            lookahead_update(average, state, decay=1.0)
        net.eval()
        seconds += synchronized_time(device) - start

        row = dict(run=run, epoch=epoch + 1, train_loss=loss.item() / len(inputs),
                   train_acc=(logits.argmax(1) == labels).sum().item() / len(labels), time_seconds=seconds, steps=step)
        if evaluated:
            row['val_acc'] = evaluate(net, test_loader)
            report(row, verbose, history)
        if not all(tensor.isfinite().all() for tensor in (torch.stack(losses), *state)):
            raise FloatingPointError(f'the training diverged in epoch {epoch + 1}: loss or weights are not finite')
        start = synchronized_time(device)

    if evaluated:
        tta_val_acc = evaluate(net, test_loader, tta_level)
        seconds += synchronized_time(device) - start
        report(dict(run=run, epoch='eval', tta_val_acc=tta_val_acc, time_seconds=seconds, steps=step), verbose, history)
    return net


def warmup(*, batch_size=hyp['batch_size'], widths=hyp['widths'], device=None, dtype=None, test_size=10_000):
    """
    A few untimed steps of each kind that train takes, on noise: the whitening bias trained and frozen, each with each
    evaluation batch size. On CUDA a kernel's first use is slow, and cudnn.benchmark tries several; a CPU needs none.
    """
    device = torch.empty(0, device=device or default_device()).device  # with its index, as tensors say it
    if device.type == 'cpu':
        return
    net = make_net(widths, device=device, dtype=dtype or default_dtype(device))
    optimizer = make_optimizer(net, hyp['lr'], hyp['momentum'], hyp['weight_decay'], hyp['bias_scaler'], batch_size)
    images = torch.rand(max(batch_size, EVAL_BATCH_SIZE), 3, 32, 32, device=device, dtype=net.whiten.weight.dtype)
    labels = torch.randint(10, (batch_size,), device=device)
    init_whitening(net, normalize(images))
    for bias_trains in (True, False):
        net.whiten.bias.requires_grad_(bias_trains)
        for _ in range(3):
            train_step(net, optimizer, normalize(images[:batch_size]), labels, hyp['label_smoothing'])
        for size in {min(test_size, EVAL_BATCH_SIZE), test_size % EVAL_BATCH_SIZE} - {0}:
            infer(net, SimpleNamespace(images=images[:size], normalize=normalize), hyp['tta_level'])


####################################################################################################
# Harness: where it runs
####################################################################################################


def default_device():
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def default_dtype(device):
    """float16 on CUDA; bfloat16 on a CPU that computes it natively; else float32."""
    device, native = torch.device(device), torch.cpu.get_capabilities()
    if device.type == 'cpu' and (native.get('avx512_bf16') or native.get('amx_bf16')):
        return torch.bfloat16
    return torch.float16 if device.type == 'cuda' else torch.float32


def device_name(device):
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    return torch.cpu.get_capabilities().get('cpu_name') or platform.processor() or platform.machine()


def synchronized_time(device):
    """Seconds on a clock, once the device has done all that was asked of it."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def set_up_process(device):
    """What speeds up the whole process, and so is a script's to do and not an imported module's."""
    torch.backends.cudnn.benchmark = True
    if 'LOCAL_WORLD_SIZE' in os.environ:  # torchrun gives each of its processes one thread
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ['LOCAL_WORLD_SIZE'])))
    if device.type == 'cpu' and platform.libc_ver()[0] == 'glibc':
        # glibc hands every large freed block back to the kernel, which clears its pages anew in the next step.
        # Keeping them, by mallopt(3) with M_MMAP_MAX = -4 and M_TRIM_THRESHOLD = -1, saves a tenth of the time.
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


####################################################################################################
# Harness: the data's files
####################################################################################################


def default_path():
    return os.environ.get('AIRBENCH_DATA') or 'cifar10'


def load_split(path, train):
    """
    One half of CIFAR-10 as dict(images=uint8 (N, 32, 32, 3), labels=int64 (N,), classes=10 names), from
    path/train.pt or path/test.pt; where it is missing, torchvision reads or downloads the data set, and both
    are written. path 'synthetic' makes up a stand-in. Raises ValueError for a file that is not in order,
    FileNotFoundError where there is neither data nor network.
    """
    if str(path) == 'synthetic':
        return synthetic_split(train)
    name = 'train' if train else 'test'
    file = Path(path, f'{name}.pt')
    if not file.exists():
        return fetch_cifar10(Path(path))[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # its guesses at what a damaged file may be
            data = torch.load(file, map_location='cpu', weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # whatever the zip reader and the unpickler make of it
        raise ValueError(f'{file} is damaged, or no file of PyTorch tensors: delete it and run again') from error

    images, labels, classes = (data.get(key) if isinstance(data, dict) else None
                               for key in ('images', 'labels', 'classes'))
    for key, value, dtype, shape in (('images', images, torch.uint8, ('N', 32, 32, 3)),
                                     ('labels', labels, torch.int64, ('N',))):
        if not (torch.is_tensor(value) and value.dtype == dtype and value.shape[1:] == shape[1:] and value.numel()):
            found = f'{value.dtype} {tuple(value.shape)}' if torch.is_tensor(value) else type(value).__name__
            raise ValueError(f'{file}: {key} must be a {dtype} tensor of shape {shape}, and is {found}')
    if len(images) != len(labels):
        raise ValueError(f'{file} has {len(images)} images but {len(labels)} labels')
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f'{file}: labels must be 0 to 9, and are {labels.min()} to {labels.max()}')
    if not (isinstance(classes, list) and len(classes) == 10):
        raise ValueError(f'{file}: classes must be a list of 10 names')
    return data


@functools.cache  # the second split comes with the first
def fetch_cifar10(folder):
    """Both splits from torchvision's files in folder, or downloaded; cached there as train.pt and test.pt."""
    from torchvision.datasets import CIFAR10  # here, because it takes as long to import as PyTorch

    def read(root, download):
        halves = {name: CIFAR10(root, train=name == 'train', download=download) for name in ('train', 'test')}
        return {name: dict(images=torch.from_numpy(half.data), labels=torch.tensor(half.targets), classes=half.classes)
                for name, half in halves.items()}

    splits = None
    with suppress(RuntimeError):  # so torchvision says that files are missing or damaged
        splits = read(folder, download=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A folder of its own, because another process may be at the same, and either may be cut off.
        with tempfile.TemporaryDirectory(dir=folder, prefix='tmp-') as scratch:
            if splits is None:
                if (folder / CIFAR10.filename).exists():
                    shutil.copy(folder / CIFAR10.filename, scratch)
                splits = read(scratch, download=True)
            for file in (folder / 'train.pt', folder / 'test.pt'):
                if not file.exists():
                    torch.save(splits[file.stem], Path(scratch, file.name))
                    os.replace(Path(scratch, file.name), file)
    except Exception as error:
        if splits is None:
            with suppress(OSError):
                folder.rmdir()  # unless it holds something
            raise FileNotFoundError(
                f'no CIFAR-10 in {folder}, and it cannot be downloaded ({error}). Put train.pt and test.pt or the '
                f'extracted archive into {folder}, name another folder with --data DIR, or use --data synthetic'
            ) from error
        print(f'note: the data could not be cached in {folder} ({error})', file=sys.stderr)
    return splits


def synthetic_split(train):
    """50,000 or 10,000 made-up images: a smooth pattern for each of 10 classes, under smooth and fine noise."""
    generator = torch.Generator().manual_seed(0)

    def smooth(n, size):
        return F.interpolate(torch.randn(n, 3, size, size, generator=generator), size=32, mode='bilinear')

    patterns = smooth(10, 4)
    generator.manual_seed(1 if train else 2)
    images = torch.empty(50_000 if train else 10_000, 32, 32, 3, dtype=torch.uint8)
    labels = torch.randint(10, (len(images),), generator=generator)
    for chunk, classes in zip(images.split(1000), labels.split(1000), strict=True):
        noise = smooth(1000, 8) + 0.5 * torch.randn(1000, 3, 32, 32, generator=generator)
        chunk.copy_((128 + 40 * (0.3 * patterns[classes] + noise)).clamp(0, 255).permute(0, 2, 3, 1))
    return dict(images=images, labels=labels, classes=[f'pattern {i}' for i in range(10)])


####################################################################################################
# Harness: output and logs
####################################################################################################

SCRIPT = Path(__file__).stem
COLUMNS = ('run', 'epoch', 'train_loss', 'train_acc', 'val_acc', 'tta_val_acc', 'time_seconds')


def print_head(path):
    line = '|  ' + '  |  '.join(COLUMNS) + '  |' + ('  SYNTHETIC data' if str(path) == 'synthetic' else '')
    print('-' * len(line), line, '-' * len(line), sep='\n', flush=True)


def report(row, verbose, history):
    """Takes a row of the table to where it is wanted."""
    if history is not None:
        history.append(row)
    if verbose:
        cells = [row.get(column) for column in COLUMNS]
        cells = ['' if cell is None else f'{cell:.4f}' if isinstance(cell, float) else str(cell) for cell in cells]
        cells = [cell.rjust(len(column)) for cell, column in zip(cells, COLUMNS, strict=True)]
        if sys.stderr.isatty():
            print('\r\033[K', end='', file=sys.stderr, flush=True)
        print('|  ' + '  |  '.join(cells) + '  |', flush=True)


def show_progress(shown, seconds, step, total_steps):
    """On a terminal, and at most once a second, says how far the run is. Returns the time when it last did."""
    now = time.perf_counter()
    if now - shown < 1 or not sys.stderr.isatty():
        return shown
    eta = round(seconds / step * (total_steps - step))
    print(f'\r\033[Kstep {step}/{total_steps}, {eta // 60}:{eta % 60:02d} to go', end='', file=sys.stderr, flush=True)
    return now


def count_pflops(steps, batch_size, test_size, tta_level):
    """PFLOPs of a run by the paper's convention: a training image costs three forward passes, a view in TTA one."""
    from torch.utils.flop_counter import FlopCounterMode  # here, because it imports Triton, which takes a while
    net = make_net(device='meta')
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, 32, 32, device='meta'))
    return counter.get_total_flops() * (3 * steps * batch_size + (1, 2, 6)[tta_level] * test_size) / 1e15


def sha256(loader):
    """Of the images as uint8 (N, 32, 32, 3) and of the labels, as they are in train.pt and test.pt."""
    images = hashlib.sha256()
    for chunk in loader.images.split(1000):
        images.update(chunk.mul(255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy())
    return dict(images=images.hexdigest(), labels=hashlib.sha256(loader.labels.cpu().numpy()).hexdigest())


def append_to_log(log, record):
    """Writes a whole line, or none."""
    size = os.fstat(log.fileno()).st_size
    try:
        log.write(json.dumps(record).encode() + b'\n')
    except OSError:
        with suppress(OSError):
            log.truncate(size)
        raise


def open_log(path, header):
    """Opens the log to append to it, and writes the header where it tells something new. Returns it and its runs."""
    text = path.read_bytes() if path.is_file() else b''
    size = text.rfind(b'\n') + 1
    try:
        records = [json.loads(line) for line in text[:size].splitlines()]
        headers = [record for record in records if record['type'] == 'header']
        runs = [record for record in records if record['type'] == 'run']
        old = headers[-1] if text else header
        if header['seed'] is None:
            header['seed'] = old['seed'] if text else secrets.randbelow(2**32)
        ours, theirs = ({**of['hyperparameters'], **{key: of[key] for key in ('script', 'dtype', 'seed', 'data')}}
                        for of in (header, old))
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f'{path} is not a log of this script: name another file with --log') from error
    for key in ours | theirs:
        if ours.get(key) != theirs.get(key):
            raise ValueError(f'{path} holds runs with another {key}, {theirs.get(key)} instead of {ours.get(key)}: '
                             'name another file with --log')
    path.parent.mkdir(parents=True, exist_ok=True)
    log = open(path, 'ab', buffering=0)
    if size < len(text):
        print(f'note: {path} ended in a torn line, which was dropped', file=sys.stderr)
        log.truncate(size)
    if old is header or any(old[key] != header[key] for key in ('source', 'torch', 'device', 'threads')):
        append_to_log(log, header)
    return log, runs


def print_summary(runs, header, path):
    synthetic = 'SYNTHETIC data, ' if header['synthetic'] else ''
    print(f'{SCRIPT}: {len(runs)} runs, {synthetic}{header["dtype"]} on {header["device"]}, '
          f'{header["threads"]} threads, seed {header["seed"]}')
    finished = [run for run in runs if not run['diverged']]
    if finished:
        accuracies, spread = [run['tta_val_acc'] for run in finished], ''
        if len(finished) > 1:
            deviation = statistics.stdev(accuracies)
            spread = f'   std {deviation:.4f}   stderr {deviation / len(finished)**0.5:.4f}'
        print(f'tta_val_acc   mean {statistics.fmean(accuracies):.4f}{spread}   n {len(finished)}')
        print(f'time_seconds  mean {statistics.fmean(run["seconds"] for run in finished):.2f}')
        print(f'PFLOPs        {finished[0]["pflops"]:.3g} a run')
    if len(finished) < len(runs):
        print(f'diverged      {len(runs) - len(finished)} of {len(runs)} runs, which the means leave out')
    print(f'log           {path}', flush=True)


####################################################################################################
# Harness: command line
####################################################################################################


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=int, metavar='N', help='number of runs (default: 25 on CUDA, else 1)')
    parser.add_argument('--epochs', type=float, default=hyp['epochs'], help='fractions count (default: %(default)s)')
    parser.add_argument('--seed', type=int, metavar='S',
                        help='run i, from 0, uses seed S + i (default: the log\'s, or a new one, which is logged)')
    parser.add_argument('--data', default=default_path(), metavar='DIR',
                        help='folder with train.pt and test.pt or CIFAR-10\'s own files, to which it is downloaded '
                             'otherwise; "synthetic": a made-up stand-in (default: $AIRBENCH_DATA, else cifar10)')
    parser.add_argument('--device', default=default_device(),
                        help='cuda, cuda:1, cpu, or mps, which is untested (default: cuda if there is one, else cpu)')
    parser.add_argument('--dtype', choices=('float16', 'bfloat16', 'float32'),
                        help='default: float16 on CUDA, bfloat16 on a CPU that has it natively, else float32')
    parser.add_argument('--log', type=Path, metavar='FILE',
                        help='JSON lines; a log that exists is continued, up to N runs (default: a new one in logs/)')
    args = parser.parse_args()

    try:
        args.device = torch.device(args.device)
        if 'LOCAL_RANK' in os.environ and args.device.type == 'cuda':
            args.device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        torch.empty(1, device=args.device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f'--device {args.device} cannot be used here: {str(error).splitlines()[0]}')
    if args.dtype is None:
        args.dtype = str(default_dtype(args.device)).removeprefix('torch.')
    if args.runs is None:
        args.runs = 25 if args.device.type == 'cuda' else 1
    if args.runs < 1:
        parser.error('--runs must be at least 1')
    if not 0 < args.epochs < math.inf:
        parser.error('--epochs must be more than 0')
    if not 0 <= (args.seed or 0) < 2**62:
        parser.error('--seed must be from 0 to 2**62')
    if args.device.type == 'cpu' and args.dtype == 'float16':
        parser.error('--dtype float16 is tens of times slower on a CPU: use bfloat16 or float32')
    if args.device.type == 'mps' and args.dtype != 'float32':
        parser.error('--dtype must be float32 on mps')
    if args.log is None:
        now = time.strftime('%Y%m%d-%H%M%S', time.gmtime())
        args.log = Path('logs', f'{SCRIPT}-{now}-{secrets.token_hex(3)}.jsonl')
    if 'RANK' in os.environ:
        args.log = args.log.with_suffix(f'.rank{os.environ["RANK"]}{args.log.suffix}')
    return args


def set_up(args):
    """Reads, checks and warms up all that a run needs; returns the two loaders, the log, its runs and its header."""
    train_loader, test_loader = (
        CifarLoader(args.data, train, hyp['batch_size'], hyp['aug'] if train else None, altflip=hyp['altflip'],
                    device=args.device) for train in (True, False))
    header = dict(
        type='header', script=SCRIPT, hyperparameters=json.loads(json.dumps(dict(hyp, epochs=args.epochs))),
        dtype=args.dtype, seed=args.seed, data=dict(train=sha256(train_loader), test=sha256(test_loader)),
        synthetic=args.data == 'synthetic', torch=torch.__version__, device=device_name(args.device),
        threads=torch.get_num_threads(), time=time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
        arguments={name: str(value) for name, value in vars(args).items()}, source=Path(__file__).read_text())
    warmup(device=args.device, dtype=getattr(torch, args.dtype), test_size=len(test_loader.images))
    return train_loader, test_loader, *open_log(args.log, header), header


def run_once(i, args, seed, train_loader, test_loader, verbose):
    """Trains once; returns the run's line for the log."""
    rows, diverged = [], False
    try:
        train(train_loader, epochs=args.epochs, dtype=getattr(torch, args.dtype), seed=seed, verbose=verbose,
              test_loader=test_loader, history=rows, run=i)
    except FloatingPointError as error:
        print(f'run {i}: {error}', file=sys.stderr)
        diverged = True
    columns = {column: [row[column] if math.isfinite(row[column]) else None for row in rows if column in row]
               for column in ('train_loss', 'train_acc', 'val_acc', 'time_seconds')}  # JSON has no NaN
    return dict(type='run', run=i, seed=seed, diverged=diverged, **columns,
                tta_val_acc=rows[-1].get('tta_val_acc'), seconds=rows[-1]['time_seconds'],
                pflops=count_pflops(rows[-1]['steps'], hyp['batch_size'], len(test_loader.images), hyp['tta_level']))


def main():
    """The command line; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    args = parse_arguments()
    set_up_process(args.device)
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    try:
        train_loader, test_loader, log, runs, header = set_up(args)
    except (OSError, ValueError) as error:
        print(f'{SCRIPT}: error: {error}', file=sys.stderr)
        return 2

    code, done = 0, {run['run'] for run in runs}
    try:
        try:
            if rank == 0:
                print(f'{SCRIPT}: {args.dtype} on {header["device"]}, seed {header["seed"]}, log {args.log}')
                print_head(args.data)
            for i in range(rank, args.runs, world_size):
                if i in done:
                    continue
                runs.append(run_once(i, args, header['seed'] + i, train_loader, test_loader, verbose=rank == 0))
                try:
                    append_to_log(log, runs[-1])
                except OSError as error:
                    print(f'run {i}, {runs[-1]["tta_val_acc"]}, was not saved in {args.log}: {error}', file=sys.stderr)
                    code = 1
            if runs and all(run['diverged'] for run in runs):
                code = 1
        except SystemExit as stop:  # Ctrl-C or SIGTERM
            code = stop.code
        if rank == 0:
            print_summary(runs, header, args.log)
    except BrokenPipeError:  # as in `python airbench94.py | head -1`: nobody is left to read the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    return code


if __name__ == '__main__':
    sys.exit(main())
