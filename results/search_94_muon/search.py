"""
The search for airbench94_muon.py: trains variants of its recipe, one after another, and logs each
as it ends.

    python results/search_94_muon/search.py QUEUE LOG DATA

DATA is what the scripts take for --data.

A line of QUEUE is a JSON object, what is changed of `base` below, and "seed". Lines may be added
while it runs, each with its newline, and it waits for them until it is stopped or a line says end.
Started again, it begins with the first line: give it a queue of what is left. A line of LOG is a
run: changes, seed, steps, PFLOPs (training, optimiser and test-time augmentation) and the accuracy
without test-time augmentation, with the mirrored pair, and with `selective`: for the tta_share of
the images that the pair leaves least sure, all nine one-pixel translations, mirrored. `budget`, in
PFLOPs, sets the number of steps. With `train_images` below 50,000 there is `held_out` too, the
accuracy of the other images with the mirrored pair. `diverged` is a run whose loss, or its
proxy's, is not finite in the end: its accuracy says nothing. With a `proxy`, epochs, train_loss and
train_acc are of the images that it passes on, and proxy_loss is its own on these. With "save" the
trained weights go to a file of that name.
"""

import json
import math
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import airbench94_muon  # noqa: E402

base = dict(
    budget=0.13,
    # trains on the first so many images; the others are tested too: as they are many, their
    # accuracy should scatter less from seed to seed
    train_images=50000,
    muon_lr=0.24,
    block_lrs=[1.0, 1.0, 1.0],  # times muon_lr, of each block
    muon_momentum=0.6,
    ns_steps=3,
    ns_coefficients=[3.4445, -4.7750, 2.0315],
    renorm=1,  # weights are normalised every so many steps
    # True: each filter to norm 1; False: a layer's weight to the root of the number of its filters
    row_norm=False,
    # decay of the mean square of each filter's update, which the update is divided by (NorMuon,
    # arXiv 2510.05491), its norm kept
    normuon=0.0,
    sgd_momentum=0.85,
    bias_lr=0.053,
    head_lr=0.67,
    weight_decay=2e-6,
    label_smoothing=0.2,
    whiten_bias_epochs=3.0,
    whiten_images=5000,
    bn_momentum=0.4,
    act='gelu',
    widths=[64, 256, 256],
    pool_first=[0, 0, 0],
    early_pool=False,  # the pool of a block that pools first stands before the norm in front of it
    translate=2,
    brightness=0.0,
    contrast=0.0,
    stages=[
        [1.0, 32, 'none', 2000]
    ],  # share of the steps, pixels, how (none, area: resized, crop), batch size
    batch_scale=1.0,  # times the stages' batch sizes
    # crops of images already moved by up to `translate`, as from the scripts' loader
    moved_crops=False,
    # the whitening bias's lr is that of the other biases until it is frozen, at an epoch's end
    one_bias_lr=False,
    lookahead=False,  # as in airbench94.py
    mids=None,  # the blocks' channels after their first convolution, if not `widths`
    kernels=[
        [3, 3],
        [3, 3],
        [3, 3],
    ],  # the sides of each block's convolutions'; those of 2 are without padding
    unpadded=[[0, 0], [0, 0], [0, 0]],  # 1: that one, of 3, is without padding too
    strided=[0, 0, 0],  # 1: the block has no pool, its first convolution moves by two pixels
    # convolutions of 3 that a pool follows leave out the last row and column of a map of odd size,
    # which the pool would drop: they are not padded at that side
    trim=False,
    # padded convolutions of 3 on maps of up to 3x3 are a matrix product for each row, without the
    # padding
    small_maps=False,
    groups=[[1, 1], [1, 1], [1, 1]],  # of channels, of each block's convolutions
    # a third convolution in the block, with a residual that is added before the last activation.
    # 1: around the third convolution; 2: around the second and third, as in the original project's
    # later recipes for 96%
    extra=[0, 0, 0],
    pools=[
        '2x2',
        '2x2',
        '2x2',
    ],  # or 3x3: overlapping, with stride 2; ceil: drops no rows of a map of odd size; to 3x3
    # or se: a block's channels times twice the sigmoid of a linear map of their means over
    # positions
    gate=None,
    gate_lr=0.1,  # Muon's, of the gates' matrices
    # or maxavg: the mean of the maximum and the average over positions; or both: block 2's maxima
    # too, beside block 3's
    head='max',
    # the logits are divided by it; None: by the number of features. airbench94_muon.py acts as if
    # it was 384 at all widths.
    head_scale=None,
    ghost=0,  # BatchNorm over so many images at a time
    dropout=0.0,  # of the features before the head
    cutout=0,  # pixels, of the image before it is reduced
    lr_end=0.0,  # share of the peak
    lr_power=1.0,  # of the share of the steps that are left
    # [share of the steps, share of the peak]: at last the lr is constant, with a Lookahead every 4
    # steps of decay 0.7
    tail=None,
    # [start, decay]: from this share of the steps, the average of the weights that is tested
    ema=None,
    # block 1 trains for this share of the steps, its lr falling to 0, and then has no backward pass
    freeze=1.0,
    # this share of each batch has a backward pass through block 1 and the whitening layer, and is
    # normalised there by its own mean and variance
    block1_share=1.0,
    # [start, share]: then the share of images with least loss (the proxy's, if there is one), when
    # last seen, is skipped every other time
    prune=None,
    # [widths, share, every]: a small network, the proxy, passes on this share of a batch, the
    # images with the most loss, and is trained on them in every so many batches. A stage's batch
    # size is what is passed on. The original project's airbench96_faster.py has
    # [[32, 64, 64], 0.5, 4], and a proxy whose whitening bias stays 0.
    proxy=None,
    tta_share=0.25,
)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# For the networks and for Muon's products.
DTYPE = (
    torch.bfloat16
    if DEVICE == 'cuda' or getattr(torch.cpu, 'get_capabilities', dict)().get('avx512_bf16')
    else torch.float32
)
data = {}
MEAN, STD = (
    torch.tensor(value).view(3, 1, 1)
    for value in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
)


