"""
The search for airbench94_muon.py: trains variants of its recipe, one after another, and logs each as it ends.

    python results/search_94_muon.py QUEUE LOG DATA

A line of QUEUE is a JSON object, what is changed of `base` below, and "seed"; lines may be added while it runs. A line
of LOG is a run: changes, seed, steps, PFLOPs (training, optimiser and test-time augmentation) and the accuracy without
test-time augmentation, with the mirrored pair, and with `selective`: for the tta_share of the images that the pair
leaves least sure, all nine one-pixel translations, mirrored. `budget`, in PFLOPs, sets the number of steps.
"""

import ctypes
import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

base = dict(
    budget=0.13, muon_lr=0.24, muon_momentum=0.6, ns_steps=3, renorm=1, sgd_momentum=0.85,
    bias_lr=0.053, head_lr=0.67, weight_decay=2e-6, label_smoothing=0.2, whiten_bias_epochs=3.0, whiten_images=5000,
    bn_momentum=0.4, act='gelu', widths=[64, 256, 256], pool_first=[0, 0, 0], translate=2, brightness=0.0, contrast=0.0,
    stages=[[1.0, 32, 'none', 2000]],  # share of the steps, pixels, how (none, area: resized, crop), batch size
    moved_crops=False,  # crops of images already moved by up to `translate`, as from the scripts' loader
    one_bias_lr=False,  # the whitening bias's lr is that of the other biases until it is frozen, at an epoch's end
    lookahead=False,  # as in airbench94.py
    extra=0,  # convolutions more in block 3, with a residual
    tta_share=0.25)

data = {}
MEAN, STD = (torch.tensor(value).view(3, 1, 1) for value in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))


def load(root):
    for split in ('train', 'test'):
        d = torch.load(Path(root, f'{split}.pt'), weights_only=True)
        images = d['images'].permute(0, 3, 1, 2).float().div_(255).sub_(MEAN).div_(STD)
        data[split] = images, d['labels']


def conv3(cin, cout):
    conv = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:cin])
    return conv


def norm(channels, momentum):
    module = nn.BatchNorm2d(channels, eps=1e-12, momentum=momentum)
    module.weight.requires_grad = False
    return module


class Block(nn.Module):
    def __init__(self, cin, cout, h, i):
        super().__init__()
        self.pool_first = h.pool_first[i]
        self.conv1, self.norm1 = conv3(cin, cout), norm(cout, h.bn_momentum)
        self.conv2, self.norm2 = conv3(cout, cout), norm(cout, h.bn_momentum)
        self.act = dict(gelu=F.gelu, silu=F.silu)[h.act]
        if h.extra and i == 2:
            self.conv3, self.norm3 = conv3(cout, cout), norm(cout, h.bn_momentum)

    def forward(self, x):
        x = self.conv1(F.max_pool2d(x, 2)) if self.pool_first else F.max_pool2d(self.conv1(x), 2)
        x = self.act(self.norm1(x))
        if hasattr(self, 'conv3'):
            return self.act(self.norm3(self.conv3(self.act(self.norm2(self.conv2(x))))) + x)
        return self.act(self.norm2(self.conv2(x)))


class Net(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad = False
        nn.init.zeros_(self.whiten.bias)
        channels = [24, *h.widths]
        self.blocks = nn.Sequential(*(Block(channels[i], channels[i + 1], h, i) for i in range(3)))
        self.linear = nn.Linear(h.widths[-1], 10, bias=False)
        with torch.no_grad():
            self.linear.weight /= self.linear.weight.std()
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast('cpu', torch.bfloat16) if x.device.type == 'cpu' else nullcontext():
            x = self.linear(self.blocks(F.gelu(self.whiten(x))).amax((2, 3)))
        return x.float() / self.linear.in_features


@torch.no_grad()
def init_whitening(net, images, eps=5e-4):
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / torch.sqrt(values + eps)).T.reshape(12, 3, 2, 2)
    net.whiten.weight.copy_(torch.cat((filters, -filters)))


def orthogonalize(g, steps):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if g.size(-2) > g.size(-1):
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if g.size(-2) > g.size(-1) else x


def muon_flops(shapes, steps):
    total = 0
    for shape in shapes:
        m, n = sorted((shape[0], math.prod(shape[1:])))
        total += steps * (2 * m * m * n * 2 + 2 * m**3)
    return total


def forward_flops(h, size):
    net = Net(h).to('meta')
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, size, size, device='meta'))
    shapes = [p.shape for p in net.parameters() if p.ndim == 4 and p.requires_grad]
    return counter.get_total_flops(), muon_flops(shapes, h.ns_steps)


def views_shift(images, dy, dx):
    padded = F.pad(images, (1,) * 4, mode='reflect')
    return padded[..., 1 + dy:33 + dy, 1 + dx:33 + dx]


@torch.no_grad()
def evaluate(net, h):
    net.eval()
    images, labels = data['test']

    def logits_of(images, view=lambda x: x):
        return torch.cat([net(view(chunk)) for chunk in images.split(1000)])

    plain = logits_of(images)
    mirror = (plain + logits_of(images, lambda x: x.flip(-1))) / 2
    out = dict(none=acc(plain, labels), mirror=acc(mirror, labels))
    probs = mirror.softmax(1).topk(2, 1).values
    margin = probs[:, 0] - probs[:, 1]
    hard = margin.argsort()[:int(h.tta_share * len(labels))]
    total = mirror[hard] * 2
    for dy, dx in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
        moved = torch.cat([views_shift(chunk, dy, dx) for chunk in images[hard].split(1000)])
        total += logits_of(moved) + logits_of(moved, lambda x: x.flip(-1))
    sel = mirror.clone()
    sel[hard] = total / 18
    out['selective'] = acc(sel, labels)
    out['selective_loss'] = F.cross_entropy(sel, labels).item()
    out['selective_views'] = 2 + 16 * h.tta_share
    return out


