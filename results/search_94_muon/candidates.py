"""
What the searches for 94% and 95% by Muon are to try next, as changes of search.py's `base`.

    python results/search_94_muon/candidates.py 94 SEED ROUNDS >> QUEUE

prints a queue for search.py: each candidate once a round, every run with its own seed, from SEED
on. `python results/gpu.py search` runs as many as fit into its seconds on a GPU, several at a time.
"""

import json
import sys

# The recipe of airbench94_muon.py, at the compute that the search is to reach.
V = dict(
    budget=0.19,
    moved_crops=True,
    one_bias_lr=True,
    pool_first=[0, 0, 1],
    tta_share=0.125,
    mids=[48, 144, 384],
    widths=[72, 288, 384],
    kernels=[[2, 2], [3, 3], [3, 3]],
    stages=[[0.4, 24, 'crop'], [0.3, 28, 'crop'], [0.3, 32, 'none']],
)


def reduced(*stages, last=32):
    """V with whole images reduced: stages of (share of the steps, pixels), then 32 pixels."""
    rest = 1 - sum(share for share, _ in stages)
    end = [round(rest, 2), last, 'none' if last == 32 else 'bilinear']
    return V | dict(stages=[*([*stage, 'bilinear'] for stage in stages), end])


R = reduced((0.4, 24), (0.3, 28))
NARROW = dict(mids=[48, 128, 384], widths=[64, 256, 384])
T = dict(
    mids=[64, 192, 512],
    widths=[96, 256, 512],
    kernels=[[2, 2], [2, 3], [2, 2]],
    pools=['2x2', 'ceil', 'ceil'],
)
FEWER = dict(prune=[0.35, 0.4])  # easy images every other time

FOR_94 = {
    'V': V,
    'whole images of 24, 28, 32 px': R,
    '20, 28, 32 px': reduced((0.4, 20), (0.3, 28)),
    '24, 32 px': reduced((0.55, 24)),
    '20, 26, 32 px': reduced((0.35, 20), (0.35, 26)),
    '16, 24, 32 px': reduced((0.25, 16), (0.4, 24)),
    '24, 28, 36 px': reduced((0.4, 24), (0.4, 28), last=36),
    'narrower': R | NARROW,
    'fewer easy images': R | FEWER,
    'narrower, fewer easy images': R | NARROW | FEWER,
    'T': R | T,
    'T, fewer easy images': R | T | FEWER,
    'normalised by 500': R | dict(ghost=500),
    "Hiverge's Muon": R
    | dict(muon_lr=0.21, muon_momentum=0.655, ns_coefficients=[3.4576, -4.7391, 2.0843]),
    'lr by a power of 1.3': R | dict(lr_power=1.3),
    'block 1 frozen after 70%': R | dict(freeze=0.7),
    'label smoothing 0.15': R | dict(label_smoothing=0.15),
    'cutout 6': R | dict(cutout=6),
    'dropout': R | dict(dropout=0.1),
    'filters normalised every 8 steps': R | dict(renorm=8),
    'translation by 3': R | dict(translate=3),
}

# The recipe scaled: 1.33 times the channels, and a compute that gives it 27 epochs.
WIDE = R | dict(budget=0.7, mids=[64, 192, 512], widths=[96, 384, 512])

FOR_95 = {
    'wide': WIDE,
    'wide, 0.55 PFLOPs': WIDE | dict(budget=0.55),
    'wide, translation by 3': WIDE | dict(translate=3),
    'wide, translation by 4': WIDE | dict(translate=4),
    'wide, cutout 8': WIDE | dict(cutout=8),
    'wide, translation by 3, cutout 8': WIDE | dict(translate=3, cutout=8),
    'wide, fewer easy images': WIDE | FEWER,
    'wide, label smoothing 0.15': WIDE | dict(label_smoothing=0.15),
    'wide, Muon lr 0.2': WIDE | dict(muon_lr=0.2),
    'wide, 20, 28, 32 px': WIDE | dict(stages=reduced((0.4, 20), (0.3, 28))['stages']),
    'wider': WIDE | dict(mids=[64, 224, 640], widths=[96, 448, 640]),
    'narrower': WIDE | dict(mids=[64, 160, 448], widths=[80, 320, 448]),
}

CANDIDATES = {'94': FOR_94, '95': FOR_95}


def queue(candidates, seed, rounds):
    """Lines for search.py."""
    lines = []
    for _ in range(rounds):
        for changes in candidates.values():
            lines.append(json.dumps(changes | dict(seed=seed)))
            seed += 1
    return lines


if __name__ == '__main__':
    print('\n'.join(queue(CANDIDATES[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3]))))
