"""
For a quarter of an hour on a GPU, under Linux: what a step waits for, the timed series, trials of
recipes, a search. bench and runs take a quarter of an hour each, with the start of the machine;
trials and a search fit into one. No command takes ten minutes:

    python results/gpu.py bench --out DIR --seconds 570                # needs no data
    python results/gpu.py runs --out DIR --seconds 570 --data FOLDER   # the real data
    python results/gpu.py trials --out DIR --seconds 150 --data FOLDER --target 95 --seed 840
    python results/gpu.py search --out DIR --seconds 420 --data FOLDER --target 96 --seed 9600 \
        --processes 3

bench and runs are lists of commands, the most important first. One that would not fit into the
seconds that are left is skipped. The 570 seconds are enough for bench up to the tests on CUDA, and
for both turns of runs, if no command takes longer than planned. One is stopped after twice as
long. After each command all output and all logs are in DIR/bench.tar or DIR/runs.tar. bench trains
on random images, which take as long as others. Work and compile caches are in --work, where a
second call on the same machine finds those of the first. With --only NAME just the commands whose
names contain it are run; with --tiny networks and batches are tiny, to try the program on a CPU.

On the H200 airbench94_muon.py took 112 seconds until its first run, as it compiled, and for other
widths it has to compile anew. So trials of other widths do not compile: they run at once, one
process for each, as times are not asked for, and their accuracies are printed.

The search trains what search_94_muon/candidates.py has for --target, --processes at a time, and is
stopped when its seconds are over. It prints what each change added to the accuracy, for which there
must be two more runs than changes, and better ten more than that. For 96% a run has 2.2 PFLOPs, and
three at a time take 46 seconds at 145 TFLOP/s, and more with a proxy: 420 seconds are for some 20
runs. 10 are needed, and 16 are a whole design. Those that have not ended by then are lost: at worst
one of each process, as the runs are alike. For 95% 18 are needed, of 0.45.

All runs of trials and search that ended are in DIR/trials.tar or DIR/search.tar. These are written
anew every 15 seconds, as the program may be killed. SIGTERM ends it, and what it has started; where
only SIGKILL would do, kill the session.

A probe (python results/gpu.py probe --script airbench94_muon --variant captured) times seven times
20 steps of training on random images at each size and profiles five. It prints the median and the
range of the seven in a line of JSON. On a CPU, where it only has to work, it does less.
"""

import argparse
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob('airbench9*.py'))
PACK_SECONDS = 15
# How a step is run. In captured-unnormalized Muon leaves the norms of the filters alone, which
# bounds what there is to gain by scaling them in every eighth step only. In captured-padded
# airbench94_muon.py convolves small maps and maps before a pool as PyTorch does, zeros included; in
# captured-trimmed only small maps, in captured-small-maps only maps before a pool. In
# captured-one-stream Muon updates one filter after another. In captured-exhaustive cuDNN tries all
# of its kernels, not ten. In captured-uncounted BatchNorm does not count the batches, for which it
# has a kernel of its own.
VARIANTS = (
    'eager',
    'compiled',
    'captured',
    'captured-unnormalized',
    'captured-padded',
    'captured-trimmed',
    'captured-small-maps',
    'captured-one-stream',
    'captured-exhaustive',
    'captured-uncounted',
    'reduce-overhead',
    'max-autotune-no-cudagraphs',
)


OF_MUON_ALONE = (
    'captured-unnormalized',
    'captured-padded',
    'captured-trimmed',
    'captured-small-maps',
    'captured-one-stream',
)


# ---------------------------------------------- Probe ---------------------------------------------


def variants_of(script):
    """Only two scripts compile their steps, and only one has Muon and small maps."""
    if script == 'airbench94_muon':
        return VARIANTS
    if script == 'airbench94_compiled':
        return [variant for variant in VARIANTS if variant not in OF_MUON_ALONE]
    return ['eager']


