"""
Data small enough for a test to train on, the real data where it can be found, the scripts as
commands, and what several test files share.
"""

import ctypes
import hashlib
import importlib
import os
import platform
import signal
import subprocess
import sys
import warnings
from pathlib import Path

CUDA_ENVIRONMENT = dict(os.environ)  # for processes that may use a GPU
os.environ['CUDA_VISIBLE_DEVICES'] = ''  # the tests are of the CPU, also where there is a GPU
# With pytest-xdist the processes of the tests share the cores: threads that wait for each other
# would be slower than one.
workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
if workers > 1:
    os.environ['OMP_NUM_THREADS'] = str(min(4, max(1, os.cpu_count() // workers)))

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import airbench94  # noqa: E402
import airbench94_compiled  # noqa: E402
import airbench94_muon  # noqa: E402

ROOT = Path(__file__).parent.parent
VERSION = tuple(int(part) for part in torch.__version__.split('.')[:2])  # of PyTorch
# ATen calls were counted on 2.11 and 2.14. A newer one may need more of them for the same step.
IS_COUNTED = (2, 11) <= VERSION <= (2, 14)

# A test of each script that has its own train and warmup. airbench95.py and airbench96.py have
# those of airbench94.py.
EACH_TRAIN = pytest.mark.parametrize('module', [airbench94, airbench94_compiled, airbench94_muon],
                                     ids=lambda module: module.__name__)  # fmt: skip


def small(module, **options):
    """Keywords of train for small networks, which are not compiled."""
    options = dict(widths=(8, 8, 8), dtype=torch.float32) | options
    if 'compile' in module.hyp:
        options = dict(compile=False) | options
    return options


# Other values of all hyperparameters, each of which changes a training of some steps if the rest is
# as in BASIS. In the recipes themselves some change nothing: where lr_peak is 0 for example, there
# is no lr_start. airbench94_compiled.py has the hyperparameters of airbench94.py, and compile.
BASIS = dict(batch_size=10, epochs=4, whiten_bias_epochs=1, lr_peak=0.25, lookahead_every=2)
OF_AIRBENCH94 = dict(
    epochs=3,
    batch_size=15,
    lr=3.0,
    momentum=0.7,
    weight_decay=0.1,
    bias_scaler=20.0,
    lr_start=0.5,
    lr_peak=0.5,
    lr_end=0.5,
    label_smoothing=0.0,
    whiten_bias_epochs=2,
    lookahead=False,
    lookahead_every=3,
    lookahead_decay=0.5,
    lookahead_power=1,
    aug=dict(flip=True, translate=4),
    altflip=False,
    widths=(8, 8, 12),
    bn_momentum=0.2,
    scaling_factor=0.2,
    tta_level=1,
)
OF_AIRBENCH94_MUON = OF_AIRBENCH94 | dict(
    muon_lr=0.1,
    muon_momentum=0.2,
    lr_tail=0.25,
    sizes=((24, 0.5),),
)
del OF_AIRBENCH94_MUON['lookahead'], OF_AIRBENCH94_MUON['lookahead_power']
OTHER_VALUES = {
    airbench94: OF_AIRBENCH94,
    airbench94_compiled: OF_AIRBENCH94,
    airbench94_muon: OF_AIRBENCH94_MUON,
}


def basis(module, **options):
    options = small(module, verbose=False) | BASIS | options
    if module is airbench94_muon:
        options = dict(lr_tail=0.5) | options
    return options


def same_state(net, other):
    """Whether all weights, biases and averages of two networks are equal."""
    state, others = net.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) for name, tensor in state.items()
    )


def keep(rows):
    """A callback of train that adds the table's rows to this list."""
    return lambda net, row: rows.append(row)


class Pixel(torch.nn.Module):
    """Logits that are one pixel of the image."""

    def __init__(self, y, x):
        super().__init__()
        self.y, self.x = y, x

    def forward(self, images):
        return images[:, :, self.y, self.x]


class CountCalls(TorchDispatchMode):
    """
    Counts the ATen calls that do work on a device: views and empty tensors cost a GPU nothing.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'aten' and not func.is_view and 'empty' not in func.name():
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


# Data ---------------------------------------------------------------------------------------------

# SHA-256 of CIFAR-10, images as uint8 (N, 32, 32, 3) and labels as int64, in the data set's order.
CIFAR10 = dict(
    train=dict(
        images='47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a',
        labels='f5cfe00b0f00968c0cc5ff3b1d2de51b10e33efa277c2986f4e0fa63e58c9f4f',
    ),
    test=dict(
        images='f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04',
        labels='cbb7365de8ed11f05cc4c3a1e7f78144127c5e851efd83762fb18202461230bb',
    ),
)


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
def one_batch(tmp_path_factory):
    """A folder with train.pt, one batch of 100 images and a little more, and test.pt."""
    folder = tmp_path_factory.mktemp('one_batch')
    write_split(folder / 'train.pt', 110, seed=0)
    write_split(folder / 'test.pt', 96, seed=1)
    return folder


@pytest.fixture(scope='session')
def real():
    """The folder of the real CIFAR-10. In $AIRBENCH_DATA there may be other data."""
    for folder in (os.environ.get('AIRBENCH_DATA'), ROOT.parent / 'shared' / 'cifar10'):
        if folder and Path(folder, 'train.pt').exists():
            images = airbench94.load_split(folder, train=True)['images']
            if hashlib.sha256(images.numpy()).hexdigest() == CIFAR10['train']['images']:
                return Path(folder)
    pytest.skip('the real CIFAR-10 is neither in $AIRBENCH_DATA nor in ../shared/cifar10')


# Processes ----------------------------------------------------------------------------------------


@pytest.fixture(scope='session', autouse=True)
def allocation_as_it_was():
    """
    No warm-up and no command changes how the process of the tests allocates: for set_up_process
    there is no glibc. Of the whole session, since a test may undo its monkeypatch.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, 'libc_ver', lambda: ('', ''))
        yield


