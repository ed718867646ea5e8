"""The README's figures, recomputed from the logs in results/."""

import ast
import importlib
import json
import math
import re
import runpy
import shlex
import statistics
import sys
from pathlib import Path

import pytest
import torch
from conftest import CIFAR10, ROOT
from test_summarize import summarize

import airbench94_muon

RESULTS = ROOT / 'results'
CPU_LOGS = sorted(RESULTS.glob('airbench*/cpu.jsonl'))
GPU_LOGS = sorted(RESULTS.glob('airbench*/h200.jsonl'))
LOGS = CPU_LOGS + GPU_LOGS


def log_of(script):
    """That of the H200 where there is one."""
    return max(RESULTS / script / 'h200.jsonl', RESULTS / script / 'cpu.jsonl', key=Path.exists)


def table():
    """
    The cells of the rows of results/README.md by script: PFLOPs, accuracy on the GPU, on CPUs, of
    the paper, and its PFLOPs.
    """
    text = (ROOT / 'results' / 'README.md').read_text()
    rows = re.findall(r'^\| `(airbench\w+)\.py` \|(.*)\|$', text, re.MULTILINE)
    return {script: [cell.strip() for cell in row.split('|')] for script, row in rows}


def check_row(row, header, runs, hyp):
    """Raises AssertionError where this row of the table is not what the log says."""
    summary, gpu = summarize.summarize(runs), 'NVIDIA' in runs[0]['device']
    assert row[1 if gpu else 2] == summarize.readme_cell(summary) and summary['diverged'] == 0
    assert {f'{run["pflops"]:.2f}' for run in runs} == {row[0]}
    assert row[3:] == list(summarize.PUBLISHED[header['script']][:2])
    assert header['data'] == CIFAR10 and not header['synthetic']
    recipe = json.loads(json.dumps(hyp))
    if gpu and recipe.get('compile', False) is None:
        recipe['compile'] = True  # which None means there
    # Logs can be older than a hyperparameter.
    assert recipe | header['hyperparameters'] == recipe


def test_every_log_has_its_cell_and_every_cell_its_log():
    assert CPU_LOGS and sorted(table()) == [log.parent.name for log in CPU_LOGS]
    on_gpu = [script for script, row in table().items() if row[1]]
    assert on_gpu == [log.parent.name for log in GPU_LOGS]


@pytest.mark.parametrize('log', LOGS, ids=lambda log: f'{log.parent.name}-{log.stem}')
def test_the_row_follows_from_the_log(log):
    header, runs = summarize.read_logs([log])
    assert header['script'] == log.parent.name
    assert all((run['device'] == 'NVIDIA H200') == (log in GPU_LOGS) for run in runs)
    check_row(
        table()[header['script']], header, runs, importlib.import_module(header['script']).hyp
    )


@pytest.mark.parametrize(
    'key, value', [('tta_val_acc', 0.95), ('pflops', 0.37), ('diverged', True)]
)
def test_a_wrong_row_is_found(key, value):
    header, runs = summarize.read_logs([LOGS[0]])
    runs[0][key] = value
    with pytest.raises(AssertionError):
        check_row(
            table()[LOGS[0].parent.name],
            header,
            runs,
            importlib.import_module(LOGS[0].parent.name).hyp,
        )
    with pytest.raises(AssertionError):
        check_row(
            table()[LOGS[0].parent.name],
            header,
            runs[1:],
            importlib.import_module(LOGS[0].parent.name).hyp,
        )


def readme_rows():
    """The README's first table, as the logs have it."""
    for script, published in summarize.PUBLISHED.items():
        log = log_of(script)
        _, runs = summarize.read_logs([log])
        summary = summarize.summarize(runs)
        accuracy = summarize.readme_cell(summary)
        time = summarize.readme_time(summary).split(',')[0]
        if log.stem == 'cpu':
            accuracy, time = f'{accuracy}, on a CPU', ''
        cells = [accuracy, time, f'{summary["pflops"]:.2f}', published[2]]
        yield f'| [{script}.py]({script}.py) | {" | ".join(cells)} |'


def test_the_readmes_table_follows_from_the_logs():
    lines = (ROOT / 'README.md').read_text().splitlines()
    table = [line.replace(' ', '') for line in lines[:25] if line.startswith('| [')]
    assert table == [row.replace(' ', '') for row in readme_rows()]


@pytest.mark.parametrize('script', summarize.PUBLISHED)
def test_the_docstring_follows_from_the_logs(script):
    log = log_of(script)
    summary = summarize.summarize(summarize.read_logs([log])[1])
    evidence = f'{100 * summary["mean"]:.2f}% in the mean of {summary["n"]} runs '
    if log.stem == 'h200':
        evidence += f'of {summarize.readme_time(summary).split(",")[0]} on an NVIDIA H200; '
    else:
        evidence += 'on a CPU; '
    evidence += f'{summary["pflops"]:.2f} PFLOPs a run (results/README.md).'
    assert evidence in importlib.import_module(script).__doc__


def test_the_readme_says_how_long_a_cpu_takes():
    text = ' '.join((ROOT / 'README.md').read_text().split())
    _, runs = summarize.read_logs([RESULTS / 'airbench94' / 'cpu.jsonl'])
    minutes = {}
    for name in ('Intel Xeon, AMX', 'AMD EPYC, Zen 4'):
        ours = [run for run in runs if processor('airbench94', run).startswith(name)]
        minutes[name] = round(min(run['seconds'] for run in ours) / 60)
    assert (
        f'a run of airbench94.py takes {minutes["Intel Xeon, AMX"]} minutes on an Intel Xeon with '
        f'AMX, {minutes["AMD EPYC, Zen 4"]} on an AMD EPYC of the Zen 4 generation'
    ) in text


def test_the_readmes_std_and_power():
    from scipy import stats

    text = ' '.join((ROOT / 'README.md').read_text().split())
    logs = [RESULTS / 'airbench94' / name for name in ('h200.jsonl', 'h200_turn.jsonl')]
    std = summarize.summarize(summarize.read_logs(logs)[1])['std']
    assert f'a std of about {100 * std:.2f} points' in text
    power = stats.norm.cdf(0.001 / (std * (2 / 50) ** 0.5) - stats.norm.ppf(0.975))
    assert f'a difference of 0.1 points {int(100 * power)} times in 100' in text


def test_the_readme_is_short_before_the_method():
    assert len((ROOT / 'README.md').read_text().split('## Method')[0].split()) <= 950