def make_step(module, variant, h, device, dtype):
    """The network, and a function of inputs and labels that trains it by a step."""
    if variant == 'captured-one-stream':
        torch.cuda.is_current_stream_capturing = lambda: False
    if variant == 'captured-exhaustive':
        torch.backends.cudnn.benchmark_limit = 0
    plain = torch.nn.Conv2d.forward
    if variant == 'captured-padded':
        module.Conv.forward = plain
    if variant == 'captured-trimmed':
        module.convolve_small_maps = lambda x, weight: F.conv2d(x, weight, padding=1)
    if variant == 'captured-small-maps':
        real = module.Conv.forward
        module.Conv.forward = lambda conv, x: (plain if conv.before_pool else real)(conv, x)
    net = module.Net(h, 10, device, dtype).train()  # all variants start from it
    if variant == 'eager':
        optimizer = module.make_optimizer(net, h)
        return net, lambda inputs, labels: module.train_step(net, optimizer, inputs, labels, 0.2)
    if variant in ('reduce-overhead', 'max-autotune-no-cudagraphs'):
        real_compile = torch.compile

        def compile_in_mode(function, **options):
            return real_compile(function, mode=variant, **options)

        torch.compile = compile_in_mode
    module.set_up_compiler()
    compiled = module.compiled_net(
        module.Net, tuple(h['widths']), h['bn_momentum'], h['scaling_factor'], 10, device, dtype
    )
    optimizer = module.make_optimizer(compiled, h)
    captured = module.CapturedStep(compiled, optimizer, h['label_smoothing'])
    if variant in ('compiled', 'reduce-overhead'):
        captured.is_cuda = False
    if variant == 'captured-uncounted':
        for layer in [*net.modules(), *captured.net.modules()]:
            if isinstance(layer, module.BatchNorm):
                layer.num_batches_tracked = None
    if variant == 'captured-unnormalized':
        for group in captured.groups:
            group['normalize'] = False
    captured.record_all(module.image_sizes(h), h['batch_size'])
    captured.start_run(net.state_dict())
    return captured.net, lambda inputs, labels: captured(inputs, labels, 1.0)


def time_block(step, inputs, labels, device, n_steps):
    """Milliseconds of a step, and those that the host takes to launch it."""
    begin = time.perf_counter()
    for _ in range(n_steps):
        step(inputs, labels)
    host_seconds = time.perf_counter() - begin
    synchronize(device)
    seconds = time.perf_counter() - begin
    return 1000 * seconds / n_steps, 1000 * host_seconds / n_steps


