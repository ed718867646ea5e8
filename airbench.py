"""
The scripts as a library: `import airbench`, then airbench.train94() and its like. There is no other implementation:
everything here is re-exported from the scripts, of which airbench96's loader knows all augmentations, or calls them.
"""

import importlib

import torch

from airbench94 import DEVICE
from airbench94 import train as train94
from airbench94 import warmup as warmup94
from airbench94_muon import train as train94_muon
from airbench94_muon import warmup as warmup94_muon
from airbench95 import train as train95
from airbench95 import warmup as warmup95
from airbench96 import CifarLoader, evaluate, infer
from airbench96 import train as train96
from airbench96 import warmup as warmup96

__all__ = ['CifarLoader', 'evaluate', 'infer', 'load_net',
           'train94', 'train94_muon', 'train95', 'train96', 'warmup94', 'warmup94_muon', 'warmup95', 'warmup96']
SCRIPTS = ('airbench94', 'airbench94_compiled', 'airbench94_muon', 'airbench95', 'airbench96')


def load_net(file, device=DEVICE):
    """
    The network that a script wrote with --save, in evaluation mode and in the precision it was trained in; its classes
    are net.classes. Raises ValueError for a file that is not such, FileNotFoundError where there is none.
    """
    try:
        saved = torch.load(file, map_location=device, weights_only=True)
        if saved['script'] not in SCRIPTS:
            raise ValueError(saved['script'])
        net = importlib.import_module(saved['script']).Net(
            saved['hyperparameters'], len(saved['classes']), device, getattr(torch, saved['dtype']))
        net.load_state_dict(saved['state_dict'])
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the zip reader, the unpickler and other contents make of it
        raise ValueError(f'{file} is not a network that a script of airbench wrote with --save') from error
    net.classes = saved['classes']
    return net.eval()