def processor(script, run):
    """The processor of a run by the page of its folder, as in 'AMD EPYC, Zen 4, AVX512-BF16'."""
    text = (RESULTS / script / 'README.md').read_text()
    for seeds, machine in re.findall(r'^\| cpu.jsonl \| (.*?) \| (.*?):', text, re.MULTILINE):
        first, last = (int(seed) for seed in (seeds.split(' to ') * 2)[:2])
        if first <= run['seed'] <= last:
            return machine
    raise LookupError(f'no machine for seed {run["seed"]} of {script}')


def test_the_times_on_each_processor_are_logged_ones():
    """
    Of the processor's own runs: the log names it too, and its instruction set if it is not one of
    the oldest.
    """
    text = (ROOT / 'results' / 'README.md').read_text()
    lines = re.search(r'^\| processor \|(?:.*\n\|)*.*', text, re.MULTILINE)[0].splitlines()
    (_, _, _, *names), _, *rows = (
        [cell.strip(' `') for cell in line.strip('|').split('|')] for line in lines
    )
    scripts = [name.removesuffix('.py') for name in names]
    assert scripts == list(table()) and all(map(any, zip(*rows, strict=True)))
    logs = {script: summarize.read_logs([RESULTS / script / 'cpu.jsonl']) for script in scripts}
    *rows, (name, _, dtype, *cells) = rows
    assert (name, dtype, cells) == (
        'NVIDIA A100',
        'float16',
        [summarize.PUBLISHED[script][2] for script in scripts],
    )
    *rows, (name, _, dtype, *cells) = rows
    means = {}
    for log in GPU_LOGS:
        summary = summarize.summarize(summarize.read_logs([log])[1])
        means[log.parent.name] = summarize.readme_time(summary)
    assert (name, dtype, cells) == (
        'NVIDIA H200',
        'float16',
        [means.get(script, '') for script in scripts],
    )
    versions = {run['torch'] for _, runs in logs.values() for run in runs}
    assert {version.rpartition('.')[0] for version in versions} == {'2.14', '2.15'}
    assert 'PyTorch was 2.14 or 2.15 on the CPUs' in ' '.join(text.split())
    for name, instructions, dtype, *cells in rows:
        for script, cell in zip(scripts, cells, strict=True):
            header, runs = logs[script]
            runs = [
                run for run in runs if processor(script, run).startswith(f'{name}, {instructions}')
            ]
            fastest = min(runs, key=lambda run: run['seconds'], default=None)
            assert cell == (summarize.readme_time(fastest) if runs else '')
            assert not runs or header['dtype'] == dtype
            for run in runs:
                assert all(word in run['device'] for word in name.split(',')[0].split())
                assert '(' not in run['device'].replace('(R)', '') or run['device'].endswith(
                    f'({instructions})'
                )


