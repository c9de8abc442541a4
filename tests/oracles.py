"""Arithmetic that the tests compare with: numpy in float64 and exact fractions, from the definitions alone."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import pairwise

import mpmath
import numpy as np


def linear_betas(num_steps, start=1e-4, end=0.02):
    return [start + (end - start) * i / max(num_steps - 1, 1) for i in range(num_steps)]


def cosine_alpha_bars(num_steps, offset=0.008):
    """Nichol and Dhariwal's ratio f(t) / f(0) for t = 0..T, before any clipping."""
    f = [np.cos((t / num_steps + offset) / (1 + offset) * np.pi / 2) ** 2 for t in range(num_steps + 1)]
    return [value / f[0] for value in f]


def cosine_betas(num_steps, offset=0.008, beta_max=0.999):
    return [min(1 - after / before, beta_max) for before, after in pairwise(cosine_alpha_bars(num_steps, offset))]


def reciprocal_betas(num_steps):
    return [1 / (num_steps - t + 1) for t in range(1, num_steps + 1)]


def log_snr_betas(num_steps, first, last):
    """Of alpha_bar_t = 1 / (1 + exp(-log SNR_t)), with the log SNR on a line."""
    return betas_of_log_snrs([first + (last - first) * i / max(num_steps - 1, 1) for i in range(num_steps)])


def betas_of_log_snrs(log_snrs):
    """1 - alpha_bar_t / alpha_bar_{t-1}, to thirty digits, so that nothing cancels."""
    with mpmath.workdps(30):
        alpha_bars = [mpmath.mpf(1), *(1 / (1 + mpmath.exp(-mpmath.mpf(value))) for value in log_snrs)]
        return [float(1 - after / before) for before, after in pairwise(alpha_bars)]


def monotone_log_snrs(times, num_steps, first, last, line, slopes, offsets, weights):
    """Of the learned schedule: lambda_1 + g(u) / g(1) (lambda_T - lambda_1) at u = (t - 1) / (T - 1), with

    g(u) = w u + mean of v (sigmoid(s u + c) - sigmoid(c)), and w, s and v the softplus of the parameters; to forty
    digits.
    """
    with mpmath.workdps(40):
        line, *slopes = (mpmath.log1p(mpmath.exp(x)) for x in (line, *slopes))
        weights = [mpmath.log1p(mpmath.exp(x)) for x in weights]
        units = list(zip(weights, slopes, map(mpmath.mpf, offsets), strict=True))

        def sigmoid(x):
            return 1 / (1 + mpmath.exp(-x))

        def g(u):
            return line * u + sum(v * (sigmoid(s * u + c) - sigmoid(c)) for v, s, c in units) / len(units)

        fall = (mpmath.mpf(last) - mpmath.mpf(first)) / g(mpmath.mpf(1))
        return [mpmath.mpf(first) + g(mpmath.mpf(t - 1) / max(num_steps - 1, 1)) * fall for t in times]


def geometric_sigmas(num_steps, low, high):
    if num_steps == 1:
        return [high]
    return [low * (high / low) ** (i / (num_steps - 1)) for i in range(num_steps)]


def preserving_steps(betas):
    """(gain, variance) of each step x_t = gain x_{t-1} + sqrt(variance) eps of a variance preserving chain."""
    return [(np.sqrt(1 - beta), beta) for beta in betas]


def exploding_steps(sigmas):
    return [(1.0, after**2 - before**2) for before, after in pairwise([0.0, *sigmas])]


def moments(steps, s=0):
    """(gain, variance) of x_t given x_s for t = s..T, one step after another."""
    gain, variance, out = 1.0, 0.0, [(1.0, 0.0)]
    for step_gain, step_variance in steps[s:]:
        gain, variance = step_gain * gain, step_gain**2 * variance + step_variance
        out.append((gain, variance))
    return out


def condition(mean, variance, gain, noise_variance, observed):
    """Mean and variance of z ~ N(mean, variance) given observed = gain z + N(0, noise_variance): precisions add."""
    precision = 1 / variance + gain**2 / noise_variance
    return (mean / variance + gain * observed / noise_variance) / precision, 1 / precision


def span(steps, s, t):
    """(gain, variance) of x_t given x_s."""
    return moments(steps[:t], s)[-1]


def forward_variances(steps, times):
    """The variance of x_t given the kept state before, for each of the times that are kept."""
    return [span(steps, s, t)[1] for s, t in pairwise((0, *times))]


def posterior_variances(steps, times):
    """The variance of each kept state given x_0 and the kept state after; at the first time that of the second."""
    found = best_variances(steps, times, 0.0)[1:]
    return [*found[:1], *found] if found else forward_variances(steps, times)


