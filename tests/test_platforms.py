"""What a platform may lack: Windows, macOS, a notebook."""

import importlib
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

SCRIPTS = ('airbench94', 'airbench94_muon', 'airbench96')  # airbench95 differs in numbers alone


@pytest.fixture(scope='module', autouse=True)
def imported_before():
    """What PyTorch imports late must not find a platform that a test has made up."""
    for name in ('torch.utils.flop_counter', 'torch._inductor.compile_fx',
                 'torch._inductor.cpp_builder'):  # fmt: skip
        importlib.import_module(name)


@pytest.fixture
def windows(monkeypatch):
    """Takes away what Python has only elsewhere. Returns the locks that were asked for."""
    kept = {'SIGABRT', 'SIGFPE', 'SIGILL', 'SIGINT', 'SIGSEGV', 'SIGTERM'}
    for name in dir(signal):
        if name.startswith('SIG') and not name.startswith('SIG_') and name not in kept:
            monkeypatch.delattr(signal, name)
    for name in ('fork', 'getuid', 'getpgid', 'killpg', 'setsid', 'mkfifo', 'sched_getaffinity'):
        monkeypatch.delattr(os, name, raising=False)
    for name in ('fcntl', 'pwd', 'grp', 'resource'):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr('platform.machine', lambda: 'AMD64')
    locks = []

    def locking(file, *rest):
        locks.append((os.lseek(file, 0, os.SEEK_CUR), *rest))

    msvcrt = SimpleNamespace(LK_NBLCK=2, locking=locking)
    monkeypatch.setitem(sys.modules, 'msvcrt', msvcrt)
    monkeypatch.setattr(sys, 'platform', 'win32')
    return locks


@pytest.mark.parametrize('script', SCRIPTS)
def test_windows(main, windows, script, tmp_path):
    code, out, err = main(script, '--runs', 2, '--save', 'nets')
    assert (code, err) == (0, '') and 'n 2' in out
    # A byte far behind the end: others cannot read a byte that is locked.
    assert windows == [(2**30, 2, 1)]
    assert (tmp_path / 'log.jsonl').read_bytes().count(b'\n') == 3


def test_compiling_on_windows_says_what_is_missing(main, windows, monkeypatch):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    code, out, err = main('airbench94_compiled')
    assert code == 2 and out == '' and len(err.splitlines()) == 1
    assert 'no cl:' in err and 'airbench94.py' in err


def test_compiling_for_cuda_without_triton(monkeypatch):
    import airbench94_compiled

    monkeypatch.setattr(shutil, 'which', lambda name: name)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert airbench94_compiled.what_compiling_lacks(torch.device('meta')) is None
    message = airbench94_compiled.what_compiling_lacks(torch.device('cuda'))
    assert 'Triton' in message


def test_compiling_without_the_headers_of_python(main, monkeypatch, tmp_path):
    """As on Debian without python3-dev."""
    monkeypatch.setattr(sys, 'platform', 'linux')
    monkeypatch.setattr(shutil, 'which', lambda name: name)
    monkeypatch.setattr('sysconfig.get_path', lambda name: str(tmp_path / name))
    code, out, err = main('airbench94_compiled')
    assert code == 2 and out == '' and len(err.splitlines()) == 1
    assert f'there is no {tmp_path / "include" / "Python.h"}' in err and 'python3-dev' in err


@pytest.mark.parametrize('script', SCRIPTS)
def test_macos_without_float64_and_bfloat16(main, script, monkeypatch):
    """As MPS, as far as a CPU can show: a tensor of these dtypes is an error."""

    def without(function):
        def checked(*args, **options):
            result = function(*args, **options)
            assert not isinstance(result, torch.Tensor) or result.dtype not in (
                torch.float64,
                torch.bfloat16,
            )
            return result

        return checked

    for name in ('tensor', 'empty', 'zeros', 'rand', 'randint', 'randperm', 'arange', 'cat'):
        monkeypatch.setattr(torch, name, without(getattr(torch, name)))
    for name in ('to', 'double', 'bfloat16'):
        monkeypatch.setattr(torch.Tensor, name, without(getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch.cpu, 'get_capabilities', dict, raising=False)
    monkeypatch.setattr(sys, 'platform', 'darwin')
    code, out, err = main(script)
    assert (code, err) == (0, '') and 'float32 on CPU (' in out


@pytest.mark.parametrize('script', [*SCRIPTS, 'airbench94_compiled'])
def test_a_script_pasted_into_a_notebook(script, one_batch):
    """Its last two lines left out; there is no __file__."""
    before = signal.getsignal(signal.SIGINT)
    *lines, condition, call = (ROOT / f'{script}.py').read_text().splitlines()
    assert condition == "if __name__ == '__main__':" and call == '    sys.exit(main())'
    cell = {'__name__': '__main__'}
    exec(compile('\n'.join(lines), 'cell', 'exec'), cell)
    loader = cell['CifarLoader'](
        str(one_batch), batch_size=50, aug=cell['hyp']['aug'], device='cpu'
    )
    net = cell['train'](loader, epochs=1, widths=(8, 8, 8), dtype='float32', verbose=False)
    assert cell['infer'](net, loader).shape == (110, 10)
    assert signal.getsignal(signal.SIGINT) is before