def profile(step, inputs, labels, device, ms, n_steps):
    """How many kernels a step has, the share of its time that they take, the longest 60."""
    activities = [ProfilerActivity.CPU]
    if device.type == 'cuda':
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as prof:
        for _ in range(n_steps):
            step(inputs, labels)
        synchronize(device)
    on_gpu = [
        event
        for event in prof.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    events = on_gpu if device.type == 'cuda' else prof.key_averages()

    def total(event):
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    longest = sorted(events, key=total, reverse=True)[:60]
    return dict(
        kernels_per_step=sum(event.count for event in events) / n_steps,
        busy=sum(map(total, events)) / 1000 / n_steps / ms,
        longest=[
            [event.key[:120], total(event) / 1000 / n_steps, event.count / n_steps]
            for event in longest
        ],
    )


def synchronize(device):
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def probe(args):
    module = importlib.import_module(args.script)
    device = torch.device(args.device)
    dtype = module.default_dtype(device)
    torch.backends.cudnn.benchmark = True
    overrides = dict(batch_size=20, widths=(8, 16, 16)) if args.tiny else {}
    if args.widths and not args.tiny:
        overrides['widths'] = tuple(args.widths)
    h = module.merge(overrides)
    torch.manual_seed(0)
    sizes = sorted({32} | {size for size, _ in h.get('sizes', ())})
    n = h['batch_size']
    weight_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    images = torch.randn(n, 3, 32, 32, device=device).to(weight_dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (n,), device=device)
    net, step = make_step(module, args.variant, h, device, dtype)
    module.init_whitening(net, images)
    net.whiten.bias.requires_grad_(True)  # record_all leaves it frozen

    record = dict(
        script=args.script,
        variant=args.variant,
        widths=h['widths'],
        dtype=str(dtype),
        device=module.device_name(device),
        torch=torch.__version__,
        sizes={},
    )
    # 20 losses from one start on one batch, to compare variants by.
    record['losses'] = [step(images, labels)[0].item() / n for _ in range(20)]
    is_quick = args.tiny or device.type == 'cpu'
    n_first, warm_seconds, n_blocks, n_steps, n_profiled = (
        (1, 0, 2, 3, 1) if is_quick else (3, 0.5, 7, 20, 5)
    )
    for size in sizes:
        inputs = images[..., :size, :size]
        for is_trained in (True, False):
            net.whiten.bias.requires_grad_(is_trained)
            for _ in range(n_first):
                step(inputs, labels)
        synchronize(device)
        record['ready_seconds'] = time.perf_counter() - args.start
        # The clock rate of a GPU that has been idle takes a while to rise. By blocks, lest the host
        # launch far more steps than the GPU does in this time.
        while time.perf_counter() - args.start < record['ready_seconds'] + warm_seconds:
            time_block(step, inputs, labels, device, n_steps)
        blocks = [time_block(step, inputs, labels, device, n_steps) for _ in range(n_blocks)]
        times, host_times = zip(*blocks, strict=True)
        record['sizes'][size] = dict(
            ms=statistics.median(times),
            ms_range=[min(times), max(times)],
            host_ms=statistics.median(host_times),
        )
    # Profiles come last, as after one the steps can be slower; should they fail, the times are out.
    print(json.dumps(record), flush=True)
    for size, of_size in record['sizes'].items():
        inputs = images[..., :size, :size]
        of_size |= profile(step, inputs, labels, device, of_size['ms'], n_profiled)
    print(json.dumps(record), flush=True)


# ---------------------------------------------- Plans ---------------------------------------------


def bench_plan(args):
    """Of (name, seconds that it may take, command)."""
    python = [sys.executable]
    tests = [
        'tests/test_capture.py::test_captured_steps_on_cuda',
        'tests/test_speed.py::test_ten_steps_on_cuda_never_wait_for_it',
    ]
    pytest = [*python, '-m', 'pytest', '-q', '-rs', '-p', 'no:cacheprovider']
    plan = []

    def add(script, variant, seconds, name='', *words):
        command = [*python, __file__, 'probe', '--script', script, '--variant', variant, *words]
        command += ['--device', args.device, *(['--tiny'] if args.tiny else [])]
        plan.append((f'probe_{script}_{variant}{name}', seconds, command))

    def add_script(script, runs, seconds):
        command = [*python, str(ROOT / f'{script}.py'), '--data', str(args.work / 'random')]
        command += ['--runs', str(runs), '--log', str(args.work / 'logs' / f'{script}.jsonl')]
        command += ['--device', args.device]
        if args.tiny:
            command += ['--widths', '(8,8,8)', '--batch_size', '20', '--epochs', '1']
        plan.append((f'{script}_{runs}', seconds, command))

    add_script('airbench94_muon', 3, 130)
    # These find in the cache what the script has compiled.
    add('airbench94_muon', 'captured', 50)
    add('airbench94_muon', 'captured-one-stream', 50)
    add('airbench94_muon', 'captured-exhaustive', 60)
    add('airbench94_muon', 'captured-unnormalized', 50)
    # They compile two scripts for other widths, which took 138 seconds on the H200.
    plan.append(('tests', 220, [*pytest, *tests]))
    add_script('airbench94_compiled', 3, 60)
    add('airbench94_compiled', 'captured', 60)
    add('airbench94_compiled', 'captured-uncounted', 60)
    add('airbench94_compiled', 'eager', 30)
    add('airbench94_muon', 'captured-padded', 120)
    add('airbench94_muon', 'captured', 120, '_64_256_384', '--widths', '64', '256', '384')
    add('airbench94_muon', 'compiled', 50)
    add('airbench94_muon', 'eager', 30)
    add('airbench94_muon', 'reduce-overhead', 90)
    return plan


def make_random_data(args):
    """Two files as those of CIFAR-10."""
    folder = args.work / 'random'
    folder.mkdir(parents=True, exist_ok=True)
    n_train, n_test = (60, 40) if args.tiny else (50000, 10000)
    generator = torch.Generator().manual_seed(0)
    for split, n in (('train', n_train), ('test', n_test)):
        images = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator)
        labels = torch.arange(n) % 10
        data = dict(images=images, labels=labels, classes=list('0123456789'))
        torch.save(data, folder / f'{split}.pt')


