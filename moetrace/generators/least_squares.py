"""Nonlinear least squares for a handful of parameters (Levenberg 1944; Marquardt 1963), derivatives by differences."""

from collections.abc import Callable

import numpy as np

STEP = 0.15  # of the differences: large, as simulated residuals are noisy and have small jumps
LARGEST_STEP = 1.2
ENOUGH = 0.01  # stop when an iteration gains less than this part of the sum of squares


def least_squares(residuals: Callable[[np.ndarray], np.ndarray], start: np.ndarray, iterations: int) -> np.ndarray:
    """Return the parameters [p] near `start` [p] whose `residuals` have the least sum of squares.

    Each iteration takes one call of `residuals` for each parameter and up to four more; it damps what a step would
    change much by the diagonal of J'J, more after a step that made things worse and less after one that did not.
    """
    best, damping = start, 0.1
    now = residuals(best)
    for _ in range(iterations):
        jacobian = np.empty((now.size, best.size))
        for index in range(best.size):
            moved = best.copy()
            moved[index] += STEP
            jacobian[:, index] = (residuals(moved) - now) / STEP
        square = jacobian.T @ jacobian
        for _ in range(4):
            damped = square + damping * np.diag(np.diag(square) + 0.1)
            step = np.clip(-np.linalg.solve(damped, jacobian.T @ now), -LARGEST_STEP, LARGEST_STEP)
            then = residuals(best + step)
            if then @ then < now @ now:
                break
            damping *= 4
        else:
            return best
        gain = 1 - (then @ then) / (now @ now)
        best, now, damping = best + step, then, damping / 4
        if gain < ENOUGH:
            break
    return best
