"""The one table of cases that every backend runs."""

from __future__ import annotations

import operator
from functools import reduce
from itertools import combinations
from typing import Any

from cases import BSHD, EXPANDED, LAYOUTS, PARAMETERS, PLAIN, Case, causal, packed

# Sizes that meet, or just miss, the ends of query panels (8..64), key blocks (64..256) and backward blocks (64..128).
LENGTHS = (1, 2, 5, 7, 8, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 197, 255, 257, 300)
WIDTHS = (1, 2, 3, 5, 8, 16, 17, 32, 33, 40, 64, 80, 96, 128, 129, 160, 256, 300)

SMALL = (2, 4, 2, 19, 23, 8, 8)
TILES = (1, 2, 1, 70, 150, 16, 24)
BROADCASTS = tuple("".join(c for n, c in enumerate("bhqk") if bits >> n & 1) for bits in range(16))

TABLE = (
    Case((2, 3, 3, 5, 7, 4, 4)),
    Case(SMALL),
    Case(TILES),
    Case((1, 1, 1, 1, 300, 64, 64)),
    Case((1, 1, 1, 300, 1, 64, 64)),
    Case((1, 2, 2, 129, 257, 40, 33)),
    Case((3, 6, 1, 9, 65, 17, 5), seed=1),
    Case((2, 8, 2, 1, 130, 32, 32), seed=2),
    # Scales, and scores far apart.
    Case(SMALL, scale=0.0),
    Case(SMALL, scale=-0.5),
    Case(TILES, gain=8.0),
    Case(TILES, scale=3.0, shift=5.0),
    # Positions.
    causal(SMALL),
    causal(TILES),
    Case(TILES, right=0),
    causal((1, 2, 2, 197, 197, 32, 32)),
    causal((1, 1, 1, 300, 100, 16, 16)),
    Case((1, 1, 1, 150, 70, 16, 16), right=0, q_start=-40),
    Case(TILES, right=0, q_start=1000),
    Case(TILES, right=0, q_start=-1000),
    Case(TILES, left=20, right=0, q_start=80),
    Case(TILES, left=0, q_start=30),
    Case(TILES, left=5, right=70, q_start=-10),
    Case(TILES, left=-3, right=40, q_start=20),
    Case(TILES, left=2, right=-5),
    Case((3, 2, 2, 33, 90, 8, 8), right=0, q_starts=(57, -3, 20)),
    Case((3, 2, 1, 33, 90, 8, 8), left=17, right=3, q_starts=(0, 100, -200)),
    # Lengths, beyond their range too.
    Case((4, 2, 1, 70, 150, 16, 16), k_lengths=(150, 0, 65, 1)),
    Case((4, 2, 2, 70, 70, 16, 16), q_lengths=(0, 70, 64, 33)),
    Case(
        (4, 2, 2, 20, 30, 8, 8), q_lengths=(-5, 99, 20, 3), k_lengths=(7, -1, 31, 12), right=0, q_starts=(4, 0, 10, 9)
    ),
    Case((3, 2, 1, 130, 140, 16, 16), q_lengths=(130, 65, 1), k_lengths=(129, 140, 64), left=50, right=0, q_start=10),
    # Masks and biases of every shape that broadcasts.
    *(Case((2, 4, 2, 19, 23, 4, 4), mask=shape, seed=n) for n, shape in enumerate(BROADCASTS)),
    *(Case((2, 4, 2, 19, 23, 4, 4), bias=shape, wide_bias=n % 3 == 0, seed=n) for n, shape in enumerate(BROADCASTS)),
    Case(TILES, mask="qk"),
    Case((2, 2, 2, 70, 150, 16, 16), mask="bk", right=0, q_start=80),
    Case(TILES, bias="hqk", holes=0.3),
    Case(TILES, bias="hqk", wide_bias=True, left=70, right=0, q_start=80),
    Case((2, 2, 1, 130, 130, 8, 8), bias="k", mask="q", right=0),
    Case(
        (2, 2, 2, 70, 150, 16, 16), bias="bhqk", mask="bhqk", holes=0.1, k_lengths=(140, 65), q_lengths=(70, 9), left=90
    ),
    Case((2, 2, 2, 40, 70, 8, 8), bias="qk", mask="bhqk", layouts=(PLAIN,) * 4 + ("bhds", "strided")),
    Case((2, 2, 2, 40, 70, 8, 8), bias="bhqk", mask="bhqk", layouts=(PLAIN,) * 4 + ("expand_s", "expand_d")),
    Case((2, 2, 2, 40, 70, 8, 8), bias="bhqk", mask="bhqk", layouts=(PLAIN,) * 4 + ("overlap", "scalar")),
    # Long enough for several groups of keys in backward.
    Case((2, 2, 1, 33, 1100, 8, 8), k_lengths=(1100, 600)),
    causal((1, 1, 1, 130, 1300, 8, 12), bias="k"),
    Case((1, 3, 1, 600, 700, 5, 8), mask="hk", left=300, right=200),
    # Layouts.
    *(Case((2, 4, 2, 35, 70, 24, 24), layouts=(layout,), right=0, q_start=35) for layout in LAYOUTS[1:] + EXPANDED),
    Case((2, 2, 2, 35, 70, 17, 9), layouts=(BSHD, "bhds", "strided", "scalar")),
    Case((2, 2, 2, 35, 70, 17, 9), layouts=("strided", "expand_b", "packed", BSHD)),
)