def test_the_figures_are_drawn_from_the_logs(tmp_path, monkeypatch):
    """
    Drawn again, they are the same but for the ids that matplotlib gives. Its versions place a point
    up to 0.7 points of type apart.
    """
    pytest.importorskip('matplotlib')
    monkeypatch.syspath_prepend(ROOT / 'results')
    plot = importlib.import_module('plot')
    assert plot.main(['--out', str(tmp_path)]) == 0
    for name in ('accuracy.svg', 'distribution.svg'):
        new, old = ((folder / name).read_text() for folder in (tmp_path, ROOT / 'results'))
        comments = [re.findall('<!-- (.*?) -->', text) for text in (new, old)]
        assert comments[0] == comments[1] and len(comments[0]) > 5
        numbers = [re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', text) for text in (new, old)]
        new, old = ([list(map(float, pair)) for pair in pairs] for pairs in numbers)
        assert len(new) == len(old) > 0
        for point, other in zip(new, old, strict=True):
            assert point == pytest.approx(other, abs=1.5)


def test_the_times_in_turn_follow_from_the_logs():
    text = ' '.join((ROOT / 'results' / 'README.md').read_text().split())
    folder = RESULTS / 'airbench94_muon' / 'crops'
    turns, long = (
        [summarize.read_logs([log])[1] for log in logs]
        for logs in (
            (folder / 'turns_airbench94.jsonl', folder / 'turns.jsonl'),
            (RESULTS / 'airbench94' / 'h200.jsonl', folder / 'h200.jsonl'),
        )
    )
    rates = [[run['pflops'] / run['seconds'] for run in runs] for runs in turns]
    low, ratio, high = sorted(muon / base for base, muon in zip(*rates, strict=True))
    flops = long[0][0]['pflops'] / long[1][0]['pflops']
    assert f'it did {ratio:.2f} of its TFLOP/s' in text and f'; {low:.2f} to {high:.2f})' in text
    assert (
        f'a run of 1 / {flops:.2f} of the PFLOPs takes 1 / {flops * ratio:.2f} of the time' in text
    )
    base, muon = (summarize.summarize(runs)['seconds'] for runs in long)
    assert f'On the H200, alternating too, it took {muon / base:.2f} times as long' in text
    amax = summarize.summarize(summarize.read_logs([folder / 'h200_amax.jsonl'])[1])
    assert amax['n'] == 8 and f'eight runs took {amax["seconds"]:.2f} s' in text


def test_what_is_said_of_the_recipe_before():
    """With crops: its accuracy and time on the H200, and its PFLOPs without needless products."""
    text, page = (
        ' '.join(path.read_text().split())
        for path in (RESULTS / 'README.md', RESULTS / 'airbench94_muon' / 'README.md')
    )
    crops = RESULTS / 'airbench94_muon' / 'crops'
    for file in crops.iterdir():
        assert f'crops/{file.name}' in page or f'`{file.name}`' in page, file
    for log in crops.glob('*.jsonl'):
        assert summarize.read_logs([log])[0]['data'] == CIFAR10
    header, runs = summarize.read_logs([crops / 'h200.jsonl'])
    summary = summarize.summarize(runs)
    accuracy = summarize.readme_cell(summary).split(' (')[0]
    pflops = summary['pflops']
    seconds = summarize.readme_time(summary).split(',')[0]
    assert f'took {pflops:.2f} PFLOPs, and had {accuracy} in 25 runs on the H200' in text
    _, base = summarize.read_logs([RESULTS / 'airbench94' / 'h200.jsonl'])
    fast = summarize.readme_time(summarize.summarize(base)).split(',')[0]
    assert f'V took {seconds}, when airbench94.py took {fast}.' in text
    steps = math.ceil(header['hyperparameters']['epochs'] * 25)
    h = airbench94_muon.hyp | dict(sizes=header['hyperparameters']['crops'])
    fewer = airbench94_muon.count_pflops(h, steps, 10000)
    assert f'Without them its {pflops:.3f} PFLOPs would be {fewer:.3f}' in text
    assert f'and {pflops:.3f} PFLOPs' in page


def ready(log):
    """The distinct seconds from a process's start to its first run, in order."""
    found = dict.fromkeys(round(run['ready_seconds']) for run in summarize.read_logs([log])[1])
    return list(found)


def test_what_is_said_of_the_h200():
    text = ' '.join((RESULTS / 'README.md').read_text().split())
    readme = ' '.join((ROOT / 'README.md').read_text().split())
    logs = [
        RESULTS / script / name
        for script, name in (
            ('airbench94', 'h200_turn.jsonl'),
            ('airbench94_compiled', 'h200.jsonl'),
            ('airbench94_muon', 'h200.jsonl'),
        )
    ]
    read = [summarize.read_logs([log]) for log in logs]
    assert all(header['data'] == CIFAR10 for header, _ in read)
    base, *others = ([run['seconds'] for run in runs] for _, runs in read)
    mean = statistics.fmean(base)
    accuracy = summarize.readme_cell(summarize.summarize(read[0][1])).split(' (')[0]
    assert (
        f'took {mean:.2f} s in the mean of {len(base)} more runs ({min(base):.2f} to '
        f'{max(base):.2f} s; {accuracy}, not in the table; [log](airbench94/h200_turn.jsonl))'
    ) in text
    compiled, muon = (statistics.fmean(seconds) for seconds in others)
    assert (
        f'The {compiled:.2f} and {muon:.2f} s are of another machine, on which airbench94.py took '
        f'{mean:.2f} s.'
    ) in readme
    stds = [f'{statistics.stdev(seconds):.2f}' for seconds in others]
    ratios = [f'{statistics.fmean(seconds) / mean:.2f}' for seconds in others]
    assert f'the std of their times is {stds[0]} and {stds[1]} s' in text
    assert f'They take {ratios[0]} and {ratios[1]} times the {mean:.2f} s' in text
    assert f'on the H200 {mean / statistics.fmean(others[0]):.2f} times' in text
    (compiled,), again, (first,) = map(
        ready, (logs[1], logs[2], RESULTS / 'airbench94_muon' / 'h200_random.jsonl')
    )
    plain = ready(logs[0])
    assert (
        f'the first run: airbench94.py {plain[0]} and {plain[1]}; airbench94_compiled.py '
        f'{compiled}; airbench94_muon.py {first} at its first start, {again[0]} and {again[1]} at '
        'later ones.'
    ) in text
    assert f'took {first} s until the first run' in ' '.join(airbench94_muon.__doc__.split())


def test_the_runs_of_airbench94_muon_are_not_the_searchs():
    """But for the seeds that the page names, which the search used for other recipes."""
    text = ' '.join((RESULTS / 'README.md').read_text().split())
    searched = {run['seed'] for run in search_runs() + runs_on_half_of_the_data()}
    folder = RESULTS / 'airbench94_muon'
    assert searched.isdisjoint(
        run['seed'] for run in summarize.read_logs([folder / 'cpu.jsonl'])[1]
    )
    _, runs = summarize.read_logs([folder / 'h200.jsonl'])
    fresh = [run for run in runs if run['seed'] not in searched]
    assert len(runs) == 16 and len(fresh) == 10  # so six of 16, as three pages say
    assert f'without them it has {summarize.readme_cell(summarize.summarize(fresh))}' in text
    starts = [round(run['ready_seconds']) for run in runs]
    page = ' '.join((folder / 'README.md').read_text().split())
    assert starts.count(starts[0]) == 9 and starts.count(starts[-1]) == 7
    assert 'stopped after nine and, continued, after seven more' in page


def test_what_a_step_on_the_h200_is_made_of():
    folder = RESULTS / 'airbench94_muon'
    page = ' '.join((folder / 'README.md').read_text().split())

    def times(name):
        """Milliseconds a step at 22, 26 and 32 pixels, those of the evaluation, and seconds."""
        runs = summarize.read_logs([folder / name])[1]
        ends = [
            statistics.fmean(column)
            for column in zip(*[run['time_seconds'] for run in runs], strict=True)
        ]
        epochs = [1000 * (end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        parts = epochs[1:5], epochs[6:10], epochs[11:17]  # the last is the evaluation
        steps = [f'{statistics.fmean(part) / 25:.2f}' for part in parts]
        return [*steps, f'{epochs[-1]:.0f}', f'{ends[-1]:.2f}']

    before, after, random = map(
        times, ('h200_random_before.jsonl', 'h200.jsonl', 'h200_random.jsonl')
    )
    assert f'| [before](h200_random_before.jsonl) | {" | ".join(before)} |' in page
    assert f'| [after](h200.jsonl) | {" | ".join(after)} |' in page
    assert f'(h200_random.jsonl) the changes, {random[-1]} s too.' in page

    lines = (folder / 'h200_parts.txt').read_text().splitlines()
    resized = [float(line.split()[-2]) / 1000 for line in lines if line.endswith(' us')][:4]
    assert f'{resized[1]:.2f} ms a step to reduce images to 22 pixels and {resized[3]:.2f}' in page
    assert f'Two matrix products take {resized[0]:.2f} ms' in page and resized[2] < 0.055
    pools = [float(line.split()[0]) / 1000 for line in lines if line.startswith('         ')]
    assert f'took {pools[0]:.3f} ms in what' in page
    own = next(line for line in lines if 'convolution_backward_eq' in line)
    assert f'takes {float(own.split()[0]) / 1000:.3f} ms by the class MaxPool' in page
    (loader,) = (line for line in lines if line.startswith('loader old'))
    assert f'the loader, {float(loader.split()[-2]) / 1000:.2f} ms a step' in page

    profile = json.loads((folder / 'h200_profile.json').read_text())['sizes']['32']
    sums = dict.fromkeys(('convolutions', 'pools', 'others', 'all'), 0)
    for name, ms, _ in profile['longest']:
        sums['all'] += ms
        if re.search('fprop|dgrad|wgrad|Implicit', name):
            sums['convolutions'] += ms
        elif 'max_pool2d_with_indices_backward' in name:
            sums['pools'] += ms
        elif 'triton' in name:
            sums['others'] += ms
    assert (
        f'the longest 60 of the {profile["kernels_per_step"]:.0f} kernels of a step at 32 pixels, '
        f'before: {sums["all"]:.2f} ms, of which {sums["convolutions"]:.2f} are convolutions, '
        f'{sums["pools"]:.2f} the gradients of the three pools, and {sums["others"]:.2f} other'
    ) in page
    (first,) = ready(folder / 'h200_random.jsonl')
    again = ready(folder / 'h200.jsonl')
    assert f'The first start took {first} s' in page
    assert f'Later starts took {again[0]} and {again[1]} s' in page


def test_the_time_without_needless_products_is_as_logged():
    text = ' '.join((RESULTS / 'README.md').read_text().split())
    ratios = []
    for size in (24, 28, 32):
        log = json.loads((RESULTS / 'steps' / f'needless_products_{size}.json').read_text())
        times = [times['step'] / times['step of the other'] for times in log['rounds']]
        ratios.append(f'{statistics.median(times):.2f}')
    said = 'a step of V took {} times as long at 24 pixels, {} at 28 and {} at 32'
    assert said.format(*ratios) in text


def test_the_intervals_of_v_and_s_on_a_cpu_follow_from_their_logs():
    from scipy import stats

    folder = RESULTS / 'airbench94_muon' / 'crops'
    said = []
    for name, n in (('cpu', 10), ('before_2x2', 6)):
        values = [
            100 * run['tta_val_acc'] for run in summarize.read_logs([folder / f'{name}.jsonl'])[1]
        ]
        assert len(values) == n
        width = stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5
        said.append(f'{statistics.fmean(values):.2f} ± {width:.2f}')
    page = ' '.join((RESULTS / 'search_94_muon' / 'README.md').read_text().split())
    other = 'S, on another CPU in bfloat16'
    assert f'{said[0]} (ten runs) at 0.239; {other}, {said[1]} (six; stopped' in page


def test_the_trials_for_95_follow_from_their_logs():
    """An option is a hyperparameter of airbench94_muon.py that was changed."""
    folder = RESULTS / 'search_95_muon'
    page = (folder / 'README.md').read_text()
    logs = set()
    for options, row in re.findall(r'^\| `(--.*?)` \|(.*)\|$', page, re.MULTILINE):
        pflops, accuracy, error, n, seeds, device, log = (cell.strip() for cell in row.split('|'))
        file = folder / re.fullmatch(r'\[\w+\]\((\w+.jsonl)\)', log)[1]
        logs.add(file)
        header, runs = summarize.read_logs([file])
        words = shlex.split(options)
        changes = {
            flag.removeprefix('--'): ast.literal_eval(value)
            for flag, value in zip(words[::2], words[1::2], strict=True)
        }
        recipe = json.loads(json.dumps(airbench94_muon.hyp | changes))
        assert header['hyperparameters'] == recipe and header['data'] == CIFAR10
        summary = summarize.summarize(runs)
        assert pflops == f'{summary["pflops"]:.2f}' and n == str(summary['n'] + summary['diverged'])
        spread = f' ± {error}' if error else ''
        assert summarize.readme_cell(summary) == f'{accuracy}{spread} ({n})'
        first, *last = map(int, seeds.split(' to '))
        assert [run['seed'] for run in runs] == list(range(first, (last or [first])[0] + 1))
        assert all(word in header['device'] for word in re.findall(r'[\w-]+', device))
    others = set(re.findall(r'\[by (?:search.py|the script)\]\((\w+.jsonl)\)', page))
    assert logs == set(folder.glob('*.jsonl')) - {folder / name for name in others}


def test_the_trials_for_95_by_the_search_follow_from_their_logs(monkeypatch):
    """Of what airbench94_muon.py has no option for. The changes are of candidates.py's recipe."""
    monkeypatch.syspath_prepend(RESULTS / 'search_94_muon')
    candidates = importlib.import_module('candidates')
    folder = RESULTS / 'search_95_muon'
    page = (folder / 'README.md').read_text()
    rows = re.findall(r'^\| `(\w+=.*?)` \|(.*)\|$', page, re.MULTILINE)
    assert rows
    for text, row in rows:
        pflops, accuracy, error, n, seed, device, log = (cell.strip() for cell in row.split('|'))
        file = re.fullmatch(r'\[by search.py\]\((\w+.jsonl)\)', log)[1]
        (run,) = map(json.loads, open(folder / file))
        arguments = ast.parse(f'dict({text})', mode='eval').body.keywords
        changes = {argument.arg: ast.literal_eval(argument.value) for argument in arguments}
        recipe = candidates.BASE_95 | changes
        if run['seed'] == 808:
            del recipe['head_scale']  # which search.py did not have yet
        assert run['changes'] == recipe and not run['diverged']
        assert (pflops, accuracy) == (f'{run["pflops"]:.2f}', f'{100 * run["selective"]:.2f}')
        assert (error, n, seed) == ('', '1', str(run['seed']))
        assert all(word in run['device'] for word in re.findall(r'[\w-]+', device))


def test_what_is_said_of_the_trials_for_95():
    from scipy import stats

    folder = RESULTS / 'search_95_muon'
    page = ' '.join((folder / 'README.md').read_text().split())
    _, (run,) = summarize.read_logs([folder / 'translate3.jsonl'])
    learned = 100 * min(run['train_acc'][-2:])
    _, (wider,) = summarize.read_logs([folder / 'wider17.jsonl'])
    too = 100 * min(wider['train_acc'][-2:])
    _, (last,) = summarize.read_logs([folder / 'wide36.jsonl'])
    at_last = 100 * min(last['train_acc'][-2:])
    said = f'{learned:.1f}% for seed {run["seed"]}, {too:.1f}% for seed {wider["seed"]}, and '
    said += f'{at_last:.1f}% for seed {last["seed"]}.'
    assert f'the training accuracy on the last batch was at least {said}' in page

    _, (narrow,) = summarize.read_logs([folder / 'translate4.jsonl'])
    _, (wide,) = summarize.read_logs([folder / 'wide17.jsonl'])
    gain = 100 * (wide['tta_val_acc'] - narrow['tta_val_acc'])
    assert wide['pflops'] < narrow['pflops']
    said = (
        f"17 epochs at 1.33 times W's channels give {gain:.2f} points more than 29.9 epochs at W's"
    )
    assert said in page
    _, (widest,) = summarize.read_logs([folder / 'widest17.jsonl'])
    first, second, third = (f'{100 * run["tta_val_acc"]:.2f}' for run in (wide, wider, widest))
    assert f"1.78 times W's channels gave {first}, {second} and {third} in single runs" in page

    _, (longer,) = summarize.read_logs([folder / 'wide24.jsonl'])
    assert f'3 gave {100 * longer["tta_val_acc"]:.2f} in a single run, after {first}' in page
    (_, (long,)), (_, (longest,)) = (
        summarize.read_logs([folder / f'{name}.jsonl']) for name in ('wide28', 'wide36')
    )
    first_two, compute = (
        [f'{scale * run[key]:.2f}' for run in (long, longest)]
        for scale, key in ((100, 'tta_val_acc'), (1, 'pflops'))
    )
    said = f'4 gave {" and ".join(first_two)} in single runs, for {" and ".join(compute)} PFLOPs.'
    assert said in page

    (third,) = map(json.loads, open(folder / 'third_convolution.jsonl'))
    accuracy, without = (
        f'{100 * value:.2f}' for value in (third['selective'], longer['tta_val_acc'])
    )
    assert f'seems to pay no more: {accuracy} after {without}. The compute is the same' in page
    assert third['pflops'] == pytest.approx(longer['pflops'], rel=0.01)
    assert f'which is {third["epochs"]:.0f} epochs with it and 24 without.' in page

    (cutout,) = map(json.loads, open(folder / 'cutout8.jsonl'))
    said = f'{100 * cutout["selective"]:.2f} after {100 * long["tta_val_acc"]:.2f}, in single runs'
    assert f'shows no gain: {said} of {cutout["epochs"]:.0f} epochs.' in page
    (header, _) = summarize.read_logs([folder / 'wide28.jsonl'])
    assert f'and in {cutout["dtype"]}, not {header["dtype"]}.' in page
    assert cutout['pflops'] == pytest.approx(long['pflops'], rel=0.01)
    assert f'{100 * cutout["train_acc"]:.1f}% of the last ten batches' in page
    (proxied,) = map(json.loads, open(folder / 'proxy.jsonl'))
    said = f'no clear gain: {100 * proxied["selective"]:.2f} after {100 * cutout["selective"]:.2f},'
    said += ' for the same compute, in single runs by search.py '
    assert f'{said}in {proxied["dtype"]} and {cutout["dtype"]}.' in page
    assert proxied['pflops'] == pytest.approx(cutout['pflops'], rel=0.01)
    assert proxied['changes'] == cutout['changes'] | dict(proxy=[[32, 64, 64], 0.5, 4])
    said = f'was trained on {proxied["epochs"]:.1f} epochs, not {cutout["epochs"]:.1f}; '
    assert f'{said}it had {100 * proxied["train_acc"]:.1f}% of the last ten batches' in page
    (pruned,) = map(json.loads, open(folder / 'fewer_easy.jsonl'))
    header, (again,) = summarize.read_logs([folder / 'script.jsonl'])
    two = [100 * pruned['selective'], 100 * again['tta_val_acc']]
    said = f'for {pruned["epochs"]:.1f} epochs: {two[0]:.2f} by search.py in {pruned["dtype"]}, '
    assert f'{said}and {two[1]:.2f} by the script below in {header["dtype"]}.' in page
    one = f'{100 * run["tta_val_acc"]:.2f}'
    assert f'{one} in one run, and {two[0]:.2f} and {two[1]:.2f} in two runs of another' in page
    assert {f'{each["pflops"]:.2f}' for each in (run, pruned, again)} == {'0.70'}
    assert max(run['tta_val_acc'], again['tta_val_acc'], pruned['selective']) * 100 == two[0]
    assert pruned['changes']['prune'] == [0.35, 0.4]
    learned = 100 * min(again['train_acc'][-2:])
    assert f'its training accuracy on the last batch was at least {learned:.1f}%.' in page
    _, runs = summarize.read_logs([RESULTS / 'airbench95' / 'h200.jsonl'])
    std = summarize.summarize(runs)['std']
    apart = stats.norm.ppf(0.975) * 2**0.5 * std
    assert f'25 runs on the H200 is {100 * std:.2f} points, by which' in page and len(runs) == 25
    assert f'two runs of one recipe differ by up to {100 * apart:.2f}, 95 times in 100.' in page
    seconds = 0
    for log in folder.glob('*.jsonl'):
        for run in map(json.loads, open(log)):
            seconds += run.get('seconds', run.get('train_seconds', 0))
    assert f'None was found in {seconds / 3600:.1f} hours' in page
    cells = re.findall(r'\| (9\d\.\d\d) \|', (folder / 'README.md').read_text())
    assert [cell for cell in cells if float(cell) >= 95] == [f'{100 * pruned["selective"]:.2f}']

    _, (larger,) = summarize.read_logs([folder / 'larger17.jsonl'])
    accuracy, times = 100 * larger['tta_val_acc'], larger['pflops'] / wide['pflops']
    said = f'gave {accuracy:.2f} after {first}, for {times:.2f} times the compute.'
    assert f'24 and 28 pixels, for 22 and 26, {said}' in page


def test_what_is_said_of_other_views_for_95():
    from scipy import stats

    folder = RESULTS / 'search_95_muon'
    page = ' '.join((folder / 'README.md').read_text().split())
    accuracies = {}
    for line in open(folder / 'views.json'):
        row = json.loads(line)
        way = row['views'], row.get('share'), row.get('weight')
        accuracies.setdefault(way, {})[row['seed']] = round(10_000 * row['accuracy'])  # images
    own = accuracies['one pixel', 0.125, 2]
    names = 'translate4 wide17 wider17 widest17 wide24 larger17 wide28'.split()
    for name, (seed, accuracy) in zip(names, own.items(), strict=True):
        _, (run,) = summarize.read_logs([folder / f'{name}.jsonl'])
        assert run['seed'] == seed and abs(accuracy - 10_000 * run['tta_val_acc']) < 1.1
    assert list(own) == list(range(801, 808))

    def gains_of(way, seeds):
        return [(accuracies[way][seed] - own[seed]) / 100 for seed in seeds]

    gains = {way: gains_of(way, range(801, 806)) for way in accuracies}
    means = {way: statistics.fmean(gain) for way, gain in gains.items()}
    assert len(means) == 37
    best = max(means, key=means.get)
    assert best[:2] == ('up to two pixels', 0.2)
    error = statistics.stdev(gains[best]) / 5**0.5
    low, high = stats.t.interval(0.95, 4, means[best], error)
    assert f'In the mean it gives {means[best]:.2f} points more than' in page
    assert f'over the five networks is {low:.2f} to {high:.2f}.' in page
    larger, longest = gains_of(best, (806, 807))
    assert f'which came later, it gives {larger:.2f} and {longest:.2f}.' in page
    along = [mean for way, mean in means.items() if way[0] == 'one pixel along an axis']
    resized = max(mean for way, mean in means.items() if 'resized' in way[0])
    said = f'along one axis give {min(along):.2f} to {max(along):.2f}, images resized to 30 and 34'
    assert f'{said} pixels at most {resized:.2f} (' in page


def test_views_tries_the_scripts_own_test_time_augmentation(tmp_path, monkeypatch, capsys):
    h = dict(airbench94_muon.hyp, widths=(4, 8, 8))
    synthetic_split = airbench94_muon.synthetic_split

    def split(train):
        n = 500 if train else 200
        return {key: value[:n] for key, value in synthetic_split(train).items()}

    monkeypatch.setattr(airbench94_muon, 'synthetic_split', split)
    train_loader = airbench94_muon.CifarLoader('synthetic', batch_size=50, device='cpu')
    net = airbench94_muon.train(
        train_loader, widths=h['widths'], epochs=1, seed=1, dtype='float32', verbose=False
    )  # the dtype of the program
    loader = airbench94_muon.CifarLoader('synthetic', train=False, device='cpu')
    saved = dict(hyperparameters=h, state_dict=net.state_dict(), seed=1)
    torch.save(saved, tmp_path / 'net.pt')
    program = str(RESULTS / 'search_95_muon' / 'views.py')
    monkeypatch.setattr('sys.argv', [program, 'synthetic', *[str(tmp_path / 'net.pt')] * 2])
    monkeypatch.setattr('sys.path', list(sys.path))
    with pytest.raises(SystemExit, match='0'):
        runpy.run_path(program, run_name='__main__')
    rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert len(rows) == 2 * (1 + 4 * 3 * 3) and rows[37:] == rows[:37]
    assert {row['seed'] for row in rows} == {1}
    found = {(row['views'], row.get('share'), row.get('weight')): row['accuracy'] for row in rows}
    expected = [airbench94_muon.evaluate(net, loader, level) for level in (1, 2)]
    own = found['the image and its mirror image', None, None], found['one pixel', 0.125, 2]
    assert own == pytest.approx(expected)
    assert len(set(found.values())) > 4  # other views, other accuracies
    for words, said in ((['--help'], 'give it the folder'), (['synthetic', 'none'], 'no none')):
        monkeypatch.setattr('sys.argv', [program, *words])
        with pytest.raises(SystemExit, match='2'):
            runpy.run_path(program, run_name='__main__')
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith('views: error: ') and said in line


def test_each_log_is_explained():
    folders = [folder for folder in RESULTS.iterdir() if folder.is_dir() and folder.name[0] != '_']
    assert len(folders) == 9
    for folder in folders:
        pages = ' '.join(page.read_text() for page in folder.glob('*.md'))
        assert f'({folder.name})' in (RESULTS / 'README.md').read_text()
        for file in folder.iterdir():
            assert file.is_dir() or file.suffix == '.md' or file.name in pages, file


def test_the_links_of_the_pages_lead_somewhere():
    for page in (ROOT / 'README.md', *RESULTS.glob('**/*.md')):
        for link in re.findall(r'\]\(([^)#]+)\)', page.read_text()):
            assert link.startswith('http') or (page.parent / link).exists(), (page, link)


def test_ci_calls_the_readmes_test_command():
    readme = (ROOT / 'README.md').read_text()
    (command,) = re.findall(r'^    (pip install .*pytest.*)$', readme, re.MULTILINE)
    assert command in (ROOT / '.ci' / 'run').read_text().splitlines()


def search_rows(cells, page='README.md'):
    """The rows below the head of the table of so many cells."""
    text = (RESULTS / 'search_94_muon' / page).read_text()
    lines = (line.split('|')[1:-1] for line in text.splitlines())
    return [[cell.strip() for cell in line] for line in lines if len(line) == cells][2:]


def search_runs():
    return list(map(json.loads, open(RESULTS / 'search_94_muon' / 'runs.jsonl')))


def runs_on_half_of_the_data():
    return list(map(json.loads, open(RESULTS / 'search_94_muon' / 'half.jsonl')))


def test_the_frontier_follows_from_the_logs():
    names = ('cpu', 'crops/cpu', 'crops/h200', 'crops/before_2x2')
    logs = (RESULTS / 'airbench94_muon' / f'{name}.jsonl' for name in names)
    runs = [run for log in logs for run in summarize.read_logs([log])[1]]
    runs = {
        run['seed']: run
        for run in runs + [dict(run, tta_val_acc=run['selective']) for run in search_runs()]
    }
    assert search_rows(6)
    stds = []
    for _, pflops, accuracy, error, n, seeds in search_rows(6):
        first, *last = map(int, seeds.split(' to '))
        chosen = [runs[seed] for seed in range(first, (last or [first])[0] + 1)]
        values = [run['tta_val_acc'] for run in chosen]
        mean = 100 * statistics.fmean(values)
        assert (f'{chosen[0]["pflops"]:.2f}', f'{mean:.2f}', str(len(chosen))) == (
            pflops,
            accuracy,
            n,
        )
        # As in summarize.py, so that a tie in rounding falls as in the README's row.
        assert error == (
            f'{100 * (statistics.stdev(values) / len(values) ** 0.5):.2f}'
            if len(values) > 1
            else ''
        )
        assert len({round(run['pflops'], 3) for run in chosen}) == 1
        if len(values) >= 10:
            stds.append(f'{100 * statistics.stdev(values):.2f}')
    page = ' '.join((RESULTS / 'search_94_muon' / 'README.md').read_text().split())
    assert f'In rows of ten runs and more the std is {min(stds)} to {max(stds)} points' in page


def test_the_report_of_the_search_is_short():
    assert len((RESULTS / 'search_94_muon' / 'README.md').read_text().split()) <= 900


def test_the_accuracies_in_the_report_of_the_search_are_logged_ones():
    logged = {f'{100 * run[key]:.2f}' for run in search_runs() for key in ('selective', 'mirror')
              if key in run}  # fmt: skip
    logged |= {f'{100 * run["held_out"]:.2f}' for run in runs_on_half_of_the_data()}
    frontier = {row[2] for row in search_rows(6)}
    text = (RESULTS / 'search_94_muon' / 'README.md').read_text()
    assert set(re.findall(r'\b9\d\.\d\d\b', text)) <= logged | frontier


def test_the_table_of_the_search_is_its_log():
    rows = search_rows(9, 'runs.md')
    runs = {run['seed']: run for run in search_runs()}
    assert [int(row[1]) for row in rows] == list(runs)
    for row, run in zip(rows, runs.values(), strict=True):
        pair = (
            f'{100 * run["mirror"]:.2f}' if 'mirror' in run else ''
        )  # runs by the script lack some
        loss = f'{run["selective_loss"]:.4f}' if 'selective_loss' in run else ''
        assert row[2:] == [
            str(run['steps']),
            f'{run["epochs"]:.1f}',
            f'{run["pflops"]:.4f}',
            f'{run["selective_views"]:g}',
            pair,
            f'{100 * run["selective"]:.2f}',
            loss,
        ]


def test_what_each_change_adds_on_half_of_the_data(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS / 'search_94_muon')
    candidates = importlib.import_module('candidates')
    found = candidates.effects('R', runs_on_half_of_the_data(), 'held_out', half=True)
    (_, mean, width, n), *found = found
    expected = [['none: **R**', f'{mean:.2f} ± {width:.2f}', str(n)]]
    for name, effect, width, n in sorted(found, key=lambda row: -row[1]):
        expected.append([name, f'{effect:+.2f} ± {width:.2f}'.replace('-', '−'), str(n)])
    assert search_rows(3, 'half.md') == expected
    text = (RESULTS / 'search_94_muon' / 'README.md').read_text()
    effects = {name: effect for name, effect, _ in expected}
    said = re.findall(r'\[([+−]\d\.\d\d ± \d\.\d\d)\]\(half.md\)', text)
    assert said == [effects['a tail of the lr'], effects['cutout 6']]


def test_the_table_of_the_runs_on_half_of_the_data_is_their_log():
    rows = search_rows(7, 'half.md')
    runs = runs_on_half_of_the_data()
    assert len(rows) == len(runs) > 0
    for row, run in zip(rows, runs, strict=True):
        assert run['changes']['train_images'] == 25000
        assert row[1:] == [
            str(run['seed']),
            str(run['steps']),
            f'{100 * run["train_acc"]:.2f}',
            f'{100 * run["selective"]:.2f}',
            f'{100 * run["held_out"]:.2f}',
            f'{run["held_out_loss"]:.4f}',
        ]


def search_variants(runs):
    """Recipes, apart from how long they train, by which program, and how they are tested."""
    found = set()
    for run in runs:
        other = ('budget', 'seed', 'tta_share', 'by')
        recipe = {key: value for key, value in run['changes'].items() if key not in other}
        if 'stages' in recipe:
            recipe['stages'] = [[*stage, 2000][:4] for stage in recipe['stages']]
        found.add(json.dumps(recipe, sort_keys=True))
    return found - {'{}'}  # Jordan's


def test_the_number_of_variants():
    said = f'{len(search_variants(search_runs()))} variants'
    more = f'{len(runs_on_half_of_the_data())} runs'
    page = (RESULTS / 'search_94_muon' / 'README.md').read_text()
    assert f'{said} on the real data, and {more} [on half of it](half.md).' in page
    text = ' '.join((RESULTS / 'README.md').read_text().split())
    assert f'on the test set: {said}, {more} on half of the data, and some ways of' in text


# Of search_94_muon/README.md: the seeds of the runs with and without a change.
PAIRS = [
    ('{} after {} at 0.13 PFLOPs', 1204, 1201),
    ('{} after {} at 0.18 PFLOPs', 1411, 1401),
    ('in block 1**: {} after {} at 0.08 PFLOPs', 1515, 1505),
    ('**Leaving out easy images**: {} after {} at 0.08', 1515, 1518),
    ('other channels: {} after {} at 0.08', 1514, 1515),
    ('other channels: {}, T has {}', 1510, 1509),
    ('after {} for nearly as many steps', 1520),
    ('{} at 0.168 PFLOPs', 1521),
    ('in block 1**, wider: {} after {} (four runs) at 0.239', 1501, (100, 101, 102, 103)),
    ('not 30%: {} after {}', 1423, 1421),
    ('**Lookahead throughout**: {} after {} at 0.13', 1307, 1308),
    ('of its peak: {} after {}', 1404, 1401),
    ('and {} after {}', 1412, 1403),
    ('**Translation by 4**: {} after {}', 1402, 1401),
    ('and {} after {}', 1424, 1421),
    ('**: {} after {} at 0.13, but', 1321, 1308),
    ('but {} after {} (four runs) at 0.239', 1504, (100, 101, 102, 103)),
    ('label smoothing 0.1**: {} after {}', 1302, 1204),
    ('T, wider, with all images, at 0.239**: {}', 1513),
    ('At 0.19 PFLOPs on all data: {}', 1601),
    ('not crops: {} after {} on half of the data', 2012, 2001),
    ('in the last stage**: {} after {} on half', 2018, 2016),
    ('{} in block 2, {} in block 3, after {}', 2022, 2023, 2012),
    ('sees block 2**: {}', 2024),
    ('BatchNorm over 250 images**: {}', 2021),
    ('of each batch**: {} after {} on half of the data', 2000, 2002),
    ("Muon's lr halved in block 1**: {} after {}", 2017, 2012),
]


def test_what_the_search_kept_and_dropped_follows_from_its_logs():
    page = ' '.join((RESULTS / 'search_94_muon' / 'README.md').read_text().split())
    page = page.split('## Kept')[1]
    accuracies = {run['seed']: 100 * run['selective'] for run in search_runs()}
    half = {run['seed']: run for run in runs_on_half_of_the_data()}
    accuracies |= {seed: 100 * run['held_out'] for seed, run in half.items()}
    budgets = {run['seed']: run['pflops'] for run in [*search_runs(), *half.values()]}
    for text, *seeds in PAIRS:
        cells = []
        for seed in seeds:
            several = seed if isinstance(seed, tuple) else (seed,)
            cells.append(f'{statistics.fmean(accuracies[each] for each in several):.2f}')
            for pflops in re.findall(r'at (0\.\d+)', text):
                digits = len(pflops) - 2
                assert {f'{budgets[each]:.{digits}f}' for each in several} == {pflops}
        assert text.format(*cells) in page
    said = re.sub(r'94.13 ± 0.14|93.98 ± 0.07|[+−]\d\.\d\d ± \d\.\d\d', '', page)
    n_accuracies = sum(len(seeds) for _, *seeds in PAIRS)
    assert len(re.findall(r'\b[89]\d\.\d\d\b', said)) == n_accuracies

    more = 100 * (half[2012]['selective'] - half[2001]['selective'])
    assert f'and {more:.2f} more on the test images' in page
    gains = [100 * (run['selective'] - run['mirror']) for run in search_runs()
             if run['selective_views'] == 4 and 'mirror' in run]  # fmt: skip
    assert f'{min(gains):.1f} to {max(gains):.1f} points over the mirrored pair alone' in page
    others = [accuracies[new] - accuracies[old]
              for new, old in ((1507, 1505), (1506, 1505), (1522, 1518), (1523, 1518))]  # fmt: skip
    others.append(half[2011]['held_out'] * 100 - half[2001]['held_out'] * 100)
    others.append(accuracies[1301] - accuracies[1204])
    low, high = (f'{value:+.1f}'.replace('-', '−') for value in (min(others), max(others)))
    assert f'before the head: from {low} to {high}.' in page


def test_the_stds_that_the_pages_name():
    folder = RESULTS / 'airbench94_muon' / 'crops'
    std = summarize.summarize(summarize.read_logs([folder / 'h200.jsonl'])[1])['std']
    half = ' '.join((RESULTS / 'search_94_muon' / 'half.md').read_text().split())
    assert f"the std of V's 25 runs on the H200 is {100 * std:.2f}." in half
    logs = [RESULTS / 'airbench94' / name for name in ('h200.jsonl', 'h200_turn.jsonl')]
    std = summarize.summarize(summarize.read_logs(logs)[1])['std']
    page = ' '.join((RESULTS / 'examples' / 'README.md').read_text().split())
    assert f"The std of airbench94.py's runs is about {100 * std:.2f} points." in page
    assert f"(a std of {100 * std:.2f} points in airbench94.py's full runs)" in page


def test_what_is_said_of_times_and_profiles():
    text = ' '.join((RESULTS / 'README.md').read_text().split())
    lines = (RESULTS / 'airbench94_muon' / 'crops' / 'h200_profile.txt').read_text().splitlines()
    shares = {}
    for line in lines[lines.index(next(line for line in lines if line.startswith('Name'))) + 1 :]:
        cells = line.split()
        if line.startswith('aten::') and cells[2].endswith('%'):
            shares[cells[0]] = float(cells[2][:-1])
    convolutions, pools = (
        sum(share for name, share in shares.items() if word in name)
        for word in ('convolution', 'max_pool')
    )
    assert f'spent {convolutions:.0f}% on convolutions and {pools:.0f}% on max-pooling' in text

    steps = {}
    for log in (RESULTS / 'steps').glob('*.json'):
        steps[log.stem] = json.loads(log.read_text())['summary']
    for script in ('airbench94', 'airbench94_muon'):
        assert 0.85 < 1 / steps[script]['step / convolutions']['median'] < 0.95  # nine tenths
    slower = [
        steps[script]['float32 step / step']['median'] for script in ('airbench94', 'airbench96')
    ]
    assert f'float32 takes {slower[0]:.1f} to {slower[1]:.1f} times as long as bfloat16' in text
    rates = {}
    for script in ('airbench94', 'airbench95'):
        for run in summarize.read_logs([RESULTS / script / 'cpu.jsonl'])[1]:
            rate = run['pflops'] / run['seconds']
            key = script, processor(script, run)
            rates[key] = max(rate, rates.get(key, 0))
    both = {place for _, place in rates if all((name, place) in rates for name in
            ('airbench94', 'airbench95'))}  # fmt: skip
    ratios = {f'{rates["airbench95", place] / rates["airbench94", place]:.1f}' for place in both}
    assert len(both) == 2 and ratios == {'1.2'}
    assert 'on both CPUs of the table that ran them, airbench95.py does 1.2 times' in text

    compiled = steps['compiled_against_94']
    step, evaluation = (
        compiled[name]['median']
        for name in ('step / step of the other', 'evaluation / evaluation of the other')
    )
    log = json.loads((RESULTS / 'steps' / 'compiled_against_94.json').read_text())
    said = f'takes {step:.2f} times as long, and an evaluation {evaluation:.2f} times, '
    assert f'{said}medians of {len(log["rounds"])} rounds' in text
    paper = [float(summarize.PUBLISHED[f'airbench94{name}'][2].split()[0])
             for name in ('', '_compiled')]  # fmt: skip
    assert f'makes a run {paper[0] / paper[1]:.2f} times faster (the paper)' in text
    log = json.loads((RESULTS / 'steps' / 'needless_products_32.json').read_text())
    ratios = sorted(round_['step / step of the other'] for round_ in log['rounds'])
    assert len(ratios) == 6 and f'({ratios[0]:.2f} to {ratios[-1]:.2f} at 32; [logs]' in text


def test_what_else_the_page_of_airbench94_muon_says():
    folder = RESULTS / 'airbench94_muon'
    page = ' '.join((folder / 'README.md').read_text().split())
    _, runs = summarize.read_logs([folder / 'crops' / 'before_2x2.jsonl'])
    values = [100 * run['tta_val_acc'] for run in runs]
    needed = (10 * 94 - sum(values)) / (10 - len(values))
    assert f'would have needed {needed:.2f} in the mean for 94.00 in all' in page
    parts = (folder / 'h200_parts.txt').read_text()
    old, new = (
        float(re.search(rf'^loader {name} +([\d.]+) us', parts, re.MULTILINE)[1])
        for name in ('old', 'g1s')
    )
    assert 0.45 < new / old < 0.55 and 'for mirror and translation together would save half' in page


def test_what_the_examples_found():
    page = ' '.join((RESULTS / 'examples' / 'README.md').read_text().split())
    lines = open(RESULTS / 'examples' / 'data_selection.jsonl')
    header, *runs = map(json.loads, lines)
    assert header['data'] == CIFAR10 and len(runs) == 3
    runs = {run['name']: run for run in runs}
    for name, run in runs.items():
        cells = [
            name,
            f'{run["images"]:,}',
            f'{run["epochs"]:g}',
            f'{100 * run["tta_val_acc"]:.2f}',
        ]
        assert f'| {" | ".join(cells)} |' in page
    gain = runs['least confident 60%']['tta_val_acc'] - runs['random 60%']['tta_val_acc']
    assert f'gave {100 * gain:.2f} points more than a random 60%' in page

    accuracies = {}
    for name in ('baseline', 'random_flip', 'no_lookahead'):
        lines = open(RESULTS / 'examples' / f'ablation_{name}.jsonl')
        header, *runs = map(json.loads, lines)
        assert header['data'] == CIFAR10 and len(runs) == 3
        accuracies[name] = [100 * run['tta_val_acc'] for run in runs]
    stds = [statistics.stdev(values) for values in accuracies.values()]
    assert f'scatter by {min(stds):.1f} to {max(stds):.1f} points (std)' in page
    from scipy import stats

    intervals = []
    for name, words in (('random_flip', 'random flip'), ('no_lookahead', 'no Lookahead')):
        base, changed = accuracies['baseline'], accuracies[name]
        test = stats.ttest_ind(base, changed, equal_var=False)
        low, high = test.confidence_interval(0.95)
        means = [statistics.fmean(values) for values in (base, changed)]
        cells = [words, f'{means[0]:.2f}', f'{means[1]:.2f}', f'{len(base)}, {len(changed)}']
        cells += [f'{means[0] - means[1]:+.2f}', f'{low:+.2f} to {high:+.2f}', f'{test.pvalue:.2f}']
        assert f'| {" | ".join(cells)} |' in page
        intervals.append((low, high))
    (low, high), (other_low, other_high) = intervals
    assert (
        f'the flip may be worth up to {high:.1f} points, the Lookahead up to {other_high:.1f}, '
        in page
    )
    assert f'or they may cost up to {-low:.1f} and {-other_low:.1f}.' in page
    std = statistics.fmean(stds)
    z = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)
    assert 45 < 2 * (z * std / 0.2) ** 2 < 65 and 'takes some fifty runs a side' in page
