"""Traces: two public formats, told apart by their header; what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalellm_plugins.errors import ConfigError
from scalellm_plugins.virtual import trace
from scalellm_plugins.virtual.trace import Row

AZURE_2023 = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:47,396,109
2023-11-16 18:15:50.9951690,879,55
"""
AZURE_2024 = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:01.017335+00:00,2399,6
"""
BURSTGPT = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,0,0,0,API log
"""
BURSTGPT_2 = """\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
12.5,7,3.1,GPT-4,100,10,110,Conversation log
10.0,,2.0,GPT-4,50.0,5.0,55,API log
"""


def parse(text: str, **options: float) -> trace.Trace:
    return trace.parse(text.splitlines(), "t.csv", **options)


def test_azures_columns() -> None:
    found = parse(AZURE_2023)
    assert found.format == "azure"
    assert [row[1:] for row in found.rows] == [(374, 44), (396, 109), (879, 55)]
    assert [row.at for row in found.rows] == pytest.approx([0.0, 0.31941, 4.314579], abs=1e-5)
    assert [row.at for row in parse(AZURE_2024).rows] == pytest.approx([0.0, 1.007405], abs=1e-5)


def test_burstgpts_columns_and_rows_of_failures() -> None:
    found = parse(BURSTGPT)
    assert (found.format, found.left_out) == ("burstgpt", 1)
    assert found.rows == [Row(0.0, 472, 18), Row(40.0, 1087, 230)]


def test_other_columns_between_and_rows_out_of_order() -> None:
    assert parse(BURSTGPT_2).rows == [Row(0.0, 50, 5), Row(2.5, 100, 10)]


def test_time_may_be_cut_and_run_faster() -> None:
    assert parse(BURSTGPT, seconds=40.0).rows == [Row(0.0, 472, 18)]
    assert [row.at for row in parse(BURSTGPT, seconds=40.0, speed=2.0).rows] == [0.0, 20.0]


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 9000), st.integers(0, 2000)), min_size=1
    )
)
def test_every_usable_row_is_there_once(rows: list[tuple[int, int, int]]) -> None:
    text = "Timestamp,Model,Request tokens,Response tokens\n" + "".join(
        f"{at},m,{prompt},{output}\n" for at, prompt, output in rows
    )
    usable = sorted((at, prompt, output) for at, prompt, output in rows if prompt and output)
    if not usable:
        with pytest.raises(ConfigError, match="no request with a prompt and an answer"):
            parse(text)
        return
    found = parse(text)
    assert found.left_out == len(rows) - len(usable)
    first = usable[0][0]
    assert sorted(map(tuple, found.rows)) == [(at - first, p, o) for at, p, o in usable]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TIMESTAMP,ContextTokens\n", r"lacks the column 'GeneratedTokens' of format azure"),
        ("Timestamp,Model,Response tokens\n1,m,2\n", r"lacks the column 'Request tokens' of form"),
        ("time,in,out\n1,2,3\n", r"none of the columns .* Its header: time, in, out. Known: azure"),
        ("", r"none of the columns .* Its header: empty"),
        (AZURE_2023 + "yesterday,3,4\n", r"line 5: 'yesterday,3,4' is not a time"),
        (AZURE_2023 + "2023-11-16 18:15:50,many,4\n", r"line 5: .*many"),
        (AZURE_2023 + "2023-11-16 18:15:50\n", r"line 5: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", r"holds no request"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--trace: 't.csv'.*{message}"):
        parse(text)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("\ufeff" + AZURE_2023, encoding="utf-8")
    assert len(trace.load(path).rows) == 3, "with a byte order mark, as spreadsheets write"
    with pytest.raises(ConfigError, match="No such file"):
        trace.load(tmp_path / "nowhere.csv")
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="is not a CSV file"):
        trace.load(path)