def runs_plan(args):
    """The three scripts in turn, 13 and 12 runs; then fewer epochs, and the larger scripts."""
    plan = []

    def add(script, runs, seconds, name='', *words):
        log = args.work / 'logs' / f'gpu_{script}{name}.jsonl'
        command = [
            sys.executable,
            str(ROOT / f'{script}.py'),
            '--data',
            args.data,
            '--log',
            str(log),
            '--runs',
            str(runs),
            '--device',
            args.device,
            *words,
        ]
        if args.tiny:
            command += ['--widths', '(8,8,8)', '--batch_size', '20', '--epochs', '1']
        plan.append((f'{script}{name}_{runs}', seconds, command))

    small = 1 if args.tiny else 13
    full = 2 if args.tiny else 25
    seed = ['--seed', str(args.seed)]
    for runs in (small, full):
        add('airbench94_muon', runs, 140 if runs == small else 65, '', *seed)
        add('airbench94_compiled', runs, 65, '', *seed)
        add('airbench94', runs, 50, '', *seed)
    for epochs in ('15.25', '14'):
        add('airbench94_muon', full, 80, f'_{epochs}', *seed, '--epochs', epochs)
    add('airbench95', full, 160, '', *seed)
    add('airbench96', 3, 90, '', *seed)
    return plan


# -------------------------------------------- Processes -------------------------------------------


def start_process(command, output, args, **variables):
    """
    Starts the command in a process group of its own, so that stop_process ends its children too. It
    stays in this session: what kills all of a session ends it with this program.
    """
    environment = dict(
        os.environ,
        PYTHONUNBUFFERED='1',
        TORCHINDUCTOR_CACHE_DIR=str(args.work / 'inductor'),
        TRITON_CACHE_DIR=str(args.work / 'triton'),
        **variables,
    )
    with open(output, 'w') as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,
        )


