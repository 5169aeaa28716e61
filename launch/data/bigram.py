"""The bigram entropy: the lowest loss of a model that sees only the previous token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from launch.data.corpus import CorpusError


def conditional_bigram_entropy(tokens: npt.ArrayLike) -> float:
    """H(x_t | x_{t-1}) of `tokens` [N >= 2] under their own exact pair counts, in nats per token.

    The loss of the best predictor that sees only the previous token and has the answers: with n_ab the count of the
    pair (a, b) and n_a that of a as a predecessor, (sum_a n_a log n_a - sum_ab n_ab log n_ab) / (N - 1) (Cover and
    Thomas, Elements of Information Theory, section 2.2).
    """
    ids = np.asarray(tokens, dtype=np.int64)
    if len(ids) < 2:
        raise CorpusError(f"an entropy of pairs needs at least 2 tokens, not {len(ids)}; add text to the corpus")
    width = int(ids.max()) + 1
    pairs = np.unique(ids[:-1] * width + ids[1:], return_counts=True)[1].astype(np.float64)
    firsts = np.unique(ids[:-1], return_counts=True)[1].astype(np.float64)
    return float((firsts @ np.log(firsts) - pairs @ np.log(pairs)) / (len(ids) - 1))
