"""The scripts are copies of each other but for their recipes; and what is each one's own works."""

import ast
import difflib
import importlib
import itertools
import math
import re
import subprocess

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, keep

# What may differ from airbench94.py: the top-level definitions that a script's recipe changes or
# adds.
COMPILING = {
    'import functools',
    'import importlib.util',
    'import shutil',
    'import sysconfig',
    'import threading',
    'from contextlib import contextmanager, nullcontext, suppress',
    'from contextlib import nullcontext, suppress',
    'MaxPool',
    'max_pool',
    'image_sizes',
    'set_up_compiler',
    'compiled_net',
    'CapturedStep',
    'NOT_IN_STEP',
    'captured_steps',
    'captured_step',
    'one_at_a_time',
    'what_compiling_lacks',
}
OWN = {
    'airbench94_muon': {
        *('docstring', 'hyp', 'convolve_small_maps', 'Conv', 'Block', 'Net'),
        *('NEWTON_SCHULZ_COEFFICIENTS', 'NEWTON_SCHULZ_STEPS', 'orthogonalize'),
        *('orthogonalize_filters', 'Muon', 'make_optimizer'),
        *(
            'lr_factor',
            'tail_start',
            'image_size',
            'resize_matrix',
            'resize',
            'train_step',
            'views_of',
        ),
        *('plain_views', 'translated_views', 'infer_views', 'infer'),
        *(COMPILING | {'train', 'warmup', 'merge', 'parse_arguments'}),
        *('count_pflops', 'run_once'),
    },
    'airbench95': {'docstring', 'hyp'},
    'airbench96': {'docstring', 'hyp', 'batch_cutout', 'CifarLoader', 'Block'},
    'airbench94_compiled': {
        *('docstring', 'hyp', 'Block'),
        *(COMPILING | {'train', 'warmup', 'merge', 'parse_arguments'}),
    },
}
# Of the diff.
MOST_LINES = dict(airbench94_muon=880, airbench95=20, airbench96=60, airbench94_compiled=395)
# The lines of airbench94.py's train, warmup, merge, run_once, parse_arguments and CifarLoader that
# other scripts do not have as they stand there.
LEFT_OUT = dict(
    airbench94_compiled="""
        if is_new:
            net = Net(h, len(loader.classes), device, dtype)
        net.whiten.bias.requires_grad_(True)  # a net that was trained has it frozen
        return net.eval()
        if device.type == 'cpu':
        overrides |= dict(epochs=2, whiten_bias_epochs=1, lr=1e-3, weight_decay=0)
    """,
    airbench94_muon="""
        if is_new:
            net = Net(h, len(loader.classes), device, dtype)
        net.whiten.bias.requires_grad_(True)  # a net that was trained has it frozen
        optimizer = make_optimizer(net, h)
        scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, total_steps, h))
        loss, logits = train_step(net, optimizer, inputs, labels, h['label_smoothing'])
        if h['lookahead'] and step % h['lookahead_every'] == 0:
            decay = h['lookahead_decay']**h['lookahead_every']
            decay = decay * (step / total_steps)**h['lookahead_power']
            lookahead_update(average, state, decay)
        if h['lookahead'] and step == total_steps and step >= h['lookahead_every']:
            lookahead_update(average, state, decay=1.0)
        if h['lookahead'] and step >= h['lookahead_every']:
            lookahead_update(average, state, decay=1.0)
        return net.eval()
        if device.type == 'cpu':
        overrides |= dict(epochs=2, whiten_bias_epochs=1, lr=1e-3, weight_decay=0)
        for key in ('epochs', 'lr', 'bias_scaler', 'scaling_factor'):
        for key in ('weight_decay', 'lr_start', 'lr_end', 'lookahead_power', 'whiten_bias_epochs'):
        for key in ('momentum', 'lr_peak'):
        require('lookahead', 'True or False', h['lookahead'] in (True, False))
        pflops = count_pflops(h, last['steps'], tested, len(train_loader.classes))
    """,
    airbench96="""
        known = ('flip', 'translate')
    """,
)
SCRIPTS = ('airbench94', *OWN)


def pieces(source):
    """
    The script's top-level statements: (section, name, first line's number, lines with the comments
    above them).
    """
    lines, section, end = source.splitlines(), 'header', 0
    for node in ast.parse(source).body:
        text = lines[end : node.end_lineno]
        titles = [
            banner[1]
            for line in text
            if len(line) == 100 and (banner := re.match(r'# -+ (.+) -+$', line))
        ]
        section = titles[-1] if titles else section
        if end == 0:
            name = 'docstring'
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
        else:
            name = lines[node.lineno - 1]
        yield section, name, end + 1, text
        end = node.end_lineno