def stop_process(process):
    """Ends it and what it has started, also where it has ended itself."""
    with suppress(ProcessLookupError, PermissionError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def watch(processes, end, args):
    """Waits until the processes end, or time.monotonic() is end. Packs meanwhile."""
    packed = time.monotonic()
    while time.monotonic() < end:
        if all(process.poll() is not None for process in processes):
            break
        time.sleep(0.5)
        if time.monotonic() - packed > PACK_SECONDS:
            pack(args)
            packed = time.monotonic()


def pack(args):
    args.out.mkdir(parents=True, exist_ok=True)
    part = args.out / f'{args.stage}.part'
    with tarfile.open(part, 'w:gz') as tar:
        tar.add(args.work / 'logs', 'logs')
    part.replace(args.out / f'{args.stage}.tar')


def whole_lines(log):
    """The lines of a log that another process is writing."""
    text = log.read_text()
    return text[: text.rfind('\n') + 1].splitlines()


def output_lines(file):
    """The lines of a command's output, which may hold anything."""
    return file.read_text(errors='replace').splitlines()


# ---------------------------------------------- Trials --------------------------------------------

# Options of airbench94_muon.py. For 94%, channels that are multiples of 64, the size of a kernel's
# tile; for 95%, more of them, and what may keep these from learning the images by heart. What has
# been tried so far is in search_95_muon/README.md.
TRANSLATE_3 = ['--aug', '{"flip": True, "translate": 3}']
TRANSLATE_4 = ['--aug', '{"flip": True, "translate": 4}']
TRIALS = {
    '94': [
        ['--widths', '(64, 256, 384)', '--epochs', '20'],
        ['--widths', '(64, 256, 512)'],
        ['--widths', '(64, 384, 384)'],
    ],
    '95': [
        ['--widths', '(96, 384, 512)'],
        ['--widths', '(96, 384, 512)', '--epochs', '24', *TRANSLATE_3],
        ['--widths', '(112, 448, 576)', '--epochs', '22', *TRANSLATE_3],
        ['--widths', '(96, 384, 512)', '--epochs', '36', *TRANSLATE_4],
        ['--widths', '(112, 448, 576)', '--epochs', '28', *TRANSLATE_3],
    ],
}


def trials(args):
    """All of them at once, uncompiled, four runs each."""
    start = time.monotonic()
    folder = args.work / 'logs'
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    logs = []
    try:
        for i, words in enumerate(TRIALS[args.target]):
            log = folder / f'trial_{args.target}_{i}.jsonl'
            log.unlink(missing_ok=True)
            command = [sys.executable, str(ROOT / 'airbench94_muon.py'), '--data', args.data]
            command += ['--log', str(log), '--seed', str(args.seed), '--runs', '4']
            command += ['--device', args.device, '--compile', 'False', *words]
            if args.tiny:
                command += ['--widths', f'({8 + 8 * i},8,8)', '--batch_size', '20', '--epochs', '1']
            processes.append(start_process(command, log.with_suffix('.out'), args))
            logs.append(log)
        watch(processes, start + args.seconds, args)
    finally:
        for process in processes:
            stop_process(process)
        pack(args)
    for words, log in zip(TRIALS[args.target], logs, strict=True):
        lines = whole_lines(log)[1:] if log.exists() else []
        runs = [json.loads(line) for line in lines]
        values = [100 * run['tta_val_acc'] for run in runs if not run['diverged']]
        mean = f'{statistics.fmean(values):.2f}' if values else 'none'
        error = ''
        if len(values) > 1:
            error = f', std. error {statistics.stdev(values) / len(values) ** 0.5:.2f}'
        pflops = f', {runs[0]["pflops"]:.2f} PFLOPs' if runs else ''
        print(f'{" ".join(words)}: {mean}{error}, n = {len(values)}{pflops}', flush=True)
        if len(values) < 4:
            for line in output_lines(log.with_suffix('.out'))[-2:]:
                print('    ' + line[:200], flush=True)


# ---------------------------------------------- Search --------------------------------------------


def search(args):
    """Several processes of search.py, each with a share of the runs."""
    start = time.monotonic()
    folder = args.work / 'logs'
    folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT / 'results' / 'search_94_muon'))
    candidates = importlib.import_module('candidates')
    if args.tiny:
        base, factors = candidates.TARGETS[args.target]
        large = {'budget', 'mids', 'widths', 'stages', 'proxy'}  # changes that are not tiny
        names = [name for name, change in factors.items() if not change.keys() & large]
        first = {name: factors[name] for name in names[:2]}
        candidates.TARGETS[args.target] = shrunk(base), first
    lines = candidates.queue(args.target, args.runs, args.seed)
    logs = [folder / f'search_{args.target}_{i}.jsonl' for i in range(args.processes)]
    threads = max(1, os.cpu_count() // args.processes)
    program = str(ROOT / 'results' / 'search_94_muon' / 'search.py')
    processes = []

    def finished_runs():
        return [json.loads(line) for log in logs if log.exists() for line in whole_lines(log)]

    try:
        for i, log in enumerate(logs):
            queue = args.work / f'queue_{i}.jsonl'
            queue.write_text('\n'.join([*lines[i :: args.processes], 'end']) + '\n')
            log.unlink(missing_ok=True)
            command = [sys.executable, program, str(queue), str(log), args.data]
            output = log.with_suffix('.out')
            processes.append(start_process(command, output, args, OMP_NUM_THREADS=str(threads)))
        watch(processes, start + args.seconds, args)
    finally:
        for process in processes:
            stop_process(process)
        pack(args)
    runs = finished_runs()
    for line in candidates.report(args.target, runs, 'selective'):
        print(line, flush=True)
    seconds = time.monotonic() - start
    print(f'{len(runs)} runs of {len(lines)} in {seconds:.0f} s', flush=True)
    for log in logs:
        for line in output_lines(log.with_suffix('.out'))[-4:]:
            print('    ' + line[:200], flush=True)


def shrunk(changes):
    """A recipe that trains 60 images on a tiny network for a second."""
    stages = [[*stage, 20] for stage in changes['stages']]
    tiny = dict(
        budget=5.5e-5,
        tta_share=0.0,
        train_images=60,
        mids=[8, 8, 8],
        widths=[8, 8, 8],
        stages=stages,
    )
    if 'proxy' in changes:
        tiny['proxy'] = [[8, 8, 8], *changes['proxy'][1:]]
    return changes | tiny


# ----------------------------------------------- Main ---------------------------------------------


def run_all(args):
    start = time.monotonic()
    plan = bench_plan(args) if args.stage == 'bench' else runs_plan(args)
    if not any(args.only in name for name, *_ in plan):
        print(f'gpu: error: no command has {args.only} in its name', file=sys.stderr)
        sys.exit(2)
    folder = args.work / 'logs'
    folder.mkdir(parents=True, exist_ok=True)
    if args.stage == 'bench':
        make_random_data(args)
        for script in ('airbench94_muon', 'airbench94_compiled'):
            (folder / f'{script}.jsonl').unlink(missing_ok=True)  # else its runs are done
    for name, seconds, command in plan:
        left = args.seconds - (time.monotonic() - start)
        if args.only and args.only not in name:
            continue
        if left < seconds:
            print(f'{name}: skipped, {left:.0f} of {seconds} seconds are left', flush=True)
            continue
        begin = time.monotonic()
        output = folder / f'{name}.out'
        processes = []
        try:
            processes.append(start_process(command, output, args))
            watch(processes, time.monotonic() + min(left, 2 * seconds), args)
            code = processes[0].poll()
        finally:
            for process in processes:
                stop_process(process)
            pack(args)
        code = 'stopped' if code is None else code
        print(f'{name}: {code}, {time.monotonic() - begin:.0f} s', flush=True)
        lines = [line for line in output_lines(output) if 'Profiler' not in line]
        for line in lines[-3:]:
            print('    ' + summary_of(line), flush=True)


def summary_of(line):
    """A line of a command's output; of a probe's JSON the times alone."""
    try:
        record = json.loads(line)
        sizes = {
            size: f'{of["ms"]:.2f} ms ({of["ms_range"][0]:.2f} to {of["ms_range"][1]:.2f}), '
            f'host {of["host_ms"]:.2f}, '
            f'{of.get("kernels_per_step")} kernels, busy {of.get("busy", 0):.2f}'
            for size, of in record['sizes'].items()
        }
        return (
            f'ready {record["ready_seconds"]:.0f} s, losses {record["losses"][0]:.4f} '
            f'{record["losses"][9]:.4f} {record["losses"][-1]:.4f}, {sizes}'
        )
    except (ValueError, TypeError, LookupError):
        return line[:200]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('stage', choices=('bench', 'runs', 'trials', 'search', 'probe'))
    add('--out', type=Path, default=Path('gpu_out'))
    add('--seconds', type=float, default=400)
    add('--data', default='../shared/cifar10')
    add('--work', type=Path, default=Path('/tmp/airbench_gpu'))
    add('--device', default='cuda')
    add('--seed', type=int, default=5000)
    add('--only', default='')
    add('--tiny', action='store_true')
    add('--script', choices=[file.stem for file in SCRIPTS], default='airbench94_muon')
    add('--variant', choices=VARIANTS, default='captured')
    add('--widths', type=int, nargs=3)
    add('--target', choices=('94', '95', '96'), default='94')
    add('--processes', type=int, default=6)
    add('--runs', type=int, default=320)
    args = parser.parse_args()
    args.start = time.perf_counter()
    if args.stage == 'trials' and args.target not in TRIALS:
        parser.error(f'there are no trials for {args.target}: search instead')
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module('airbench94_muon')
    try:
        name = script.device_name(torch.device(args.device))
    except (AssertionError, RuntimeError) as error:
        parser.error(f'no device {args.device}: {str(error).splitlines()[0]}')
    if args.processes < 1:
        parser.error('--processes must be at least 1')
    args.work = args.work.resolve()  # what is started runs in another folder
    if args.stage == 'probe':
        if args.variant not in variants_of(args.script):
            parser.error(f'{args.script} has only {", ".join(variants_of(args.script))}')
    else:
        print(name, flush=True)  # a probe names it in its record
        try:  # now, as what cannot be packed is lost
            for folder in (args.out, args.work / 'logs'):
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            parser.error(f'cannot write to {folder} ({error.strerror}): name another folder')
    if args.stage in ('runs', 'trials', 'search'):
        # Once, as processes that download or unpack CIFAR-10 at once get in each other's way.
        folder = args.data if args.data == 'synthetic' else ROOT / args.data
        if folder != 'synthetic' and not folder.exists():
            parser.error(f'there is no folder {folder}')  # else torchvision would try to download
        try:
            for train in (True, False):
                script.load_split(folder, train)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    stage = dict(probe=probe, trials=trials, search=search, bench=run_all, runs=run_all)[args.stage]
    # So that SIGTERM, or a terminal that is closed, ends the program through its `finally`.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def end(*_):
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)  # a second one is not to disturb the `finally`
        sys.exit(143)

    try:
        for number, handler in handlers.items():
            if handler != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, end)
        stage(args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == '__main__':
    main()