@pytest.fixture(scope='session')
def cuda():
    """For tests that start a process with a GPU."""
    try:
        ctypes.CDLL('libcuda.so.1')  # at once, where there is none
    except OSError:
        if sys.platform == 'linux':
            pytest.skip('needs CUDA')
    code = 'import sys, torch\nsys.exit(0 if torch.cuda.is_available() else 77)'
    done = subprocess.run([sys.executable, '-c', code], env=CUDA_ENVIRONMENT, timeout=300)
    if done.returncode == 77:
        pytest.skip('needs CUDA')


def forget_compiled():
    """Of the scripts, what they have compiled and recorded."""
    for module in (airbench94_compiled, airbench94_muon):
        module.captured_steps.clear()
        module.compiled_net.cache_clear()


@pytest.fixture
def passed_through(monkeypatch):
    """torch.compile as a pass-through, for tests that are about something else."""
    forget_compiled()
    monkeypatch.setattr(torch, 'compile', lambda function, **options: function)
    yield
    forget_compiled()


def show_warning(message, category, file, line, *_):
    """On stderr, as where there is no pytest."""
    sys.stderr.write(warnings.formatwarning(message, category, file, line))


FLAGS = ('--widths', '(8, 8, 8)', '--batch_size', '100', '--epochs', '1')


@pytest.fixture
def main(monkeypatch, capsys, tmp_path, one_batch):
    """
    A script's command line in this process and in an empty folder: a function that returns the exit
    code, stdout and stderr. Its data are one_batch, and its log is log.jsonl, or none if log is
    None.
    """
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('AIRBENCH_DATA', str(one_batch))

    def run(script, *words, log='log.jsonl'):
        if isinstance(script, str):
            script = importlib.import_module(script)
        words = [*FLAGS, *(['--log', log] if log else []), *words]
        monkeypatch.setattr(sys, 'argv', [f'{script.__name__}.py', *map(str, words)])
        stdout = sys.stdout
        try:
            with warnings.catch_warnings():  # else pytest keeps them for itself
                warnings.simplefilter('default')
                for category in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
                    warnings.simplefilter('ignore', category)  # as in Python by default
                warnings.showwarning = show_warning
                code = script.main()
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stdout = stdout  # which main takes from all ranks but 0
        return code, *capsys.readouterr()

    yield run
    for number, handler in handlers:
        signal.signal(number, handler)
