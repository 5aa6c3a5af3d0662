"""Strict configurations: what fits is loaded, what does not is named with a remedy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from raysegment.climate.checks import BadInput
from raysegment.config import apply_overrides, load, read_yaml, scalar


@dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    sizes: tuple[int, ...] = (2, 2)

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate: expected a positive number, got {self.rate}")


@dataclass(frozen=True)
class Outer:
    steps: int = 10
    inner: Inner = field(default_factory=Inner)
    out: str | None = None


def test_overrides_reach_nested_keys_and_keep_types() -> None:
    mapping = apply_overrides({"steps": 5}, ["inner.rate=1e-4", "inner.sizes=[3, 4]", "out=runs/x"])
    assert load(Outer, mapping) == Outer(5, Inner(1e-4, (3, 4)), "runs/x")


def test_unknown_key_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(BadInput, match=r"`inner\.rat`.*Did you mean `inner\.rate`"):
        load(Outer, {"inner": {"rat": 1.0}})


@pytest.mark.parametrize("mapping", [{"steps": "many"}, {"inner": {"rate": -1.0}}, {"inner": 3}])
def test_values_that_do_not_fit_are_refused(mapping: dict) -> None:
    with pytest.raises(BadInput, match="Outer"):
        load(Outer, mapping)


def test_a_file_is_loaded_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("steps: 7\ninner: {rate: 2.0e-5, sizes: [1, 2, 3]}\nout: x\n")
    assert load(Outer, read_yaml(tmp_path / "c.yaml")) == Outer(7, Inner(2e-5, (1, 2, 3)), "x")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1,\n"])
def test_files_that_are_no_mapping_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(BadInput):
        read_yaml(tmp_path / "c.yaml")


def test_missing_file_and_bare_word() -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_yaml("/nowhere/c.yaml")
    with pytest.raises(BadInput, match="key=value"):
        apply_overrides({}, ["steps"])


@pytest.mark.parametrize(("text", "value"), [("off", "off"), ("no", "no"), ("true", True), ("False", False), ("1e-3", 1e-3)])
def test_only_true_and_false_are_booleans(text, value):
    assert scalar(text) == value
    assert apply_overrides({}, [f"checkpoint.memory={text}"])["checkpoint"]["memory"] == value
