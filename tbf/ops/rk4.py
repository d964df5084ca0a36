"""Fixed-step integration of dz/dt = field(z, stage) over t in [0, 1].

Discretise, then differentiate: gradients are those of the steps taken (an adjoint integrated backward would follow a
different discretisation, arXiv 1902.10298).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from tbf.errors import ConfigError

Field = Callable[[Tensor, int], Tensor]


def integrate(
    field: Field,
    z0: Tensor,
    *,
    solver: str = "rk4",
    steps: int = 1,
    checkpoint: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Returns z(1) - z(0), of the shape of z0, by `steps` steps of classical RK4 or Euler.

    field: called as field(z, stage); `stage` counts the evaluations inside a step: 0..3 for rk4, 0 for euler.
    checkpoint: wraps each step as checkpoint(step, z), for example to recompute it in the backward.

    Raises ConfigError for another solver, or fewer steps than one.
    """
    if solver not in STEPPERS:
        raise ConfigError(f"ode_solver is '{solver}'; choose one of: {', '.join(STEPPERS)}")
    if steps < 1:
        raise ConfigError(f"ode_steps is {steps}; it must be at least 1")
    stepper, h = STEPPERS[solver], 1.0 / steps

    def step(z: Tensor) -> Tensor:
        return stepper(field, z, h)

    run = step if checkpoint is None else partial(checkpoint, step)
    increment = run(z0)
    for _ in range(steps - 1):
        increment = increment + run(z0 + increment)
    return increment


def rk4_step(field: Field, z: Tensor, h: float) -> Tensor:
    """Increment of one classical Runge-Kutta step, error O(h^5)."""
    k1 = field(z, 0)
    k2 = field(z + (h / 2) * k1, 1)
    k3 = field(z + (h / 2) * k2, 2)
    k4 = field(z + h * k3, 3)
    return (h / 6) * (k1 + 2 * (k2 + k3) + k4)


def euler_step(field: Field, z: Tensor, h: float) -> Tensor:
    """Increment of one explicit Euler step, error O(h^2)."""
    return h * field(z, 0)


STEPPERS: dict[str, Callable[[Field, Tensor, float], Tensor]] = {"rk4": rk4_step, "euler": euler_step}
