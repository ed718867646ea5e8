"""Data small enough for a test to train on, and the real data where it can be found."""

import os
from pathlib import Path

CUDA_ENVIRONMENT = dict(os.environ)  # for processes that may use a GPU
os.environ['CUDA_VISIBLE_DEVICES'] = ''  # the tests are of the CPU, also where there is a GPU

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
VERSION = tuple(int(part) for part in torch.__version__.split('.')[:2])  # of PyTorch


def write_split(file, n, seed):
    """
    n images in the layout of train.pt: each class is a brightness, under noise, which a few steps
    can learn.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=generator)
    noise = torch.randint(0, 40, (n, 32, 32, 3), generator=generator)
    images = (labels.view(-1, 1, 1, 1) * 20 + noise).to(torch.uint8)
    torch.save(dict(images=images, labels=labels, classes=[str(i) for i in range(10)]), file)


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    """
    A folder with train.pt, one batch of 1,024 images and a little more, and test.pt, 96 images.
    """
    folder = tmp_path_factory.mktemp('tiny')
    write_split(folder / 'train.pt', 1100, seed=0)
    write_split(folder / 'test.pt', 96, seed=1)
    return folder


@pytest.fixture(scope='session')
def real():
    """The folder of the real CIFAR-10."""
    for folder in (os.environ.get('AIRBENCH_DATA'), ROOT.parent / 'shared' / 'cifar10'):
        if folder and Path(folder, 'train.pt').exists() and Path(folder, 'test.pt').exists():
            return Path(folder)
    pytest.skip('the real CIFAR-10 is neither in $AIRBENCH_DATA nor in ../shared/cifar10')


def keep(rows):
    """A callback of train that adds the table's rows to this list."""
    return lambda net, row: rows.append(row)