# Each feature of the scores, alone.
FEATURES: dict[str, dict[str, Any]] = {
    "scales": {"scales": "h"},
    "cosine": {"similarity": "cosine", "scale": 5.0},
    "gaussian": {"similarity": "gaussian", "scale": 0.2},
    "softcap": {"softcap": 2.0, "gain": 3.0},
    "sinks": {"sinks": "h"},
    "slopes": {"slopes": "h"},
    "table": {"table": "h", "t5": True},
    "tiles": {"tiles": "bh"},
    "hard": {"normalizer": "hard"},
    "dropout": {"dropout_p": 0.3},
}
PAIRS = [pair for pair in combinations(FEATURES, 2) if pair != ("cosine", "gaussian")]
PARAMETERS_OF_ALL = {"bias": "hqk", "scales": "bh", "sinks": "h", "slopes": "bh", "table": "h"}
TOGETHER = PARAMETERS_OF_ALL | {"softcap": 3.0, "gain": 2.0, "tiles": "bh", "mask": "bqk", "dropout_p": 0.2}


def together(*names: str) -> dict[str, Any]:
    """The options of several of FEATURES at once; a factor for each head takes the place of one for all."""
    options = reduce(operator.or_, (FEATURES[name] for name in names))
    return {name: x for name, x in options.items() if name != "scale" or "scales" not in options}


