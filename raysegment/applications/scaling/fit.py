"""What measured points say about a system: a hierarchical Bayesian model of the rates behind a step's time.

Every rate of `step.Rates` is exp or logistic of (typical value + what all systems share + what is this system's or this
machine's own), the deviations in units of their prior spread, so that all parameters are standard normals z beforehand.
Few points for a system then move what they can tell apart and leave the rest where other systems put it. The best z
minimises |z|² + Σ((log modelled − log measured step) / NOISE)²; its uncertainty is the inverse of the Gauss-Newton
Hessian there (Laplace's approximation: MacKay 2003, ch. 27).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.optimize import least_squares

from raysegment import config
from raysegment.applications.scaling import machines, points
from raysegment.applications.scaling.machines import Machine
from raysegment.applications.scaling.points import Point
from raysegment.applications.scaling.step import Rates, Where, times
from raysegment.applications.scaling.workloads import workload
from raysegment.archive.files import committed
from raysegment.climate.checks import BadInput

NOISE = 0.02  # relative, of a measured throughput: two rounds on HoreKa differ by 1.4 %, 128 and 1,024 GPUs on JUWELS by −2.7 %
INFORMED = 0.9  # a parameter whose uncertainty is above this share of its prior's has learnt nothing
DRAWS, _SEED = 2000, 0
_ROUNDS, _REACH, _SOLVED = 25, 1.0, 0.3  # of solving for draws: iterations, longest move in each, what is left at most
_STEP = 1e-4  # of finite differences, in prior standard deviations


@dataclass(frozen=True)
class Prior:
    """A rate's typical value, the spread of what systems share, the spread of what is their own, and who owns it."""

    typical: float
    shared: float
    own: float
    owner: str  # system: software decides; machine: hardware does; none
    why: str
    bounded: bool = False  # between 0 and 1: logistic, spreads on that scale; otherwise lognormal


PRIORS = {
    "utilisation_fp32": Prior(0.5, 0.35, 0.5, "system", "48 to 80 % on P100 and V100 (Kurth et al. 2018, table of single GPUs)"),
    "utilisation_16": Prior(0.15, 0.5, 0.6, "system", "17 and 31 % on V100 (the same), 4 to 23 % in DeepCAM rounds"),
    "launch_s": Prior(6e-3, 0.6, 0.4, "system", "some 1,500 kernels of 4 µs, and the optimizer; assumed"),
    "fill": Prior(0.15, 0.6, 0.3, "system", "small kernels fill a GPU badly at batch 1; assumed"),
    "efficiency": Prior(0.6, 0.3, 0.3, "machine", "libraries reach 0.6 to 0.9 of the links, less at scale (arXiv 2504.18658)"),
    "overlap": Prior(0.5, 1.0, 0.7, "system", "from one bucket after backward to full overlap", bounded=True),
    "jitter": Prior(0.025, 0.4, 0.7, "machine", "ResNet on 256 P100 loses 10 % in all (Goyal et al. 2017): at most 3.5 %"),
    "persistent": Prior(0.5, 1.0, 0.0, "none", "how much of it are slow GPUs is not known", bounded=True),
    "epoch_s": Prior(0.1, 0.7, 0.5, "system", "loaders drain and fill again; assumed"),
    "disk": Prior(1.0, 0.4, 0.3, "machine", "what applications get of a disk's rate; assumed"),
}
GENERIC = 1.6  # deviations of machines without a file are so much wider
_RATES = ("launch_s", "fill", "efficiency", "overlap", "jitter", "persistent", "epoch_s", "disk")


