"""All intervals, 95 %: of shares, means, scores and differences; over questions, images or seeds.

Pure functions of numbers and arrays. Random draws are seeded: the same values give the same
interval. Where intervals are averaged, each benchmark draws with a seed of its own name.
"""
from statistics import mean, stdev

import numpy as np

# Student's t for 1 to 4 degrees of freedom: 97.5 % quantile.
T975 = (12.706, 4.303, 3.182, 2.776)


def middle_95(draws):
    """The bounds between which 95 % of the draws lie: [low, high]."""
    return np.percentile(draws, [2.5, 97.5]).tolist()


def wilson(p, n, z=1.96):
    """95 % interval of a share p of n; unlike p ± 2 σ it has a width at 0 and at 1: [low, high]."""
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def normal(values):
    """Mean of a tensor (n,), its 95 % interval by the normal approximation (trust it from some
    dozens on): {"mean", "ci95": half-width; None for a single value, "n"}."""
    half = 1.96 * values.std().item() / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": values.mean().item(), "ci95": half, "n": len(values)}


def student(values):
    """Mean of a list of at most five, a value a seed, and its 95 % interval by Student's t: (mean,
    half-width; None for a single value)."""
    if len(values) < 2:
        return mean(values), None
    return mean(values), T975[len(values) - 2] * stdev(values) / len(values) ** 0.5


def stratified(strata):
    """Half-width of the 95 % interval of 100 × the mean over strata of their means, by the normal
    approximation. strata: [values (n,), …]; None where there is none."""
    parts = [values.var() / len(values) for values in strata]
    return 196 * float(np.sqrt(np.sum(parts)) / len(parts)) if parts else None       # 1.96 × 100


def bootstrap(values, draws=10_000):
    """95 % interval of the mean of values (n,), over resampled units: [low, high]. To resample is
    to draw how often each distinct value comes: exact, without an array (draws, n)."""
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(values), counts / len(values), draws)
    return middle_95(drawn @ distinct / len(values))


def stratified_bootstrap(strata, name, draws=2000):
    """Draws of 100 × the mean over strata of their means, units drawn within strata: (draws,).
    strata: {stratum: values (n,)}. name: the benchmark's, which is the seed: two benchmarks of one
    size must not draw the same units."""
    rng = np.random.default_rng(list(name.encode()))
    means = [[values[rng.integers(0, len(values), len(values))].mean() for _ in range(draws)]
             for _, values in sorted(strata.items())]
    return 100 * np.mean(means, 0)


def resampling(n, draws=1000):
    """How often each of n images comes in every draw: (draws, n), each row summing to n."""
    return np.random.default_rng(0).multinomial(n, [1 / n] * n, draws)
