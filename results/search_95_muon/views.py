"""
What other test-time augmentation would give trained networks of airbench94_muon.py.

    python results/search_95_muon/views.py DATA NETWORK [NETWORK ...] > LOG

DATA is the folder of CIFAR-10, each NETWORK a file that --save has written. All views come with
their mirror images. First each image gets logits from the image as it is. Then the share of the
images that are least sure gets other views too. Their logits are the mean over these views and the
image as it is, which counts `weight` times. The script's own test-time augmentation is `one pixel`,
a share of 0.125 and a weight of 2.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import airbench94_muon

SHARES = (0.0625, 0.125, 0.2)
WEIGHTS = (1, 2, 4)


def translations(images, reach):
    """By up to `reach` pixels along both axes, but for the image where it is."""
    size = images.size(-1)
    padded = F.pad(images, (reach,) * 4, mode='reflect')
    for y in range(2 * reach + 1):
        for x in range(2 * reach + 1):
            if (y, x) != (reach, reach):
                yield padded[..., y : y + size, x : x + size]


def along_an_axis(images):
    """By a pixel to the left, right, top and bottom."""
    padded = F.pad(images, (1,) * 4, mode='reflect')
    for y, x in ((0, 1), (1, 0), (1, 2), (2, 1)):
        yield padded[..., y : y + 32, x : x + 32]


def resized(images, sizes):
    for size in sizes:
        yield F.interpolate(images, size=size, mode='bilinear')


KINDS = {
    'one pixel': lambda images: translations(images, 1),
    'one pixel along an axis': along_an_axis,
    'up to two pixels': lambda images: translations(images, 2),
    'resized to 30 and 34 pixels': lambda images: resized(images, (30, 34)),
}


def load_net(file):
    """The network and the seed of its training."""
    saved = torch.load(file, map_location='cpu', weights_only=True)
    net = airbench94_muon.Net(saved['hyperparameters'])
    net.load_state_dict(saved['state_dict'])
    return net.eval(), saved['seed']


@torch.no_grad()
def mirrored_logits(net, images):
    """The mean of the logits of each image and its mirror image."""
    return torch.cat([net(batch) + net(batch.flip(-1)) for batch in images.split(1000)]) / 2


def try_views(net, seed, loader):
    """Prints a line for each kind of views, share and weight."""

    def report(logits, **row):
        accuracy = (logits.argmax(1) == loader.labels).float().mean().item()
        print(json.dumps(dict(seed=seed, **row, accuracy=round(accuracy, 4))), flush=True)

    plain = mirrored_logits(net, loader.normalize(loader.images))
    report(plain, views='the image and its mirror image')
    best, second = plain.softmax(1).topk(2).values.unbind(1)
    unsure = (best - second).argsort()[: int(max(SHARES) * len(plain))]
    images = loader.normalize(loader.images[unsure])
    for name, views_of in KINDS.items():
        views = [mirrored_logits(net, view) for view in views_of(images)]
        total = sum(views)
        for share in SHARES:
            n = int(share * len(plain))
            for weight in WEIGHTS:
                logits = plain.clone()
                mean = (weight * plain[unsure] + total) / (weight + len(views))
                logits[unsure[:n]] = mean[:n]
                report(logits, views=name, share=share, weight=weight)


def main():
    """The command line. Returns the exit code."""
    folder, *networks = sys.argv[1:] or ['']
    if not networks:
        print('views: error: give it the folder of CIFAR-10 and files of --save', file=sys.stderr)
        return 2
    for network in networks:
        if not Path(network).is_file():
            print(f'views: error: there is no {network}', file=sys.stderr)
            return 2
    airbench94_muon.set_up_process(torch.device('cpu'))
    loader = airbench94_muon.CifarLoader(folder, train=False, device='cpu')
    for network in networks:
        net, seed = load_net(network)
        try_views(net, seed, loader)
    return 0


if __name__ == '__main__':
    sys.exit(main())