def read(script):
    return (ROOT / f'{script}.py').read_text()


def first_difference(script, source):
    """
    Where a script of this source differs from airbench94.py though it should not; None where it
    does so nowhere.
    """
    ours, theirs = (
        [piece for piece in pieces(text) if piece[1] not in OWN[script]]
        for text in (source, read('airbench94'))
    )
    for one, other in itertools.zip_longest(ours, theirs, fillvalue=('', '', 0, [])):
        for i, (a, b) in enumerate(itertools.zip_longest(one[3], other[3])):
            if a != b:
                return (
                    f'section {one[0]!r}: {script}.py:{one[2] + i} {a!r}, '
                    f'airbench94.py:{other[2] + i} {b!r}'
                )
    return None


@pytest.mark.parametrize('script', OWN)
def test_what_is_shared_is_the_same_to_the_letter(script):
    assert first_difference(script, read(script)) is None


def test_the_scripts_that_compile_do_it_alike():
    compiled, muon = (
        {name: text for _, name, _, text in pieces(read(script)) if name in COMPILING}
        for script in ('airbench94_compiled', 'airbench94_muon')
    )
    assert len(compiled) == len(COMPILING) - 1  # of the two imports from contextlib it has one
    assert compiled.pop('image_sizes') != muon.pop('image_sizes') and compiled == muon


@pytest.mark.parametrize('script', LEFT_OUT)
def test_the_scripts_have_all_else_of_airbench94(script):
    """Without comments and docstrings."""

    def code_of(function, script):
        (node,) = (
            node for node in ast.parse(read(script)).body if getattr(node, 'name', '') == function
        )
        first = node.body[1 if ast.get_docstring(node) else 0]
        lines = read(script).splitlines()[first.lineno - 1 : node.end_lineno]
        lines = [line.strip() for line in lines]
        return [line for line in lines if line and not line.startswith('#')]

    missing = []
    for function in ('train', 'warmup', 'merge', 'run_once', 'parse_arguments', 'CifarLoader'):
        wanted = code_of(function, 'airbench94')
        matcher = difflib.SequenceMatcher(None, wanted, code_of(function, script), autojunk=False)
        for kind, first, last, _, _ in matcher.get_opcodes():
            if kind != 'equal':
                missing += wanted[first:last]
    assert missing == [line.strip() for line in LEFT_OUT[script].strip().splitlines()]


@pytest.mark.parametrize('script', OWN)
def test_a_change_to_any_shared_section_is_found(script):
    """In the last shared statement of each section."""
    source = read(script)
    shared = {piece[0]: piece for piece in pieces(source) if piece[1] not in OWN[script]}
    # Of 8, hyp is each script's own, and those that compile train in their own way.
    assert len(shared) == (6 if 'compiled_net' in OWN[script] else 7)
    for section, _, number, text in shared.values():
        lines, last = source.splitlines(), number + len(text) - 1
        lines[last - 1] += '  # changed'
        assert f'section {section!r}: {script}.py:{last} ' in first_difference(
            script, '\n'.join(lines)
        )


@pytest.mark.parametrize('script', SCRIPTS)
def test_no_line_is_long_or_holds_two_statements(script):
    source = read(script)
    assert max(map(len, source.splitlines())) <= 100
    statements = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    assert len(statements) == len(set(statements))


def test_the_sections_are_in_order():
    sections = [
        section
        for section, _ in itertools.groupby(piece[0] for piece in pieces(read('airbench94')))
    ]
    assert sections == [
        'header',
        'Hyperparameters',
        'Data',
        'Network',
        'Optimisation',
        'Evaluation',
        'Training',
        'Harness',
    ]


@pytest.mark.parametrize('script', OWN)
def test_the_diff_is_short(script):
    diff = subprocess.run(
        ['diff', ROOT / 'airbench94.py', ROOT / f'{script}.py'], capture_output=True, text=True
    )
    assert 0 < len(re.findall(r'^[<>]', diff.stdout, re.MULTILINE)) <= MOST_LINES[script]


@pytest.mark.parametrize(
    'script, changes',
    [
        ('airbench94_compiled', dict(compile=True)),
        ('airbench95', dict(widths=(128, 384, 384), lr=10.0, epochs=15.0)),
        (
            'airbench96',
            dict(
                widths=(128, 512, 512),
                lr=9.0,
                epochs=40.0,
                aug=dict(flip=True, translate=4, cutout=12),
            ),
        ),
    ],
)
def test_hyperparameters(script, changes):
    assert importlib.import_module(script).hyp == {
        **importlib.import_module('airbench94').hyp,
        **changes,
    }


