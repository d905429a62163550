"""Digests: equal for equal values, different for different ones, refused where bytes wander."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eaft_prune.core.digests import array_digest, canonical_json, digest, file_digest

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def shuffled(value: Any) -> Any:
    """The same value with every mapping built in the opposite order and lists as tuples."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(list(value))}
    if isinstance(value, list):
        return tuple(shuffled(item) for item in value)
    return value


def typed(value: Any) -> Any:
    """A hashable form in which values are equal iff they are equal and of equal type."""
    if isinstance(value, dict):
        return frozenset((key, typed(item)) for key, item in value.items())
    if isinstance(value, list):
        return ("list", *(typed(item) for item in value))
    return (type(value).__name__, repr(value))


@given(VALUES)
def test_key_order_and_tuple_or_list_do_not_matter(value: Any) -> None:
    assert digest(value) == digest(shuffled(value))


@given(VALUES, VALUES)
def test_digests_are_equal_iff_values_are(a: Any, b: Any) -> None:
    assert (digest(a) == digest(b)) == (typed(a) == typed(b))


@given(VALUES)
def test_canonical_json_reads_back(value: Any) -> None:
    assert typed(json.loads(canonical_json(value))) == typed(value)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}),
        ({"a": {"b": 1}}, {"b": {"a": 1}}),
        ([1, 2], [2, 1]),
        ([[1], 2], [1, [2]]),
        ({"a": None}, {}),
        (1, "1"),
        (True, 1),
        (0.1, 0.1 + 2**-55),
        ("", None),
    ],
)
def test_different_values_differ(a: Any, b: Any) -> None:
    assert digest(a) != digest(b)


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        frozenset("a"),
        object(),
        float("nan"),
        float("inf"),
        Path("a"),
        {1: "a"},
        {None: "a"},
        b"bytes",
        np.zeros(2),
        np.int64(1),
        np.float32(1),
        lambda: None,
        range(3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_stable_bytes_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(TypeError):
        digest(value)
    with pytest.raises(TypeError, match=r"\$\.outer\[1\]"):
        digest({"outer": [0, value]})


@pytest.mark.process
def test_digests_do_not_depend_on_the_process() -> None:
    value = {"b": [1, 2.5, None], "a": {"x": "é", "y": True}}
    code = f"from eaft_prune.core.digests import digest; print(digest({value!r}))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert seen == {digest(value)}


def test_array_digest_sees_dtype_shape_and_values() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    variants = [
        array,
        array.astype(np.int64),
        array.view(np.float32),
        array.view(np.uint32),
        array.reshape(3, 2),
        array.reshape(6),
        array.reshape(1, 2, 3),
        array + 1,
        array[:, ::-1],
        np.zeros((0, 3), np.int32),
        np.zeros((3, 0), np.int32),
        np.zeros((0, 3), np.float32),
    ]
    assert len({array_digest(variant) for variant in variants}) == len(variants)


def test_array_digest_sees_the_shape_of_a_scalar() -> None:
    assert array_digest(np.array(3.0)) != array_digest(np.array([3.0]))


def test_array_digest_does_not_see_memory_order() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    wide = np.zeros((4, 6, 8), np.float32)
    wide[::2, ::2, ::2] = array
    for same in (np.asfortranarray(array), wide[::2, ::2, ::2], array.astype(">f4")):
        assert np.array_equal(same, array)
        assert array_digest(same) == array_digest(array)


def test_arrays_of_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        array_digest(np.array([{}], object))


def test_file_digest_is_sha256_of_the_bytes(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes((4 << 20) + 17)  # more than one read
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file") == hashlib.sha256(data).hexdigest()
