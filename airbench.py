"""
The scripts as a library: `import airbench`, then airbench.train94() and its like. There is no other implementation:
everything here is re-exported from the scripts, of which airbench96's loader knows all augmentations.
"""

from airbench94 import train as train94
from airbench94 import warmup as warmup94
from airbench95 import train as train95
from airbench95 import warmup as warmup95
from airbench96 import CifarLoader, evaluate, infer
from airbench96 import train as train96
from airbench96 import warmup as warmup96

__all__ = ['CifarLoader', 'evaluate', 'infer', 'train94', 'train95', 'train96', 'warmup94', 'warmup95', 'warmup96']
