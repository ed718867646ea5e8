"""results/plot.py: both figures from tiny logs, and that what they show is what the logs say."""

import subprocess
import sys

import pytest
from conftest import ROOT
from test_summarize import write_log

matplotlib = pytest.importorskip(
    'matplotlib', reason='the figures need matplotlib: pip install matplotlib'
)
sys.path.insert(0, str(ROOT / 'results'))
import plot  # noqa: E402

HYP = dict(epochs=1.5, batch_size=1000, tta_level=2)  # 75 steps


def a_run(seed, val_acc, tta_val_acc):
    return dict(
        type='run',
        seed=seed,
        diverged=tta_val_acc is None,
        val_acc=val_acc,
        tta_val_acc=tta_val_acc,
        seconds=1.0,
        pflops=285.0,
    )


@pytest.fixture
def logs(tmp_path):
    runs = [a_run(0, [0.5, 0.8], 0.9), a_run(1, [0.7, 0.9], 0.92), a_run(2, [0.6], None)]
    return [
        write_log(tmp_path / 'a.jsonl', runs, hyperparameters=HYP),
        write_log(
            tmp_path / 'b.jsonl',
            [a_run(7, [0.55, 0.85], 0.95)],
            hyperparameters=HYP,
            script='airbench95',
        ),
    ]


def test_both_figures_are_drawn(logs, tmp_path, capsys):
    assert plot.main([*logs, '--out', str(tmp_path / 'out')]) == 0
    accuracy, distribution = (
        tmp_path / 'out' / 'accuracy.svg',
        tmp_path / 'out' / 'distribution.svg',
    )
    assert capsys.readouterr().out.split() == [str(accuracy), str(distribution)]
    # Each text is drawn as a path, after a comment that holds it.
    for text in ('airbench94.py, 2 runs', 'airbench95.py, 1 run', 'PFLOPs spent', 'the paper, 96'):
        assert f'<!-- {text} -->' in accuracy.read_text(), text
    for text in ('mean 91.00%, its 95% interval 78.29 to 103.71%', 'runs'):  # 1 and t(1) = 12.706
        assert f'<!-- {text} -->' in distribution.read_text(), text


def test_the_lines_are_those_of_the_logs(logs):
    header, runs = plot.summarize.read_logs(logs[:1])
    runs = runs[:2]
    # 225,000 views of training images and 60,000 of test images share 285 PFLOPs; the first epoch
    # has 50 of 75 steps.
    assert plot.pflops_by_epoch(header, runs[0]) == pytest.approx([150, 225])
    import matplotlib.pyplot as plt

    (axes,) = plot.plot_accuracy(plt, [(header, runs)]).axes
    line, final = axes.lines[:2]
    assert list(line.get_xdata()) == pytest.approx([150, 225]) and list(
        line.get_ydata()
    ) == pytest.approx([40, 15])
    assert (list(final.get_xdata()), list(final.get_ydata())) == ([285], pytest.approx([9]))
    low, high = axes.collections[0].get_datalim(axes.transData).intervaly
    assert (low, high) == pytest.approx((10, 50))
    bars = plot.plot_distribution(plt, header, runs).axes[0].patches
    counts = {
        round(bar.get_x() + bar.get_width() / 2, 2): bar.get_height()
        for bar in bars
        if bar.get_height()
    }
    assert counts == {90.0: 1, 92.0: 1}


def test_the_compute_of_crops(logs):
    """
    Of airbench94_muon.py: by the epoch, what its own count says of so many steps of each size.
    """
    import airbench94_muon as script

    hyp = script.hyp | dict(epochs=2.0)  # 50 steps: 20 of 24 pixels, 15 of 28, 15 of 32
    run = a_run(0, [0.5, 0.8], 0.9) | dict(pflops=script.count_pflops(hyp, 50, 10_000))
    header = dict(hyperparameters=hyp)
    count = {
        size: script.count_pflops(hyp | dict(crops=((size, 1.0),)), 1, 0) for size in (24, 28, 32)
    }
    training = 20 * count[24] + 15 * count[28] + 15 * count[32]
    assert plot.pflops_by_epoch(header, run) == pytest.approx(
        [20 * count[24] + 5 * count[28], training]
    )
    assert training + script.count_pflops(hyp, 0, 10_000) == pytest.approx(run['pflops'])
    shorter = run | dict(steps=[10, 50, 50])  # passes over a part, and the evaluation's row
    assert plot.pflops_by_epoch(header, shorter) == pytest.approx([10 * count[24], training])


def test_its_faults(tmp_path, capsys, logs):
    synthetic = write_log(tmp_path / 'c.jsonl', [a_run(0, [0.5], 0.5)], hyperparameters=HYP)
    (tmp_path / 'c.jsonl').write_text(
        (tmp_path / 'c.jsonl').read_text().replace('false', 'true', 1)
    )
    other = write_log(
        tmp_path / 'd.jsonl', [dict(type='run', seed=0, diverged=False, tta_val_acc=0.5, seconds=1)]
    )
    for files, word in (
        ([str(tmp_path / 'none')], 'No such file'),
        ([synthetic], 'synthetic'),
        ([other], 'not a log'),
    ):
        assert plot.main([*files, '--out', str(tmp_path / 'out')]) == 2
        out, err = capsys.readouterr()
        assert (
            out == ''
            and len(err.splitlines()) == 1
            and word in err
            and not (tmp_path / 'out').exists()
        )
    code = (
        'import sys; sys.modules["matplotlib"] = None; '
        f'sys.path[:0] = [{str(ROOT / "results")!r}]; '
        'import plot; sys.exit(plot.main([]))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        'plot: error: there is no matplotlib: pip install matplotlib\n',
    )