@dataclass(frozen=True)
class Model:
    """Measured points and the most probable parameters: `z` by name (`jitter` shared, `jitter@summit` one owner's)."""

    points: tuple[Point, ...]
    machines: Mapping[str, Machine]
    z: Mapping[str, float]
    warnings: tuple[str, ...] = field(default=())
    unmeasured: Mapping[str, str] = field(default_factory=dict)  # machines of systems without points

    def with_system(self, system: str, machine: str) -> Model:
        """The same model with one more system, on a machine (name or file), of which there are no points: what is its own
        stays at its prior, what all systems share is as the points of the others have it. BadInput where it has points."""
        if self.of(system):
            has = f"the machine of its points, {self.machine_of(system).name}"
            raise BadInput("--machine", "a system without points", f"{system}, that has {has}", "Leave --machine out.")
        known = {**self.machines, machine: machines.find(machine)}
        owners = {"system": system, "machine": known[machine].name}
        own = (f"{key}@{owners[_owner(key)]}" for key in _own_keys() if _owner(key) in owners)
        return replace(self, machines=known, z={**dict.fromkeys(own, 0.0), **self.z}, unmeasured={system: machine})

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.z)

    @cached_property
    def best(self) -> np.ndarray:
        return np.array([self.z[name] for name in self.names])

    @cached_property
    def covariance(self) -> np.ndarray:
        """Of z, (parameters, parameters)."""
        jacobian = _jacobian(self.best, self.points, self.machines, self.names)
        return np.linalg.inv(jacobian.T @ jacobian)

    def machine_of(self, system: str) -> Machine:
        """The machine of a system that has points; BadInput suggests another name."""
        known = {**self.unmeasured, **{point.system: point.machine for point in self.points}}
        if system not in known:
            likely = [name for name in known if name.startswith(system)] or difflib.get_close_matches(system, known, 1, 0.3)
            other = "Measure it (`raysegment scale calibrate`), or name its machine: --machine."
            remedy = f"Did you mean {likely[0]}?" if likely else other
            raise BadInput("--system", f"one of {', '.join(sorted(known))}", system, remedy)
        return self.machines[known[system]]

    def of(self, system: str) -> list[Point]:
        return [point for point in self.points if point.system == system]

    @cached_property
    def draws(self) -> np.ndarray:
        """Nearly DRAWS draws of z from its posterior, (draws, parameters), always the same: randomise, then optimise.

        With F(z) the residuals and QR their Jacobian at the best z, each draw solves Qᵀ(F(z) − ξ) = 0 for standard normal ξ
        (Bardsley et al. 2014, eq. 3.6): exact where the model is linear, and it follows the curve where it is not, which
        Laplace's Gaussian does not. The few draws whose equation is not solved are left out.
        """
        q, r = np.linalg.qr(_jacobian(self.best, self.points, self.machines, self.names))
        aims = np.random.default_rng(_SEED).standard_normal((DRAWS, len(q))) @ q
        z = self.best + np.linalg.solve(r, aims.T).T
        for _ in range(_ROUNDS):
            move = np.linalg.solve(r, (self._residuals(z) @ q - aims).T).T
            z = z - move * np.minimum(1.0, _REACH / np.maximum(1e-12, np.linalg.norm(move, axis=1, keepdims=True)))
        solved = np.linalg.norm(self._residuals(z) @ q - aims, axis=1) < _SOLVED
        return z[solved]

    def rates(self, z: np.ndarray, system: str, precision: str) -> Rates:
        """The rates of a system for each row of z, (rows, parameters)."""
        return rates(z, self.names, system, self.machine_of(system), precision)

    def _residuals(self, z: np.ndarray) -> np.ndarray:
        return _residuals(z, self.points, self.machines, self.names)

    def at_prior(self, system: str) -> list[str]:
        """The rates of a system about which its points and all others say hardly more than the priors do."""
        machine, precisions = self.machine_of(system), {point.precision for point in self.of(system)}
        used = ["utilisation_fp32"] * ("fp32" in precisions) + ["utilisation_16"] * bool(precisions - {"fp32"})
        return [key for key in (*used, *_RATES) if self._told(key, system, machine) > INFORMED]

    def _told(self, key: str, system: str, machine: Machine) -> float:
        """Standard deviation of a rate's logarithm (logit), after the points over before."""
        prior, along = PRIORS[key], np.zeros(len(self.names))
        along[self.names.index(key)] = prior.shared
        own = f"{'utilisation' if key.startswith('utilisation') else key}@{system if prior.owner == 'system' else machine.name}"
        if own in self.names:
            along[self.names.index(own)] = prior.own * (GENERIC if machine.generic else 1.0)
        return float(np.sqrt(along @ self.covariance @ along) / np.linalg.norm(along))


# ---------------------------------------------------------------- parameters


def parameter_names(found: Sequence[Point], known: Mapping[str, Machine]) -> tuple[str, ...]:
    """Shared parameters, then each owner's."""
    systems = list(dict.fromkeys(point.system for point in found))
    owners = {"system": systems, "machine": list(dict.fromkeys(known[p.machine].name for p in found)), "none": []}
    return (*PRIORS, *(f"{key}@{owner}" for key in _own_keys() for owner in owners[_owner(key)]))


def _own_keys() -> tuple[str, ...]:
    return ("utilisation", *_RATES)


def _owner(key: str) -> str:
    return PRIORS["utilisation_16" if key == "utilisation" else key].owner


def rates(z: np.ndarray, names: Sequence[str], system: str, machine: Machine, precision: str) -> Rates:
    """The rates that parameters z (rows, parameters) give a system; one value for each row."""
    index = {name: number for number, name in enumerate(names)}
    wide = GENERIC if machine.generic else 1.0

    def value(key: str, prior: Prior, own_key: str) -> np.ndarray:
        typical = machine.jitter if key == "jitter" and machine.jitter else prior.typical
        owner = system if prior.owner == "system" else machine.name
        deviation = prior.shared * z[:, index[key]]
        if (own := index.get(f"{own_key}@{owner}")) is not None:
            deviation = deviation + prior.own * wide * z[:, own]
        if prior.bounded:
            return 1 / (1 + np.exp(-(math.log(typical / (1 - typical)) + deviation)))
        return typical * np.exp(deviation)

    used = "utilisation_fp32" if precision == "fp32" else "utilisation_16"
    found = {key: value(key, PRIORS[key], key) for key in _RATES}
    found["efficiency"] = np.minimum(1.0, found["efficiency"])
    return Rates(utilisation=value(used, PRIORS[used], "utilisation"), **found)


