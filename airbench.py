"""
The scripts as a library: `import airbench`, then airbench.train94() and its like.

There is no other implementation. What is here is the scripts' own. The loader is that of
airbench96, which knows all augmentations. infer and evaluate are for all networks;
airbench94_muon.py has a test-time augmentation of its own, and so infer94_muon and
evaluate94_muon.
"""

import importlib

import torch

from airbench94 import DEVICE
from airbench94 import train as train94
from airbench94 import warmup as warmup94
from airbench94_muon import evaluate as evaluate94_muon
from airbench94_muon import infer as infer94_muon
from airbench94_muon import train as train94_muon
from airbench94_muon import warmup as warmup94_muon
from airbench95 import train as train95
from airbench95 import warmup as warmup95
from airbench96 import CifarLoader, evaluate, infer
from airbench96 import train as train96
from airbench96 import warmup as warmup96

__all__ = [
    'CifarLoader',
    'evaluate',
    'evaluate94_muon',
    'infer',
    'infer94_muon',
    'load_net',
    'train94',
    'train94_muon',
    'train95',
    'train96',
    'warmup94',
    'warmup94_muon',
    'warmup95',
    'warmup96',
]
SCRIPTS = ('airbench94', 'airbench94_compiled', 'airbench94_muon', 'airbench95', 'airbench96')


def load_net(file, script=None, device=DEVICE, dtype=None):
    """
    The network that a script wrote with --save, in evaluation mode. net.classes are its classes.

    script: for a network of a script of your own, that module, or its name.
    device: where to put it.
    dtype: see Net (default: that of its training, but float32 on a Mac's GPU, and for float16 on a
        CPU, where float16 is several times slower).

    Raises ValueError for another file or dtype, FileNotFoundError where there is no file.
    """
    try:
        saved = torch.load(file, map_location='cpu', weights_only=True)
        name = saved['script']
        hyperparameters, classes = saved['hyperparameters'], saved['classes']
        trained_dtype, weights = getattr(torch, saved['dtype']), saved['state_dict']
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the reader of the file makes of other content
        raise ValueError(f'{file} is not a network that a script wrote with --save') from error
    if script is None:
        if name not in SCRIPTS:
            raise ValueError(f'{file} is a network of {name}.py: import that, and say '
                             f'load_net(file, script={name})')
        script = name
    if isinstance(script, str):
        script = importlib.import_module(script)
    device = torch.device(device)
    if dtype is None:
        slow = trained_dtype == torch.float16 and device.type == 'cpu'
        # On a Mac's GPU the process can end where BatchNorm and its inputs differ in dtype
        # (PyTorch's issue 154887).
        dtype = torch.float32 if slow or device.type == 'mps' else trained_dtype
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f'dtype must be float32, float16 or bfloat16, not {dtype}')
    # Another version of a script can have another network, whose weights have the same shapes.
    known = getattr(script, 'hyp', hyperparameters)
    unknown = sorted(set(hyperparameters) - set(known))
    if unknown:
        raise ValueError(f'{file} does not fit the network of {script.__name__}.py, which knows no '
                         f'{", ".join(unknown)}: load it with the version that trained it')
    net = script.Net(hyperparameters, len(classes), device, dtype)
    try:
        net.load_state_dict(weights)
    except Exception as error:  # names or shapes that are not those of Net
        raise ValueError(f'{file} does not fit the network of {script.__name__}.py') from error
    net.classes = classes
    return net.eval()