def load(root):
    for split in ('train', 'test'):
        d = airbench94_muon.load_split(root, split == 'train')
        images = d['images'].permute(0, 3, 1, 2).float().div_(255).sub_(MEAN).div_(STD)
        data[split] = images.to(DEVICE), d['labels'].to(DEVICE)


def convolve_small_maps(x, weight):
    """
    F.conv2d(x, weight, padding=1) for square maps of up to 3x3, by a matrix product for each row.

    For two channels that is 16 products on a map of 2x2 and 63 on one of 3x3, in place of 36 and
    81, as there is no padding. airbench94_muon.py has more on it.

    x: (N, channels_in, side, side).
    weight: (channels_out, channels_in, 3, 3).
    """
    side = x.size(-1)
    x = x.permute(0, 2, 3, 1)  # (N, side, side, channels_in), as it lies in memory
    weight = weight.permute(2, 3, 1, 0)  # (3, 3, channels_in, channels_out)
    # For each column of the output, the column of the window that falls on each of the map's; zeros
    # where none does.
    weight = F.pad(weight, (0, 0, 0, 0, side - 2, side - 2))
    windows = [weight[:, side - 1 - column :][:, :side] for column in range(side)]
    windows = torch.stack(windows, 3)  # (3, side, channels_in, side, channels_out)
    outputs = []
    for row in range(side):
        first = max(row - 1, 0)
        last = min(row + 1, side - 1)
        inputs = x[:, first : last + 1].flatten(1)
        filters = windows[first - row + 1 : last - row + 2].flatten(3).flatten(0, 2)
        outputs.append(inputs @ filters)
    return torch.cat(outputs, 1).unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)


class Convolution(nn.Conv2d):
    trim = False
    small_maps = False

    def forward(self, x):
        height, width = x.shape[2:]
        if self.small_maps and height <= 3:
            return convolve_small_maps(x, self.weight)
        if self.trim:
            x = F.pad(x, (1, 1 - width % 2, 1, 1 - height % 2))
        return super().forward(x)


