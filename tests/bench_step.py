"""
What bounds a training step? For a script, in one process:

    python tests/bench_step.py airbench94.py [--rounds N] [--size PIXELS] [--device D] [--json FILE]

Every round times a training step, the same in float32, the step's convolutions alone (forward and
backward, as the script computes them, at the same shapes, dtype and memory format: the bound), the
loader and the Lookahead per step, the evaluation of 2,000 images with test-time augmentation, and
that evaluation's convolutions alone. The pieces take turns, so that the machine's drift strikes
them alike; ratios are taken within a round. Medians and quartiles are printed, milliseconds and
ratios. With --data, the seconds from a process's start to its first training step are measured too,
beside those of `import torch` and of reading the data's files. With --against SCRIPT only the step
and the evaluation are timed, and those of that script in turn with them.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

TARGETS = {
    'step / convolutions': dict(
        airbench94=1.15,
        airbench94_compiled=1.20,
        airbench94_muon=1.15,
        airbench95=1.12,
        airbench96=1.12,
    ),
    'loader / step': 0.02,
    'lookahead / step': 0.005,
    'evaluation / its convolutions': 1.2,
    'first step / (import torch + files)': 2.0,
}
RATIOS = [
    ('step', 'convolutions'),
    ('float32 step', 'step'),
    ('loader', 'step'),
    ('lookahead', 'step'),
    ('evaluation', 'its convolutions'),
    ('step', 'step of the other'),
    ('evaluation', 'evaluation of the other'),
]
LONG = ('evaluation', 'its convolutions', 'evaluation of the other')


def load(path):
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def conv_inputs(net, images):
    """Every convolution of the network and what comes into it."""
    found, hooks = [], []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda module, inputs: found.append((module, inputs[0]))
                )
            )
    with torch.no_grad():
        type(net).forward(net, images)  # not the compiled one's, which hides its modules
    for hook in hooks:
        hook.remove()
    return found


def convolutions(net, images, dtype, backward):
    """
    A function that computes the convolutions of a training step, or those of a forward pass alone.
    """
    calls = []
    for i, (conv, x) in enumerate(conv_inputs(net, images)):
        needs_grad = backward and conv.weight.requires_grad
        conv = copy.deepcopy(conv)
        conv.bias = None
        conv.to(dtype, memory_format=torch.channels_last)
        conv.weight.requires_grad_(needs_grad)
        x = x.detach().to(dtype, memory_format=torch.channels_last)
        x.requires_grad_(backward and i > 0)
        needed = [t for t in (x, conv.weight) if t.requires_grad]
        calls.append((conv, x, needed, torch.randn_like(conv(x)) if needed else None))

    def run():
        with torch.set_grad_enabled(backward):
            for conv, x, needed, grad in calls:
                y = conv(x)
                if needed:
                    torch.autograd.grad(y, needed, grad)

    return run


def pieces(module, device, dtype, size):
    """The functions to time, by name."""
    hyp = module.hyp

    def new_net(dtype):
        if hasattr(module, 'compiled_net'):
            recipe = hyp['widths'], hyp['bn_momentum'], hyp['scaling_factor']
            module.set_up_compiler()
            net = module.compiled_net(module.Net, *recipe, 10, device, dtype)
        else:
            net = module.Net(device=device, dtype=dtype)
        optimizer = module.make_optimizer(net, hyp)
        for one in optimizer if isinstance(optimizer, list) else [optimizer]:
            for group in one.param_groups:
                group['lr'] = 0.0  # the same work, and the weights stay what they are
        net.whiten.bias.requires_grad_(False)  # as in all epochs but the first three
        module.init_whitening(net, loader.normalize(loader.images[:5000]))
        return net, optimizer

    loader = module.CifarLoader(
        'synthetic', True, hyp['batch_size'], hyp['aug'], altflip=hyp['altflip'], device=device
    )
    test = copy.copy(loader)
    test.images = loader.images[:2000]
    test.labels = loader.labels[:2000]
    module.warmup(loader, test, dtype=dtype)
    loader.images = loader.images.to(module.Net(device=device, dtype=dtype).whiten.weight.dtype)
    test.images = loader.images[:2000]
    net, optimizer = new_net(dtype)
    net32, optimizer32 = new_net(torch.float32)
    inputs, labels = next(iter(loader))
    inputs = inputs[..., :size, :size]
    state = [tensor for tensor in net.state_dict().values() if tensor.is_floating_point()]
    average = [tensor.clone() for tensor in state]
    batches = iter(())

    def next_batch():
        nonlocal batches
        if next(batches, None) is None:  # with the epoch's preparation, in its share
            batches = iter(loader)
            next(batches)

    def train():
        net.train()
        module.train_step(net, optimizer, inputs, labels, hyp['label_smoothing'])

    views = convolutions(net, test.images.to(inputs.dtype), dtype, backward=False)
    count = (1, 2, 4 if 'muon_lr' in hyp else 6)[hyp['tta_level']]
    functions = {
        'step': train,
        'convolutions': convolutions(net, inputs, dtype, backward=True),
        'float32 step': lambda: module.train_step(
            net32.train(), optimizer32, inputs.float(), labels, hyp['label_smoothing']
        ),
        'loader': next_batch,
        'evaluation': lambda: module.infer(net, test, hyp['tta_level']),
        'its convolutions': lambda: [views() for _ in range(count)],
    }
    if hasattr(module, 'lookahead_update'):
        functions['lookahead'] = lambda: module.lookahead_update(average, state, decay=0.5)
    return functions


def timed(function, device, module):
    start = module.synchronized_time(device)
    function()
    return 1000 * (module.synchronized_time(device) - start)


def seconds_to_the_first_step(script, data):
    """
    Of three processes: up to the script's first step, `import torch`, and that with reading the
    files.
    """
    stop = (
        'import os, sys\nsys.argv = [{0!r}, "--runs", "1", "--log", os.devnull, "--data", {1!r}]\n'
        'sys.path.insert(0, {2!r})\nimport {3} as script\n'
        'script.train_step = lambda *args: os._exit(0)\nscript.main()\n'
        'sys.exit("no step was trained")'
    )
    codes = dict(
        first=stop.format(str(script), data, str(script.parent), script.stem),
        torch='import torch',
        files='import torch\nfor name in ("train", "test"): '
        f'torch.load({data!r} + f"/{{name}}.pt")',
    )
    seconds = {}
    for name, code in codes.items():
        start = time.perf_counter()
        subprocess.run([sys.executable, '-c', code], stdout=subprocess.DEVNULL, check=True)
        seconds[name] = time.perf_counter() - start
    return seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('script', type=Path)
    parser.add_argument('--rounds', type=int, default=15, help='(default: %(default)s)')
    parser.add_argument(
        '--size', type=int, default=32, help='of the images that a step sees, in pixels'
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--against', type=Path, metavar='SCRIPT')
    parser.add_argument(
        '--data', metavar='DIR', help='a folder with train.pt and test.pt: time the start too'
    )
    parser.add_argument('--json', type=Path, metavar='FILE')
    args = parser.parse_args()
    if args.rounds < 3:
        parser.error('--rounds must be at least 3')
    for file in (Path(args.data, 'train.pt'), Path(args.data, 'test.pt')) if args.data else ():
        if not file.exists():
            parser.error(f'there is no {file}')
    for file in (args.script, args.against):
        if file and not (file.suffix == '.py' and file.is_file()):
            parser.error(f'there is no script {file}')
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f'there is no folder for {args.json}')
    try:
        torch.empty(1, device=args.device)
    except (AssertionError, RuntimeError) as error:
        parser.error(f'no device {args.device}: {str(error).splitlines()[0]}')
    module, device = load(args.script.resolve()), torch.device(args.device)
    if not 12 <= args.size <= 32:
        parser.error('--size must be from 12 to 32')
    if args.size != 32 and 'sizes' not in module.hyp:
        parser.error(f'{args.script.stem} has no --size but 32')
    dtype = module.default_dtype(device)

    starts = []
    try:
        while args.data and len(starts) < max(1, args.rounds // 5):
            starts.append(seconds_to_the_first_step(args.script.resolve(), args.data))
    except subprocess.CalledProcessError:  # it has said why
        parser.error(f'{args.script.stem} trains no step on {args.data}')
    functions = pieces(module, device, dtype, args.size)
    if args.against:
        other = load(args.against.resolve())
        others = {
            f'{name} of the other': function
            for name, function in pieces(other, device, dtype, args.size).items()
        }
        functions = {
            name: function
            for name, function in (functions | others).items()
            if name.split(' of ')[0] in ('step', 'evaluation')
        }
    pflops = module.count_pflops(module.hyp | dict(sizes=((args.size, 1.0),)), 1, 0)
    rounds = []
    for i in range(args.rounds + 2):  # the first two warm up
        # The evaluation takes several times as long as all the rest, and takes part in every third
        # round.
        times = {
            name: timed(function, device, module)
            for name, function in functions.items()
            if i % 3 == 0 or name not in LONG
        }
        if i >= 2:
            rounds.append(times)
        if sys.stderr.isatty():
            print(f'\rround {i + 1}', end='', file=sys.stderr)
    for times in rounds:
        if 'lookahead' in times:
            times['lookahead'] /= 5  # it comes every fifth step
        times['step, TFLOP/s'] = 1e6 * pflops / times['step']
        times |= {f'{a} / {b}': times[a] / times[b] for a, b in RATIOS if a in times and b in times}
    for seconds in starts:
        rounds.append(
            {
                'first step, s': seconds['first'],
                'import torch, s': seconds['torch'],
                'import torch + files, s': seconds['files'],
                'first step / (import torch + files)': seconds['first'] / seconds['files'],
            }
        )

    print(
        f'\n{args.script.stem}: {dtype} on {module.device_name(device)}, '
        f'{torch.get_num_threads()} threads, '
        f'PyTorch {torch.__version__}, {args.rounds} rounds; milliseconds where not said otherwise'
    )
    print(f'{"":36}{"median":>10}{"quartiles":>20}{"at most":>10}')
    summary = {}
    for name in dict.fromkeys(name for times in rounds for name in times):
        values = [times[name] for times in rounds if name in times]
        low = median = high = values[0]
        if len(values) > 1:
            low, median, high = statistics.quantiles(values, n=4, method='inclusive')
        target = TARGETS.get(name, '')
        target = target.get(args.script.stem, '') if isinstance(target, dict) else target
        summary[name] = dict(median=median, quartiles=(low, high))
        width = 3 if '/' in name or name.endswith(', s') else 1
        print(
            f'{name:36}{median:10.{width}f}{f"{low:.{width}f} to {high:.{width}f}":>20}{target:>10}'
        )
    if args.json:
        args.json.write_text(
            json.dumps(
                dict(
                    script=args.script.stem,
                    dtype=str(dtype),
                    torch=torch.__version__,
                    device=module.device_name(device),
                    threads=torch.get_num_threads(),
                    summary=summary,
                    rounds=rounds,
                )
            )
            + '\n'
        )


if __name__ == '__main__':
    main()