LENGTHS_OF_PACKED = ((70, 130), (0, 5), (1, 1), (33, 0), (19, 65))
WITH_FEATURES = (
    *(Case(SMALL, **options, seed=n) for n, options in enumerate(FEATURES.values())),
    *(Case(TILES, **options, right=0, q_start=83, seed=n) for n, options in enumerate(FEATURES.values())),
    *(
        Case((3, 4, 2, 33, 90, 8, 8), **options, bias="bhqk", holes=0.2, left=40, q_starts=(57, -3, 20), seed=n)
        for n, options in enumerate(FEATURES.values())
    ),
    *(
        packed((4, 2), (16, 8), *LENGTHS_OF_PACKED, **options, outside=n % 3, seed=n)
        for n, options in enumerate(FEATURES.values())
    ),
    *(Case((2, 2, 1, 35, 70, 8, 8), **together(one, other), right=3, q_start=31) for one, other in PAIRS),
    # One query, or few, with many keys.
    *(
        Case((2, 8, 2, 1, 300, 16, 12), **options, k_lengths=(300, 65), seed=n)
        for n, options in enumerate(FEATURES.values())
    ),
    *(Case((2, 8, 2, 1, 70, 5, 6), layouts=(layout,), seed=3) for layout in LAYOUTS + EXPANDED),
    *(Case((1, 6, 2, n, 1300, 8, 8), **TOGETHER, q_start=1300 - n, right=0, seed=n) for n in (1, 2, 3)),
    packed((8, 2), (8, 8), (1, 700), (1, 1), (1, 130), (1, 0), **TOGETHER, right=0, q_starts=(699, 0, 129, 0)),
    # Every shape and dtype of the parameters, and a table of any distances, near and far.
    *(Case(SMALL, **{name: "bh"}, wide=n % 2 == 0, seed=n) for n, name in enumerate(PARAMETERS[1:])),
    *(Case(TILES, **{name: "h"}, wide=True, seed=n) for n, name in enumerate(PARAMETERS[1:])),
    Case(SMALL, table="bh", wide=True, reach=0),
    Case(TILES, table="h", reach=300, q_start=11),
    Case(TILES, table="h", reach=17, q_start=-100),
    Case((2, 2, 2, 70, 150, 8, 8), table="h", slopes="h", reach=64, k_lengths=(150, 65), q_lengths=(70, 3), right=5),
    Case((1, 1, 1, 130, 1300, 8, 12), slopes="h", table="h", reach=1000, t5=True, q_start=1170, right=0),
    Case(TILES, slopes="h", q_start=5000),
    # Blocks that are the same for all sequences, or heads; with other masks; where tiles end early.
    *(Case((2, 4, 2, 129, 200, 8, 8), tiles=shape, seed=n) for n, shape in enumerate(("", "b", "h", "bh"))),
    Case((2, 2, 1, 64, 128, 8, 8), tiles="bh", bias="hqk"),
    Case((2, 2, 1, 65, 300, 8, 8), tiles="h", right=0, q_start=235, k_lengths=(300, 129)),
    # Sinks, where some queries see nothing else and some are not there.
    Case((2, 2, 1, 70, 150, 8, 8), sinks="bh", right=0, q_start=-20, q_lengths=(70, 40)),
    Case((2, 2, 1, 5, 0, 4, 4), sinks="h"),
    Case((2, 2, 1, 5, 7, 4, 4), sinks="h", k_lengths=(0, 7), normalizer="hard"),
    Case((2, 2, 1, 5, 7, 4, 0), sinks="h", scales="h"),
    # Other factors, caps and probabilities.
    Case(SMALL, scales="h", similarity="cosine"),
    Case(SMALL, scales="bh", similarity="gaussian"),
    Case(TILES, similarity="gaussian"),
    Case(SMALL, similarity="cosine", scale=-2.0),
    Case(TILES, softcap=30.0, gain=8.0),
    Case(SMALL, softcap=0.1, gain=2.0),
    Case(SMALL, dropout_p=1.0),
    Case(SMALL, dropout_p=1e-9),
    Case(TILES, dropout_p=0.9, seeds=True),
    Case((3, 2, 1, 130, 140, 8, 8), dropout_p=0.5, seeds=True, q_lengths=(130, 65, 1), k_lengths=(129, 140, 64)),
    # Packed sequences with positions, lengths and every feature of their own.
    packed((2, 1), (8, 8), (70, 70), (1, 1), (200, 200), right=0),
    packed((2, 2), (8, 8), (5, 9), (64, 64), (65, 130), left=20, right=0, q_starts=(4, 0, 65), outside=3),
    packed((4, 1), (8, 8), (1, 100), (1, 300), (1, 5), layouts=(BSHD,), bias="bhk"),
    packed((2, 2), (8, 8), (40, 70), (9, 20), mask="bhqk", bias="hqk", q_lengths=(33, 99), k_lengths=(65, 7)),
    packed((2, 1), (8, 8), (70, 130), (3, 64), bias="qk", layouts=("packed", "strided", "bhds", PLAIN)),
    packed((4, 2), (8, 8), (70, 130), (0, 5), (35, 64), **TOGETHER, similarity="gaussian", right=0, seeds=True),
    packed((2, 2), (4, 4), (0, 0), (0, 0), bias="bh", outside=2),
    # All at once.
    *(Case((2, 4, 2, 70, 150, 8, 8), **TOGETHER, similarity=kind, right=20) for kind in ("dot", "cosine", "gaussian")),
    Case((2, 4, 2, 70, 150, 8, 8), **TOGETHER, normalizer="hard", left=90, q_starts=(70, 10)),
    Case(
        (2, 2, 2, 40, 300, 8, 12), **TOGETHER, wide=True, wide_bias=True, holes=0.3, q_lengths=(40, 9), layouts=(BSHD,)
    ),
    # Nothing of anything.
    Case((0, 2, 1, 5, 7, 4, 4), **TOGETHER),
    Case((2, 0, 0, 5, 7, 4, 4), **TOGETHER),
    Case((2, 2, 1, 0, 7, 4, 4), **TOGETHER),
    Case((2, 2, 1, 5, 0, 4, 4), **TOGETHER, similarity="gaussian"),
    Case((2, 2, 1, 5, 7, 0, 4), **TOGETHER, similarity="gaussian"),
    Case((2, 2, 1, 5, 7, 0, 4), **TOGETHER, similarity="cosine"),
    Case((2, 2, 1, 5, 7, 4, 0), **TOGETHER),
)
TABLE += WITH_FEATURES