def convolution(cin, cout, h, kernel=3, unpadded=0, stride=1, groups=1, trim=False):
    padding = 0 if unpadded or trim else kernel // 3
    conv = Convolution(cin, cout, kernel, stride, padding, bias=False, groups=groups)
    conv.trim = trim
    conv.small_maps = h.small_maps and padding == stride == groups == 1
    for weight in conv.weight.data.chunk(groups):
        nn.init.dirac_(weight[: cin // groups])
    return conv


class GhostNorm(nn.BatchNorm2d):
    size = 0

    def forward(self, x):
        if not self.training or not self.size:
            return super().forward(x)
        return torch.cat([super(GhostNorm, self).forward(part) for part in x.split(self.size)])


def norm(channels, h):
    momentum = h.bn_momentum
    if h.ghost:  # so that a step's updates of the running averages add up to bn_momentum
        momentum = 1 - (1 - momentum) ** (h.ghost / h.stages[0][3])
    module = GhostNorm(channels, eps=1e-12, momentum=momentum)
    module.size = h.ghost
    module.weight.requires_grad = False
    return module


def pool(x, how):
    if how == 'none':
        return x
    if how == 'to 3x3':
        return F.adaptive_max_pool2d(x, 3)
    if how == '3x3':
        return F.max_pool2d(
            x, 3, 2, ceil_mode=True
        )  # as many positions as 2x2 for sizes that are odd
    return F.max_pool2d(x, 2, ceil_mode=how == 'ceil')


class Block(nn.Module):
    def __init__(self, cin, cout, h, i):
        super().__init__()
        self.pool_first, middle = h.pool_first[i], h.mids[i] if h.mids else cout
        sides, unpadded, groups = h.kernels[i], h.unpadded[i], h.groups[i]
        stride = 1 + h.strided[i]
        # Whether a block's pool drops the last row and column of a map of odd size.
        drops = [h.trim and h.pools[j] == '2x2' and not h.strided[j] for j in range(3)]
        trim = (
            drops[i] and sides[0] == 3 and not h.pool_first[i],
            i < 2 and drops[i + 1] and sides[1] == 3 and bool(h.pool_first[i + 1]),
        )
        self.conv1 = convolution(cin, middle, h, sides[0], unpadded[0], stride, groups[0], trim[0])
        self.norm1 = norm(middle, h)
        self.conv2 = convolution(middle, cout, h, sides[1], unpadded[1], 1, groups[1], trim[1])
        self.norm2 = norm(cout, h)
        self.act = dict(gelu=F.gelu, silu=F.silu)[h.act]
        pool_next = h.early_pool and i < 2 and h.pool_first[i + 1]
        self.pool_last = h.pools[i + 1] if pool_next else 'none'
        pooled_before = h.early_pool and h.pool_first[i]
        self.gate, self.pool = h.gate, 'none' if h.strided[i] or pooled_before else h.pools[i]
        if h.gate:
            self.gate_weight = nn.Parameter(torch.zeros(cout, cout))
        self.extra = h.extra[i]
        if self.extra:
            self.conv3, self.norm3 = convolution(cout, cout, h), norm(cout, h)

    def forward(self, x):
        x = self.conv1(pool(x, self.pool)) if self.pool_first else pool(self.conv1(x), self.pool)
        residual = self.act(self.norm1(x))
        x = self.norm2(pool(self.conv2(residual), self.pool_last))
        if self.gate:
            x = x * (2 * torch.sigmoid(x.mean((2, 3)) @ self.gate_weight.T))[..., None, None]
        x = self.act(x)
        if self.extra == 1:
            residual = x
        return self.act(self.norm3(self.conv3(x)) + residual) if self.extra else x


class Net(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad = False
        nn.init.zeros_(self.whiten.bias)
        channels = [24, *h.widths]
        self.blocks = nn.Sequential(*(Block(channels[i], channels[i + 1], h, i) for i in range(3)))
        self.linear = nn.Linear(h.widths[-1] + (h.head == 'both') * h.widths[1], 10, bias=False)
        with torch.no_grad():
            self.linear.weight /= self.linear.weight.std()
        self.head, self.dropout = h.head, nn.Dropout(h.dropout)
        self.block1_share = h.block1_share
        self.head_scale = h.head_scale or self.linear.in_features
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        with (
            torch.autocast(DEVICE, DTYPE)
            if x.device.type == DEVICE and DTYPE == torch.bfloat16
            else nullcontext()
        ):
            if self.head == 'both':
                of_block2 = self.blocks[:2](F.gelu(self.whiten(x)))
                x = self.blocks[2](of_block2)
            elif self.training and self.block1_share < 1:
                n = round(self.block1_share * len(x))
                first = self.blocks[0](F.gelu(self.whiten(x[:n])))
                with torch.no_grad():
                    rest = self.blocks[0](F.gelu(self.whiten(x[n:])))
                x = self.blocks[1:](torch.cat((first, rest)))
            else:
                x = self.blocks(F.gelu(self.whiten(x)))
            if self.head == 'maxavg':
                x = (x.amax((2, 3)) + x.mean((2, 3))) / 2
            else:
                x = x.amax((2, 3))
            if self.head == 'both':
                x = torch.cat((x, of_block2.amax((2, 3))), 1)
            x = self.linear(self.dropout(x))
        return x.float() / self.head_scale


@torch.no_grad()
def init_whitening(net, images, eps=5e-4):
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    values, vectors = torch.linalg.eigh((patches.T @ patches / len(patches)).cpu())
    filters = (vectors / torch.sqrt(values + eps)).T.reshape(12, 3, 2, 2)
    net.whiten.weight.copy_(torch.cat((filters, -filters)))


def orthogonalize(g, steps, coefficients):
    a, b, c = coefficients
    x = g.to(DTYPE)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if g.size(-2) > g.size(-1):
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if g.size(-2) > g.size(-1) else x


def filters_of(net):
    """What Muon trains: each weight, and of how many groups of channels it is."""
    groups = {conv.weight: conv.groups for conv in net.modules() if isinstance(conv, nn.Conv2d)}
    return {
        p: groups.get(p, 1)
        for name, p in net.named_parameters()
        if (p.ndim == 4 or 'gate' in name) and p.requires_grad
    }


def muon_flops(filters, steps):
    total = 0
    for p, groups in filters.items():
        m, n = sorted((p.shape[0] // groups, math.prod(p.shape[1:])))
        total += groups * steps * (2 * m * m * n * 2 + 2 * m**3)
    return total


def forward_flops(h, size):
    net = Net(h).to('meta').eval()  # as BatchNorm refuses a single value of a channel to train on
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, size, size, device='meta'))
    with torch.no_grad(), FlopCounterMode(display=False) as block:
        net.blocks[0](net.whiten(torch.empty(1, 3, size, size, device='meta')))
    return (
        counter.get_total_flops(),
        muon_flops(filters_of(net), h.ns_steps),
        block.get_total_flops(),
    )


def views_shift(images, size, how, dy, dx):
    reduced = how in ('area', 'bilinear')
    side = 32 if reduced else size
    padded, first = F.pad(images, (1,) * 4, mode='reflect'), 1 + (32 - side) // 2
    view = padded[..., first + dy : first + side + dy, first + dx : first + side + dx]
    return F.interpolate(view, size=size, mode=how) if reduced else view


@torch.no_grad()
def evaluate(net, h):
    net.eval()
    whole, labels = data['test']
    size, how = h.stages[-1][1:3]
    images = views_shift(whole, size, how, 0, 0)

    def logits_of(images, view=lambda x: x):
        return torch.cat([net(view(chunk)) for chunk in images.split(1000)])

    plain = logits_of(images)
    mirror = (plain + logits_of(images, lambda x: x.flip(-1))) / 2
    out = dict(none=acc(plain, labels), mirror=acc(mirror, labels))
    probs = mirror.softmax(1).topk(2, 1).values
    margin = probs[:, 0] - probs[:, 1]
    hard = margin.argsort()[: int(h.tta_share * len(labels))]
    total = mirror[hard] * 2
    for dy, dx in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
        moved = views_shift(whole[hard], size, how, dy, dx)
        total += logits_of(moved) + logits_of(moved, lambda x: x.flip(-1))
    sel = mirror.clone()
    sel[hard] = total / 18
    out['selective'] = acc(sel, labels)
    out['selective_loss'] = F.cross_entropy(sel, labels).item()
    # The least loss that a factor on the logits gives: to compare networks that label smoothing
    # leaves unsure unalike.
    out['scaled_loss'] = min(
        F.cross_entropy(sel * factor / 10, labels).item() for factor in range(5, 50)
    )
    out['selective_views'] = 2 + 16 * h.tta_share
    held_out = [tensor[h.train_images :] for tensor in data['train']]
    if len(held_out[1]):
        images = views_shift(held_out[0], size, how, 0, 0)
        logits = logits_of(images) + logits_of(images, lambda x: x.flip(-1))
        out['held_out'] = acc(logits, held_out[1])
        out['held_out_loss'] = min(
            F.cross_entropy(logits * factor / 20, held_out[1]).item() for factor in range(5, 50)
        )
    return out


def acc(logits, labels):
    return (logits.argmax(1) == labels).float().mean().item()


def batches(h, flip_mask, order, size, how, batch_size):
    images, labels = data['train']
    for idx in order.split(batch_size)[: len(order) // batch_size]:
        x = images[idx]
        x = torch.where(flip_mask[idx].view(-1, 1, 1, 1), x.flip(-1), x)
        if how == 'crop' and not h.moved_crops:
            crops = x.unfold(2, size, 1).unfold(3, size, 1)
        else:
            crops = F.pad(x, (h.translate,) * 4, mode='reflect').unfold(2, 32, 1).unfold(3, 32, 1)
        rows, columns = torch.randint(crops.size(2), (2, len(idx)), device=DEVICE)
        x = crops[torch.arange(len(idx), device=DEVICE), :, rows, columns]
        if how == 'crop' and h.moved_crops:
            crops = x.unfold(2, size, 1).unfold(3, size, 1)
            rows, columns = torch.randint(crops.size(2), (2, len(idx)), device=DEVICE)
            x = crops[torch.arange(len(idx), device=DEVICE), :, rows, columns]
        if h.contrast or h.brightness:
            x = x * (1 + h.contrast * (2 * torch.rand(len(x), 1, 1, 1, device=DEVICE) - 1))
            x = x + h.brightness * (2 * torch.rand(len(x), 1, 1, 1, device=DEVICE) - 1)
        if h.cutout:
            y0, x0 = (
                torch.randint(x.size(-1) - h.cutout + 1, (len(x), 1, 1, 1), device=DEVICE)
                for _ in range(2)
            )
            at = torch.arange(x.size(-1), device=DEVICE)
            inside = [(at >= start) & (at < start + h.cutout) for start in (y0, x0)]
            x = x.masked_fill(inside[0].mT & inside[1], 0)
        if how == 'bilinear' and DEVICE == 'cuda':
            x = airbench94_muon.resize(x, size)  # which is quicker there
        elif how in ('area', 'bilinear'):
            x = F.interpolate(x, size=size, mode=how)
        yield x, labels[idx], idx


def stage_of(h, frac):
    total = 0
    for share, *stage in h.stages:
        total += share
        if frac < total:
            return stage
    return h.stages[-1][1:]


@torch.no_grad()
def lookahead_update(average, state, decay):
    for slow, fast in zip(average, state, strict=True):
        slow.lerp_(fast, 1 - decay)
        fast.copy_(slow)


def settings(changes):
    """
    `base` and the changes, as a namespace. Each stage has its batch size.

    Raises ValueError for a change of what `base` does not have, and for a batch of no images or of
    more than there are.
    """
    unknown = sorted(changes.keys() - base.keys())
    if unknown:
        raise ValueError(f'base has no {", ".join(unknown)}')
    h = SimpleNamespace(**base | changes)
    h.stages = [[*stage, 2000][:4] for stage in h.stages]
    for stage in h.stages:
        stage[3] = round(h.batch_scale * stage[3])
        drawn = drawn_images(h, stage[3])
        if not 0 < drawn <= h.train_images:
            raise ValueError(f'there is no batch of {drawn} from {h.train_images} images')
    return h


def drawn_images(h, batch_size):
    """How many images are drawn for a batch: of these the proxy, if there is one, leaves some."""
    return round(batch_size / h.proxy[1]) if h.proxy else batch_size


def settings_of_proxy(h):
    widths = h.proxy[0]
    plain = dict(mids=None, extra=[0, 0, 0], gate=None, freeze=1.0, block1_share=1.0, dropout=0.0)
    return SimpleNamespace(**vars(h) | plain | dict(widths=widths))


def make_learner(h):
    """A network, what trains it, and the state of that."""
    net = Net(h).to(DEVICE).train()
    filters = filters_of(net)
    biases = [p for name, p in net.named_parameters() if 'norm' in name and p.requires_grad]
    # An epoch decays the weights alike at any batch_scale.
    decay = h.weight_decay * 2000 * h.batch_scale
    peaks = [h.bias_lr, h.bias_lr, h.head_lr]
    sgd = torch.optim.SGD(
        [
            dict(params=params, lr=lr, weight_decay=decay / lr)
            for params, lr in zip(
                ([net.whiten.bias], biases, [net.linear.weight]), peaks, strict=True
            )
        ],
        momentum=h.sgd_momentum,
        nesterov=True,
        fused=True,
    )
    return SimpleNamespace(
        h=h,
        net=net,
        names={p: name for name, p in net.named_parameters()},
        filters=filters,
        biases=biases,
        peaks=peaks,
        sgd=sgd,
        moment=[torch.zeros_like(p) for p in filters],
        second=[torch.zeros(len(p), 1, device=DEVICE) for p in filters],
    )


def set_lr(learner, factor, whitened):
    """
    factor: the lr's share of its peak.
    whitened: how much of the training of the whitening layer's bias is over: 0 at first, 1 and more
        when it is frozen.
    """
    for group, peak in zip(learner.sgd.param_groups, learner.peaks, strict=True):
        group['lr'] = peak * factor
    if not learner.h.one_bias_lr:
        learner.sgd.param_groups[0]['lr'] = learner.h.bias_lr * max(0, 1 - whitened)
    learner.net.whiten.bias.requires_grad_(whitened < 1)


def update(learner, loss, step, steps, factor):
    """A step of the optimisers. loss: the sum over a batch. factor: the lr's share of its peak."""
    h, names, filters, sgd = learner.h, learner.names, learner.filters, learner.sgd
    sgd.zero_grad()
    for p in filters:
        p.grad = None
    loss.backward()
    if h.block1_share < 1:  # the loss is a sum over the batch
        for p in sgd.param_groups[0]['params'] + learner.biases:
            if p.grad is not None and names[p].startswith(('whiten', 'blocks.0')):
                p.grad.div_(h.block1_share)
    sgd.step()
    with torch.no_grad():
        for p, buffer, mean_square in zip(filters, learner.moment, learner.second, strict=True):
            early = h.freeze < 1 and names[p].startswith('blocks.0')
            if early and step >= h.freeze * steps:
                continue
            buffer.mul_(h.muon_momentum).add_(p.grad)
            grad = p.grad.add(buffer, alpha=h.muon_momentum)
            gate = 'gate' in names[p]
            if step % h.renorm == 0 and not gate:
                if h.row_norm:
                    p.div_(p.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
                else:
                    p.mul_(len(p) ** 0.5 / p.norm())
            direction = grad.flatten(1).unflatten(0, (filters[p], -1))
            direction = orthogonalize(direction, h.ns_steps, h.ns_coefficients).flatten(0, 1)
            if h.normuon:
                direction = direction.float()  # of DTYPE until here
                size_before = direction.norm()
                mean_square.lerp_(direction.square().mean(1, keepdim=True), 1 - h.normuon)
                direction = direction / (mean_square.sqrt() + 1e-8)
                direction = direction * (size_before / direction.norm())
            decayed = 1 - step / (h.freeze * steps) if early else factor
            lr = h.muon_lr * h.block_lrs[int(names[p].split('.')[1])]
            p.add_(
                direction.view_as(p).to(p.dtype),
                alpha=-(h.gate_lr if gate else lr) * decayed,
            )


def hardest(proxy, x, y, n, trains, step, steps, factor):
    """
    The n images of a batch that the proxy has the most loss on: their positions, in the order of
    the batch; and the proxy's loss on each image of the batch.

    trains: whether the proxy is trained, on the n images.
    """
    with nullcontext() if trains else torch.no_grad():
        smoothing = proxy.h.label_smoothing
        losses = F.cross_entropy(proxy.net(x), y, label_smoothing=smoothing, reduction='none')
        most, positions = losses.topk(n)
        if trains:
            update(proxy, most.sum(), step, steps, factor)
    return positions.sort().values, losses.detach()


def run(changes, seed, save=None):
    h = settings(changes)
    torch.manual_seed(seed)
    flops = {size: forward_flops(h, size) for size in {size for _, size, *_ in h.stages}}
    # Images are tested as in the last stage: their centre, or the whole image reduced.
    last = flops[h.stages[-1][1]]
    muon = last[1]
    tta = (2 + 16 * h.tta_share) * 10000 * last[0]

    every = h.proxy[2] if h.proxy else 1
    if h.proxy:
        of_proxy = {size: forward_flops(settings_of_proxy(h), size) for size in flops}

    def cost(size, batch_size, frac, proxy_trains):
        """
        A step's FLOPs.

        proxy_trains: whether the proxy is trained in it, or the share of the steps that do.
        """
        share = 0 if frac >= h.freeze else h.block1_share
        total = batch_size * (3 * flops[size][0] - 2 * (1 - share) * flops[size][2]) + muon
        if h.proxy:
            passes = 1 + 2 * proxy_trains
            total += drawn_images(h, batch_size) * passes * of_proxy[size][0]
            total += proxy_trains * of_proxy[size][1]
        return total

    grid = [(i + 0.5) / 1000 for i in range(1000)]
    steps = round(
        (h.budget * 1e15 - tta)
        * 1000
        / sum(
            cost(size, batch_size, frac, 1 / every)
            for frac in grid
            for size, _, batch_size in [stage_of(h, frac)]
        )
    )
    if steps < 1:
        raise ValueError(f'{h.budget} PFLOPs are not enough for a step and the test')

    if save:
        Path(save).parent.mkdir(parents=True, exist_ok=True)
    learner = make_learner(h)
    net = learner.net
    state = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
    average = [tensor.clone() for tensor in state]
    start = time.perf_counter()
    init_whitening(net, data['train'][0][: h.whiten_images])
    flip_mask = torch.rand(h.train_images, device=DEVICE) < 0.5
    loss_of = torch.full((h.train_images,), math.inf, device=DEVICE)
    skipped = torch.zeros_like(flip_mask)
    learners = [learner]
    if h.proxy:
        proxy = make_learner(settings_of_proxy(h))
        proxy.net.whiten.load_state_dict(net.whiten.state_dict())
        learners.append(proxy)
    averaging = False
    step, seen, spent, losses, accs = 0, 0, 0.0, [], []
    while step < steps:
        size, how, batch_size = stage_of(h, step / steps)
        order = torch.randperm(h.train_images, device=DEVICE)
        if h.prune and step >= h.prune[0] * steps:
            easy = (loss_of < loss_of.quantile(h.prune[1])) & ~skipped
            order, skipped = order[~easy[order]], easy
        for x, y, idx in batches(h, flip_mask, order, size, how, drawn_images(h, batch_size)):
            if step >= steps or stage_of(h, step / steps) != [size, how, batch_size]:
                break
            whitened = seen / (h.whiten_bias_epochs * h.train_images)
            falling, lr_end = (1 - h.tail[0], h.tail[1]) if h.tail else (1, h.lr_end)
            left = max(0, 1 - step / (falling * steps))
            factor = lr_end + (1 - lr_end) * left**h.lr_power
            for each_learner in learners:
                set_lr(each_learner, factor, whitened)
            if h.proxy:
                trains = step % every == 0
                hard, drawn_losses = hardest(proxy, x, y, batch_size, trains, step, steps, factor)
                loss_of[idx] = drawn_losses
                proxy_loss = drawn_losses[hard].mean()
                x, y = x[hard], y[hard]
            if step >= h.freeze * steps:
                net.blocks[0].requires_grad_(False)
            logits = net(x)
            each = F.cross_entropy(logits, y, label_smoothing=h.label_smoothing, reduction='none')
            loss = each.sum()
            if not h.proxy:
                loss_of[idx] = each.detach()
            update(learner, loss, step, steps, factor)
            losses.append(loss.detach() / len(y))
            accs.append((logits.detach().argmax(1) == y).float().mean())
            spent += cost(size, batch_size, step / steps, step % every == 0)
            seen += len(y)
            step += 1
            if h.lookahead and step % 5 == 0:
                lookahead_update(average, state, 0.95**5 * (step / steps) ** 3)
            if h.ema and step >= h.ema[0] * steps:
                for slow, fast in zip(average, state, strict=True):
                    slow.lerp_(fast, 1 - h.ema[1] if averaging else 1.0)
                averaging = True
            if h.tail and not averaging and left == 0:
                lookahead_update(average, state, 0.0)
                averaging = True
            elif h.tail and averaging and (steps - step) % 4 == 0:
                lookahead_update(average, state, 0.7)
        flip_mask[order] ^= True  # up to the run of seed 1428: also those that `prune` had skipped
    if h.lookahead or h.ema:
        lookahead_update(average, state, 1.0)
    if DEVICE == 'cuda':
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if save:
        torch.save(net.state_dict(), save)
    train_loss = sum(losses[-10:]).item() / 10
    tested = evaluate(net, h)
    if h.proxy:
        tested['proxy_loss'] = proxy_loss.item()
    return dict(
        changes=changes,
        seed=seed,
        # The test's loss too, as the last step can be the one that fails.
        diverged=not math.isfinite(
            train_loss + tested['selective_loss'] + tested.get('proxy_loss', 0)
        ),
        steps=steps,
        epochs=seen / h.train_images,
        pflops=(spent + tta) / 1e15,
        dtype=str(DTYPE)[6:],
        device=airbench94_muon.device_name(torch.device(DEVICE)),
        torch=torch.__version__,
        train_seconds=seconds,
        train_loss=train_loss,
        train_acc=sum(accs[-10:]).item() / 10,
        **tested,
    )


def whole_lines(text):
    """The lines of a queue, without a last one that is being written. An end needs no newline."""
    lines = text.splitlines()
    if lines and lines[-1] != 'end' and not text.endswith('\n'):
        lines.pop()
    return lines


def main():
    """The command line. Returns the exit code."""
    airbench94_muon.set_up_process(torch.device(DEVICE))
    if len(sys.argv) != 4:
        print('search: error: give it QUEUE LOG DATA', file=sys.stderr)
        return 2
    queue, log, root = map(Path, sys.argv[1:])
    try:  # what would fail only after the first run, too
        load(root)
        queue.read_text()
        open(log, 'a').close()
    except (OSError, ValueError) as error:
        print(f'search: error: {error}', file=sys.stderr)
        return 2
    done = 0
    while True:
        lines = whole_lines(queue.read_text())
        if done == len(lines):
            time.sleep(5)
            continue
        if lines[done] == 'end':
            return 0
        done += 1
        try:
            changes = json.loads(lines[done - 1])
            record = run(changes, changes.pop('seed'), changes.pop('save', None))
        except Exception:  # the next recipe may do
            traceback.print_exc()
            print(f'search: line {done} of the queue is left out', file=sys.stderr)
            continue
        with open(log, 'a') as file:
            file.write(json.dumps(record) + '\n')


if __name__ == '__main__':
    sys.exit(main())
