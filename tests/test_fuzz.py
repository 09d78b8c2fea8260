"""The targets of scripts/fuzz.py on a few inputs of hypothesis' own, on its seeds, and on what once broke them."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from scripts.fuzz import HOSTILE, SEEDS, TARGETS

little = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
pieces = st.one_of(
    st.binary(max_size=24),
    st.text(max_size=8).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from([bytes([14 + i]) for i in range(len(HOSTILE))]),
    st.sampled_from([b"\0", b"\0\xff", b"\n", b'"', b",", b"{", b"}", b": ", b"- ", b"[", b"]"]),
    st.sampled_from([seed for seeds in SEEDS.values() for seed in seeds]),
)
inputs = st.lists(pieces, max_size=8).map(b"".join)


@pytest.mark.parametrize("target", TARGETS)
def test_seeds(target: str) -> None:
    for seed in SEEDS[target]:
        TARGETS[target](seed)


@little
@given(data=inputs)
def test_text_never_becomes_control_and_comes_back(data: bytes) -> None:
    TARGETS["chat"](data)


@little
@given(data=inputs)
@example(data=b'\x02"a\n\0b\t},  "a\ndv,f\n')  # a column's name with line breaks stood in a message
def test_every_row_of_a_file_is_used_or_refused(data: bytes) -> None:
    TARGETS["rows"](data)


@settings(little, max_examples=10)
@given(data=st.binary(max_size=12))
def test_a_changed_parquet_file_is_read_or_refused(data: bytes) -> None:
    TARGETS["parquet"](data)


@settings(little, max_examples=20)
@given(data=st.binary(min_size=1, max_size=60))
def test_a_changed_cache_is_read_or_refused(data: bytes) -> None:
    TARGETS["cache"](data)


@little
@given(data=inputs)
def test_only_whole_checkpoints_are_found(data: bytes) -> None:
    TARGETS["finder"](data)


@little
@given(data=st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(b"\1".__add__)))
@example(data=b"\1t{rch")  # a value numbered 1,385,465,088: the unpickler took memory for all before it
def test_a_table_is_read_or_refused(data: bytes) -> None:
    TARGETS["table"](data)


@settings(little, max_examples=20)
@given(data=inputs)
def test_a_config_is_parsed_or_refused_in_one_sentence(data: bytes) -> None:
    TARGETS["config"](data)


@little
@given(data=inputs)
def test_a_table_of_pieces_is_read_or_refused(data: bytes) -> None:
    TARGETS["pieces"](data)