# ---------------------------------------------------------------- the fit


def fit(found: Sequence[Point]) -> Model:
    """The model of these points; warnings say which points it cannot explain and which machines have no file."""
    known = {point.machine: machines.find(point.machine) for point in found}
    names = parameter_names(found, known)
    answer = least_squares(
        lambda z: _residuals(z[None], found, known, names)[0], np.zeros(len(names)),
        jac=lambda z: _jacobian(z, found, known, names), method="trf", x_scale=1.0, max_nfev=200, xtol=1e-7, ftol=1e-9,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    z = dict(zip(names, answer.x.tolist(), strict=True))
    return Model(tuple(found), known, z, (*_unknown(known), *_unexplained(answer.fun[len(names) :], found)))


def _residuals(z: np.ndarray, found: Sequence[Point], known: Mapping[str, Machine], names: Sequence[str]) -> np.ndarray:
    """For each row of z: z itself, then how far each point's logarithm is off, in units of the noise."""
    off = [(np.log(step_s(z, names, point, known[point.machine])) - math.log(point.step_s)) / NOISE for point in found]
    return np.concatenate([z, np.stack(off, axis=1)], axis=1)


def step_s(z: np.ndarray, names: Sequence[str], point: Point, machine: Machine) -> np.ndarray:
    """Modelled seconds of the step that a point measured, for each row of z."""
    where = Where(machine, workload(point.network), point.gpus, point.local_batch, point.precision)
    return sum(times(where, rates(z, names, point.system, machine, point.precision)).values())  # type: ignore[return-value]


def _jacobian(z: np.ndarray, found: Sequence[Point], known: Mapping[str, Machine], names: Sequence[str]) -> np.ndarray:
    """d residuals / d z by central differences, all parameters at once: (residuals, parameters)."""
    shifts = _STEP * np.eye(len(z))
    both = _residuals(np.concatenate([z + shifts, z - shifts]), found, known, names)
    return (both[: len(z)] - both[len(z) :]).T / (2 * _STEP)


def _unknown(known: Mapping[str, Machine]) -> Iterable[str]:
    for name, machine in known.items():
        if machine.generic:
            likely = machines.near(name)
            hint = f" (did you mean {likely[0]}?)" if likely else ""
            yield f"machine {name} has no file{hint}: typical numbers with wide priors are used"


def _unexplained(off: np.ndarray, found: Sequence[Point]) -> Iterable[str]:
    for point, error in zip(found, off, strict=True):
        if abs(error) > 3:
            much = 100 * (math.exp(error * NOISE) - 1)
            what = f"{point.system} on {point.gpus} GPUs, local batch {point.local_batch}: {point.samples_per_s:g} samples/s"
            yield f"{what} contradicts the other points: the model is {abs(much):.0f} % {'slower' if much > 0 else 'faster'}"


# ---------------------------------------------------------------- files


def write(model: Model, path: Path) -> None:
    """The model as YAML: points, machines with their sources, parameters (in prior standard deviations) with uncertainty."""
    spread = np.sqrt(np.diag(model.covariance)).tolist()
    content = {
        "format": 1,
        "noise": NOISE,
        "points": [asdict(point) for point in model.points],
        "machines": {key: {**asdict(machine), "sources": dict(machine.sources)} for key, machine in model.machines.items()},
        "parameters": {name: {"z": z, "sd": sd} for (name, z), sd in zip(model.z.items(), spread, strict=True)},
        "warnings": list(model.warnings),
    }
    with committed(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=128))


def read(path: str | Path) -> Model:
    """The model in a file that `write` wrote; BadInput says what is missing."""
    content = config.read_yaml(path)
    try:
        found = [config.load(Point, point, path) for point in content["points"]]
        known = {key: config.load(Machine, machine, path) for key, machine in content["machines"].items()}
        z: dict[str, Any] = {name: float(entry["z"]) for name, entry in content["parameters"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            path, "a model with points, machines, parameters", repr(error), "Make one: `raysegment scale fit`."
        ) from None
    points.check(path, found)
    if tuple(z) != parameter_names(found, known):
        raise BadInput(
            path, "the parameters of this version", f"{len(z)} others", "Fit the points again: `raysegment scale fit`."
        )
    return Model(tuple(found), known, z, tuple(content.get("warnings", ())))