def acc(logits, labels):
    return (logits.argmax(1) == labels).float().mean().item()


def batches(h, epoch, flip_mask, order, size, how, batch_size):
    images, labels = data['train']
    for idx in order.split(batch_size)[:len(order) // batch_size]:
        x = images[idx]
        x = torch.where((flip_mask[idx] ^ (epoch % 2 == 1)).view(-1, 1, 1, 1), x.flip(-1), x)
        if how == 'crop' and not h.moved_crops:
            crops = x.unfold(2, size, 1).unfold(3, size, 1)
        else:
            crops = F.pad(x, (h.translate,) * 4, mode='reflect').unfold(2, 32, 1).unfold(3, 32, 1)
        rows, columns = torch.randint(crops.size(2), (2, len(idx)))
        x = crops[torch.arange(len(idx)), :, rows, columns]
        if how == 'crop' and h.moved_crops:
            crops = x.unfold(2, size, 1).unfold(3, size, 1)
            rows, columns = torch.randint(crops.size(2), (2, len(idx)))
            x = crops[torch.arange(len(idx)), :, rows, columns]
        if how == 'area':
            x = F.interpolate(x, size=size, mode='area')
        if h.contrast or h.brightness:
            x = x * (1 + h.contrast * (2 * torch.rand(len(x), 1, 1, 1) - 1))
            x = x + h.brightness * (2 * torch.rand(len(x), 1, 1, 1) - 1)
        yield x, labels[idx]


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


def run(changes, seed):
    h = SimpleNamespace(**base | changes)
    torch.manual_seed(seed)
    h.stages = [[*stage, 2000][:4] for stage in h.stages]  # the first runs' stages had no batch size
    flops = {size: forward_flops(h, size) for size in {size for _, size, *_ in h.stages} | {32}}
    muon = flops[32][1]
    tta = (2 + 16 * h.tta_share) * 10000 * flops[32][0]
    per_step = sum(share * 3 * batch_size * flops[size][0] for share, size, _, batch_size in h.stages) + muon
    steps = round((h.budget * 1e15 - tta) / per_step)

    net = Net(h).train()
    filters = [p for p in net.parameters() if p.ndim == 4 and p.requires_grad]
    biases = [p for name, p in net.named_parameters() if 'norm' in name and p.requires_grad]
    decay, peaks = h.weight_decay * 2000, [h.bias_lr, h.bias_lr, h.head_lr]
    sgd = torch.optim.SGD([dict(params=params, lr=lr, weight_decay=decay / lr) for params, lr
                           in zip(([net.whiten.bias], biases, [net.linear.weight]), peaks, strict=True)],
                          momentum=h.sgd_momentum, nesterov=True, fused=True)
    moment = [torch.zeros_like(p) for p in filters]
    state = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
    average = [tensor.clone() for tensor in state]
    start = time.perf_counter()
    init_whitening(net, data['train'][0][:h.whiten_images])
    flip_mask = torch.rand(50000) < 0.5
    step, epoch, seen, spent, losses = 0, 0, 0, 0.0, []
    while step < steps:
        size, how, batch_size = stage_of(h, step / steps)
        for x, y in batches(h, epoch, flip_mask, torch.randperm(50000), size, how, batch_size):
            if step >= steps or stage_of(h, step / steps) != [size, how, batch_size]:
                break
            factor, whitened = 1 - step / steps, seen / (h.whiten_bias_epochs * 50000)
            for group, peak in zip(sgd.param_groups, peaks, strict=True):
                group['lr'] = peak * factor
            if not h.one_bias_lr:
                sgd.param_groups[0]['lr'] = h.bias_lr * max(0, 1 - whitened)
            net.whiten.bias.requires_grad_(whitened < 1)
            loss = F.cross_entropy(net(x), y, label_smoothing=h.label_smoothing, reduction='sum')
            sgd.zero_grad()
            for p in filters:
                p.grad = None
            loss.backward()
            sgd.step()
            with torch.no_grad():
                for p, buffer in zip(filters, moment, strict=True):
                    buffer.mul_(h.muon_momentum).add_(p.grad)
                    grad = p.grad.add(buffer, alpha=h.muon_momentum)
                    if step % h.renorm == 0:
                        p.mul_(len(p)**0.5 / p.norm())
                    update = orthogonalize(grad.flatten(1), h.ns_steps)
                    p.add_(update.view_as(p).to(p.dtype), alpha=-h.muon_lr * factor)
            losses.append(loss.item() / len(y))
            spent += 3 * batch_size * flops[size][0] + muon
            seen += len(y)
            step += 1
            if h.lookahead and step % 5 == 0:
                lookahead_update(average, state, 0.95**5 * (step / steps)**3)
        epoch += 1
    if h.lookahead:
        lookahead_update(average, state, 1.0)
    seconds = time.perf_counter() - start
    return dict(changes=changes, seed=seed, steps=steps, epochs=seen / 50000, pflops=(spent + tta) / 1e15,
                train_loss=sum(losses[-10:]) / 10, train_seconds=seconds, **evaluate(net, h))


def main():
    ctypes.CDLL(None).mallopt(-4, 0)
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
    queue, log, root = map(Path, sys.argv[1:])
    load(root)
    done = 0
    while True:
        lines = queue.read_text().splitlines()
        if done == len(lines):
            time.sleep(5)
            continue
        changes = json.loads(lines[done])
        record = run(changes, changes.pop('seed'))
        done += 1
        with open(log, 'a') as file:
            file.write(json.dumps(record) + '\n')


if __name__ == '__main__':
    main()
