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
        pflops=0.5,
    )


@pytest.fixture
def logs(tmp_path):
    runs = [a_run(0, [0.5, 0.8], 0.94), a_run(1, [0.7, 0.9], 0.96), a_run(2, [0.6], None)]
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
    for text in ('airbench94.py', 'airbench95.py', 'the paper', 'hlb-CIFAR10'):
        assert f'<!-- {text} -->' in accuracy.read_text(), text
    for text in ('mean 95.00%, its 95% interval 82.29 to 107.71%', 'runs'):  # 1 and t(1) = 12.706
        assert f'<!-- {text} -->' in distribution.read_text(), text


def test_points_far_from_the_published_ones_are_seen_too(tmp_path):
    """As of a small network that is trained for a moment, or of a large one for days."""
    import matplotlib.pyplot as plt

    logs = []
    for script, accuracy, pflops in (
        ('airbench94', 0.86, 0.03),
        ('airbench96', 0.98, 70.0),
        ('mine', 0.5, 0.001),  # which is not drawn
    ):
        runs = [dict(a_run(seed, [0.8], accuracy), pflops=pflops) for seed in (0, 1)]
        log = write_log(tmp_path / script, runs, hyperparameters=HYP, script=script)
        logs.append(plot.summarize.read_logs([log]))
    (axes,) = plot.plot_accuracy(plt, logs).axes
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert 0.01 < left < 0.03 and 70 < right and 85 < bottom < 86 and 98 < top


def test_the_points_are_those_of_the_logs(logs):
    header, runs = plot.summarize.read_logs(logs[:1])
    runs = runs[:2]
    import matplotlib.pyplot as plt

    (axes,) = plot.plot_accuracy(plt, [(header, runs)]).axes
    published = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines[:-2]]
    assert published == [(pflops, accuracy) for pflops, accuracy, *_ in plot.PUBLISHED]
    interval, point = axes.lines[-2:]
    assert (list(point.get_xdata()), list(point.get_ydata())) == ([0.5], pytest.approx([95]))
    assert list(interval.get_ydata()) == pytest.approx([82.29, 107.71], abs=0.01)
    bars = plot.plot_distribution(plt, header, runs).axes[0].patches
    counts = {
        round(bar.get_x() + bar.get_width() / 2, 2): bar.get_height()
        for bar in bars
        if bar.get_height()
    }
    assert counts == {94.0: 1, 96.0: 1}


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
        ([other], 'without PFLOPs'),
    ):
        assert plot.main([*files, '--out', str(tmp_path / 'out')]) == 2
        out, err = capsys.readouterr()
        assert (
            out == ''
            and len(err.splitlines()) == 1
            and word in err
            and not (tmp_path / 'out').exists()
        )
    with pytest.raises(SystemExit, match='2'):  # results/ keeps its figures
        plot.main([*logs, '--out', str(ROOT / 'tests' / '..' / 'results')])
    assert '--out' in capsys.readouterr().err.splitlines()[-1]
    mine = write_log(tmp_path / 'mine.jsonl', [a_run(0, [0.5], 0.9)], script='mine')
    assert plot.main([mine, '--out', str(tmp_path / 'out')]) == 2
    assert 'no log is of a script that is drawn: airbench94' in capsys.readouterr().err
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