def best_variances(steps, times, v):
    """Var(x_s | x_t) of data with variance v, of each kept state (and the data) given the kept state after."""
    found, whole = [], moments(steps)
    for s, t in pairwise((0, *times)):
        before = whole[s][0] ** 2 * v + whole[s][1]
        found.append(condition(0.0, before, *span(steps, s, t), 0.0)[1] if np.all(before) else 0.0)
    return found


def weight_of_data(steps, s, t):
    """The weight of x_0 in the mean of q(x_s | x_t, x_0)."""
    return condition(span(steps, 0, s)[0], span(steps, 0, s)[1], *span(steps, s, t), 0.0)[0] if s else 1.0


def log_normal(x, mean, variance):
    return -0.5 * (np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance)


def normal_kl(mean_q, variance_q, mean_p, variance_p):
    ratio = variance_q / variance_p
    return 0.5 * (ratio - 1 - np.log(ratio) + (mean_q - mean_p) ** 2 / variance_p)


def points(levels):
    return np.array([2 * k / (levels - 1) - 1 for k in range(levels)])


@np.vectorize
def below(z):
    """The normal distribution function."""
    return math.erfc(-z / math.sqrt(2)) / 2


def masses(mean, deviation, levels):
    """What N(mean, deviation^2) gives to the bin of each level, along a new last dimension, from the smaller tail."""
    edges = np.concatenate([[-np.inf], points(levels)[:-1] + 1 / (levels - 1), [np.inf]])
    z = (edges - np.asarray(mean)[..., None]) / np.asarray(deviation)[..., None]
    low, high = z[..., :-1], z[..., 1:]
    sign = np.where(low + high > 0, -1, 1)
    return np.abs(below(sign * high) - below(sign * low))


def softmax(x_1, gain, variance, levels):
    """Bayes' rule for a level known through x_1 ~ N(gain v, variance) alone, along a new last dimension."""
    log_p = log_normal(np.asarray(x_1)[..., None], gain * points(levels), variance)
    likelihood = np.exp(log_p - log_p.max(-1, keepdims=True))
    return likelihood / likelihood.sum(-1, keepdims=True)


def bit_matrix(betas, rate, s, t):
    """M[i][j] = q(x_t = j | x_s = i): the product of the 2 x 2 matrices of the steps s+1..t; exact if betas are."""
    one = Fraction(1) if isinstance(rate, Fraction) else 1.0
    product = [[one, 0 * one], [0 * one, one]]
    stationary = [1 - rate, rate]
    for beta in betas[s:t]:
        step = [[(1 - beta) * (i == j) + beta * stationary[j] for j in (0, 1)] for i in (0, 1)]
        product = [[sum(product[i][k] * step[k][j] for k in (0, 1)) for j in (0, 1)] for i in (0, 1)]
    return product


def bit_posterior(betas, rate, x_t, x_0, t, s):
    """[q(x_s = 0 | x_t, x_0), q(x_s = 1 | x_t, x_0)], both states weighed and normalised."""
    first, second = bit_matrix(betas, rate, 0, s), bit_matrix(betas, rate, s, t)
    joint = [first[x_0][x_s] * second[x_s][x_t] for x_s in (0, 1)]
    return [weight / sum(joint) for weight in joint]


def decimal_cos(x):
    """cos of a Decimal in the current context, by its series."""
    term, total, n = Decimal(1), Decimal(0), 0
    while abs(term) > Decimal(10) ** -45:
        total += term
        n += 2
        term *= -x * x / (n * (n - 1))
    return total


def exact_linear_noise_squared(num_steps, t):
    """1 - alpha_bar_t of the linear schedule from 1e-4 to 0.02, in rational numbers."""
    alpha_bar = Fraction(1)
    for i in range(t):
        alpha_bar *= 1 - (Fraction(1, 10**4) + (Fraction(2, 100) - Fraction(1, 10**4)) * Fraction(i, num_steps - 1))
    return 1 - alpha_bar


def exact_cosine_noise_squared(num_steps, t):
    """1 - alpha_bar_t of the cosine schedule with offset 0.008, to forty digits."""
    with localcontext() as context:
        context.prec = 50
        half_pi = Decimal("3.14159265358979323846264338327950288419716939937510") / 2
        offset = Decimal("0.008")
        f = [decimal_cos((Decimal(u) / num_steps + offset) / (1 + offset) * half_pi) ** 2 for u in (0, t)]
        return 1 - f[1] / f[0]