@pytest.mark.parametrize(
    'script, pflops', [('airbench94', 0.36), ('airbench95', 1.37), ('airbench96', 7.33)]
)
def test_compute(script, pflops):
    module = importlib.import_module(script)
    steps = math.ceil(module.hyp['epochs'] * 48)
    assert module.count_pflops(module.hyp, steps, 10_000) == pytest.approx(pflops, abs=0.005)


@pytest.mark.parametrize('script', SCRIPTS)
def test_each_script_trains_and_logs_alike(script, tiny, capsys, passed_through):
    """A new network has its first layer whitened."""
    module, history = importlib.import_module(script), []
    loader = module.CifarLoader(tiny, train=True, batch_size=100, aug=module.hyp['aug'])
    net = module.train(
        loader, epochs=1, seed=0, widths=(8, 8, 8), dtype=torch.float32, callback=keep(history)
    )
    assert [row['epoch'] for row in history] == [1, 'eval'] and len(
        capsys.readouterr().out.splitlines()
    ) == 3
    assert history[0]['val_acc'] == pytest.approx(
        module.evaluate(net, module.CifarLoader(tiny, train=False)), abs=0.03
    )
    convolutions = [layer for layer in net.modules() if isinstance(layer, torch.nn.Conv2d)]
    # Else each call would bring them into this order anew.
    assert all(
        layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in convolutions
    )
    fresh = module.Net(module.hyp | dict(widths=(8, 8, 8)))
    module.init_whitening(fresh, loader.normalize(loader.images[:5000]))
    # The sign of an eigenvector is the library's choice.
    torch.testing.assert_close(net.whiten.weight.abs(), fresh.whiten.weight.abs())


def test_cutout_is_a_square_wholly_inside_and_everywhere(tiny):
    import airbench96

    torch.manual_seed(0)
    loader = airbench96.CifarLoader(tiny, True, 100, dict(cutout=12), shuffle=False)
    loader.images, loader.labels, loader.batch_size = (
        torch.rand(3000, 3, 32, 32) + 1,
        torch.zeros(3000),
        3000,
    )
    images, (out, _) = loader.normalize(loader.images), next(iter(loader))
    holes = out == 0
    assert torch.equal(out, images.masked_fill(holes, 0)) and (holes == holes[:, :1]).all()
    rows, columns = holes[:, 0].any(2), holes[:, 0].any(1)
    assert (
        (rows.sum(1) == 12).all()
        and (columns.sum(1) == 12).all()
        and (holes[:, 0].sum((1, 2)) == 144).all()
    )
    tops, lefts = rows.int().argmax(1), columns.int().argmax(1)
    for corners in (tops, lefts):
        counts = corners.bincount(minlength=21)
        assert len(counts) == 21 and counts.min() > 90  # 143 expected of each
    assert abs(torch.corrcoef(torch.stack((tops, lefts)).float())[0, 1]) < 0.06


def test_cutout_is_the_loaders_last_step_and_fresh(tiny):
    import airbench94
    import airbench96

    loader = airbench96.CifarLoader(
        tiny, True, 100, dict(flip=True, translate=4, cutout=12), shuffle=False
    )
    epochs = [torch.cat([inputs for inputs, _ in loader]) for _ in range(3)]
    holes = [(epoch == 0).all(1) for epoch in epochs]
    assert all((hole.sum((1, 2)) == 144).all() for hole in holes)
    assert not torch.equal(holes[0], holes[2]) and not torch.equal(holes[0].flip(-1), holes[1])
    with pytest.raises(ValueError, match='cutout'):
        airbench94.CifarLoader(tiny, True, 100, dict(cutout=12))


def test_third_convolution_and_residual():
    import airbench96

    block = airbench96.Block(24, 32, 0.4).eval()
    x = torch.randn(2, 24, 8, 8)
    first = F.gelu(block.norm1(F.max_pool2d(F.conv2d(x, block.conv1.weight, padding=1), 2)))
    y = F.gelu(block.norm2(F.conv2d(first, block.conv2.weight, padding=1)))
    y = F.gelu(block.norm3(F.conv2d(y, block.conv3.weight, padding=1)))
    torch.testing.assert_close(block(x), first + y)
    assert len(airbench96.Net().blocks) == 3
    torch.testing.assert_close(
        block.conv3(x.repeat(1, 2, 1, 1)[:, :32]), x.repeat(1, 2, 1, 1)[:, :32]
    )
