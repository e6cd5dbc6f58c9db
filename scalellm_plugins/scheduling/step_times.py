"""How long a step of the engine takes, learnt from those that went by. Pure.

A step's duration is fitted as its pace times a sum of what its parts cost:

    a constant + decodes + tokens of context + tokens of the step, by segment of their number

The last is piecewise linear, because the first few hundred tokens of a step cost next to nothing
where the weights are read anyway, and all further ones arithmetic (the roofline; Williams et al.,
CACM 2009). No cost is negative: more work never makes a step shorter, whatever the noise says.

The costs are least squares of the *relative* error with forgetting: normal equations are summed
up, each observation weighing a little less than the one after it, and every few observations the
costs move towards their solution by coordinate descent. That is a few µs, and unlike elimination it
leaves alone what the data say nothing about (a prompt's cost while there is only decoding). The
pace is one factor for all of it, which follows a machine that became slower within some 50 steps,
long before the costs have. Outliers count less in both, as in Huber's estimator (Annals of
Mathematical Statistics 35, 1964); if everything is an outlier, what counts as one grows.
"""

from __future__ import annotations

KNOTS = (0, 16, 48, 128, 192, 256, 384, 512, 2048)
"""Where segments of a step's tokens begin: dense where a mixture touches more experts with each
token, and where cards turn from memory to arithmetic."""

RIDGE = 256
"""Tokens up to which a step is taken to last as long as one token's, and beyond which to grow with
them, until something is known: the knot where most cards turn. If all steps are alike, as when
every one is filled with prompts, this says what shorter ones will take, so that they are tried."""

FORGET = 1 - 1 / 256
"""What an observation keeps of its weight with each one after it."""

ENOUGH = 4
"""Observations before anything is predicted, or judged to be an outlier."""

_EVERY, _SWEEPS = 8, 2
"""Observations between two solutions, and passes of coordinate descent for each: 20 µs. The next
begins where the last one stopped, so that they converge together."""

_FOLLOW = 0.05
"""How much of an error the pace and the usual error take over."""

_OUTLIER = 3.0
"""In usual errors."""

_LEAST_ERROR = 0.01
"""The usual error never counts as less: a simulated machine has none."""

_CONSTANT, _DECODES, _CONTEXT, _SEGMENTS = range(4)
_SIZE = _SEGMENTS + len(KNOTS)
_HIGH = 1e100

Features = list[tuple[int, float]]


def _features(prefill: int, decodes: int, context: int) -> Features:
    """Index and value of those that are not 0."""
    found: Features = [(_CONSTANT, 1)]
    if decodes:
        found.append((_DECODES, decodes))
    if context:
        found.append((_CONTEXT, context))
    tokens = prefill + decodes
    index = _SEGMENTS
    for low, high in zip(KNOTS, (*KNOTS[1:], tokens), strict=True):
        if tokens <= high:
            found.append((index, tokens - low))
            break
        found.append((index, high - low))
        index += 1
    return found


class StepTimes:
    """A model of the step's duration by what is in it. 9 µs per observation, 2 per prediction."""

    def __init__(self) -> None:
        self.seen = 0
        """Steps observed."""
        self._pace = 1.0
        self._costs = [0.0] * _SIZE
        """Seconds per unit of each feature, at pace 1."""
        self._usual = 0.1
        """Size of the relative error, mostly."""
        self._weight = 1.0
        """Of the next observation: it grows, instead of all sums' shrinking each time."""
        self._products = [[0.0] * _SIZE for _ in range(_SIZE)]
        """The normal equations: weighted sums of products of features …"""
        self._targets = [0.0] * _SIZE
        """… and of features and seconds."""

    def observe(self, prefill: int, decodes: int, context: int, seconds: float) -> None:
        """A step with `prefill` tokens of prompts and `decodes` sequences of `context` tokens in
        all (KV that is read: a chunk's own and what is before it, too) took so long."""
        if prefill + decodes <= 0 or not 0 < seconds < float("inf"):
            return
        self.seen += 1
        if self.seen == 1:
            self._guess(prefill + decodes, seconds)
        features = _features(prefill, decodes, context)
        weight = self._weight
        expected = self._pace * self._sum(features)
        if self.seen > ENOUGH and expected > 0:
            weight *= self._judge(seconds / expected - 1)
        seconds /= self._pace
        # Over seconds²: the error is relative, so that long steps do not drown short ones.
        weight /= seconds * seconds
        for index, value in features:
            value *= weight
            self._targets[index] += value * seconds
            row = self._products[index]
            for other, factor in features:
                row[other] += value * factor
        self._weight /= FORGET
        if self.seen % _EVERY == 0 or self.seen <= ENOUGH:
            self._solve()

    def predict(self, prefill: int, decodes: int, context: int) -> float:
        """Return how long such a step will take, s; 0 while nothing is known."""
        if self.seen < ENOUGH or prefill + decodes <= 0:
            return 0.0
        return self._pace * self._sum(_features(prefill, decodes, context))

    def _guess(self, tokens: int, seconds: float) -> None:
        each = seconds / max(tokens, RIDGE)
        self._costs[_CONSTANT] = each * RIDGE
        for index, low in enumerate(KNOTS, _SEGMENTS):
            self._costs[index] = each if low >= RIDGE else 0.0

    def _sum(self, features: Features) -> float:
        costs = self._costs
        return sum([costs[index] * value for index, value in features])

    def _judge(self, error: float) -> float:
        """Move the pace by a relative error, and return what the observation counts, 0-1."""
        size = abs(error)
        bound = _OUTLIER * self._usual
        # One outlier may widen what is usual by a little: many in a row, 15 % each.
        self._usual += _FOLLOW * (min(size, bound + self._usual) - self._usual)
        self._usual = max(self._usual, _LEAST_ERROR)
        self._pace *= 1 + _FOLLOW * max(-bound, min(bound, error))
        return 1.0 if size <= bound else bound / size

    def _solve(self) -> None:
        costs, targets = self._costs, self._targets
        for _ in range(_SWEEPS):
            for index, row in enumerate(self._products):
                if row[index] > 0:
                    rest = sum([a * b for a, b in zip(row, costs, strict=True)])
                    costs[index] = max(0.0, costs[index] + (targets[index] - rest) / row[index])
        # A step longer than any so far goes on as steep as the longest did.
        for index in range(_SEGMENTS + KNOTS.index(RIDGE) + 1, _SIZE):
            if not self._products[index][index]:
                costs[index] = costs[index - 1]
        if self._weight > _HIGH:
            self._targets = [value / self._weight for value in targets]
            self._products = [[v / self._weight for v in row] for row in self._products]
            self._weight = 1.0