# Nothing to attend to, nothing to ask, or nothing at all.
EMPTY = (
    Case((0, 2, 2, 5, 7, 4, 4)),
    Case((2, 0, 0, 5, 7, 4, 4)),
    Case((2, 0, 2, 5, 7, 4, 4)),
    Case((1, 0, 16, 600, 600, 8, 8), k_lengths=(600,)),
    Case((2, 2, 1, 0, 7, 4, 4)),
    Case((2, 2, 1, 5, 0, 4, 4)),
    Case((2, 2, 1, 0, 0, 4, 4)),
    Case((2, 2, 1, 5, 7, 0, 4)),
    Case((2, 2, 1, 5, 7, 4, 0)),
    Case((2, 2, 1, 5, 7, 0, 0), right=0),
    Case((2, 2, 1, 70, 150, 0, 3), scale=0.5, bias="qk"),
    Case((0, 2, 2, 5, 7, 4, 4), bias="bhqk", mask="bhqk", q_lengths=(), k_lengths=(), q_starts=(), right=0),
    Case((0, 2, 2, 5, 7, 4, 4), bias="hqk"),
    Case((2, 2, 1, 5, 0, 4, 4), bias="bhqk", mask="bhqk"),
    Case((2, 2, 1, 5, 0, 4, 4), bias="hq", mask="bq"),
    Case((2, 2, 1, 0, 7, 4, 4), bias="bhqk", mask="bhqk"),
    Case((2, 2, 1, 0, 7, 4, 4), bias="k", mask="b"),
    Case((2, 2, 1, 5, 7, 4, 4), k_lengths=(0, 0)),
    Case((2, 2, 1, 5, 7, 4, 4), q_lengths=(0, 0)),
    Case((2, 2, 1, 70, 150, 4, 4), right=0, q_start=-1000),
    Case((2, 2, 1, 70, 150, 4, 4), bias="bhqk", holes=1.0),
    Case((2, 2, 1, 70, 70, 4, 4), left=-1, right=0),
    *(Case((2, 2, 1, 5, 0, 4, 4), **options) for name, options in FEATURES.items() if name != "sinks"),
    *(
        Case((2, 2, 1, 70, 9, 4, 4), right=0, q_start=-70, **options)
        for name, options in FEATURES.items()
        if name != "sinks"
    ),
    packed((2, 1), (4, 4), (3, 0), (0, 7), (5, 0), outside=1),
    *(Case((2, 2, 1, 5, 0, 4, 4), layouts=(layout,)) for layout in ("bshd", "strided", "scalar")),
    *(Case((2, 2, 1, 5, 7, 0, 4), layouts=(layout,)) for layout in ("bhds", "expand_d", "scalar")),
    *(Case((2, 2, 1, 5, 7, 4, 0), layouts=(layout,)) for layout in ("bhds", "expand_d", "scalar")),
)


# Bands of (left, right), for sweeps over the position of the first query.
WINDOWS = [(None, 0), (0, 0), (0, None), (None, 2), (2, None), (3, 1), (0, 4), (-1, 3), (4, -2), (9, 9)]
