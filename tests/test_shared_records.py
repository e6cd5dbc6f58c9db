"""Records in a ring: what one worker writes another reads, until it makes room for newer ones."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from scalellm_plugins.frontends.shared_records import Records

SIZE = 1024


def another(records: Records) -> Records:
    """Another process's view of the same memory."""
    made = Records.__new__(Records)
    made.__dict__.update(records.__dict__, _known={}, _read_to=0)
    return made


RECORD = st.tuples(st.sampled_from([b"a", b"bb", b"c" * 9]), st.binary(max_size=300))


@given(st.lists(st.tuples(st.integers(0, 1), RECORD, st.booleans()), max_size=60))
def test_the_newest_are_there(steps: list[Any]) -> None:
    """Two writers, and a reader that looks only now and then, so that it is overtaken."""
    first = Records(SIZE)
    writers, reader = (first, another(first)), another(first)
    written: list[tuple[bytes, bytes]] = []
    for writer, (key, value), looks in steps:
        assert writers[writer].put(key, value)
        written.append((key, value))
        for view in (*writers, *((reader,) if looks else ())):
            newest = dict(written)
            assert view.get(key) == value
            for other in newest:
                assert view.get(other) in (None, newest[other])
            # With what is padded at the ring's end, half of it at least holds records.
            recent, size = set(), 0
            for other, content in reversed(written):
                size += 24 + len(other) + len(content) + 7
                if size > SIZE // 2:
                    break
                recent.add(other)
            assert all(view.get(other) == newest[other] for other in recent)


def test_what_is_too_large_is_refused_and_harms_nothing() -> None:
    records = Records(SIZE)
    assert records.put(b"small", b"x")
    assert not records.put(b"large", b"x" * SIZE)
    assert records.get(b"small") == b"x"
    assert records.get(b"large") is None


def test_a_record_is_gone_when_it_is_overwritten() -> None:
    records = Records(SIZE)
    reader = another(records)
    records.put(b"first", b"1" * 100)
    assert reader.get(b"first") is not None
    for number in range(20):
        records.put(b"%d" % number, b"2" * 100)
    assert reader.get(b"first") is None
    assert reader.get(b"19") == b"2" * 100


def test_a_writer_that_died_half_way_left_nothing() -> None:
    """All of a record is written before the head says so."""
    records = Records(SIZE)
    records.put(b"whole", b"1")
    head = records._words[1]
    records._write(head, b"\xff" * 40)  # of one that was killed here
    reader = another(records)
    assert reader.get(b"whole") == b"1"
    reader.put(b"next", b"2")
    assert records.get(b"next") == b"2"
