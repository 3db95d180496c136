"""Trace readers: both formats by content, and one line with file and line number for what is wrong."""

import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from moeray.control.trace import read_trace, trace_of
from moeray.errors import TraceError

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,0\n"
)
MOONCAKE = (
    '{"timestamp": 500, "input_length": 10, "output_length": 3, "hash_ids": [0]}\n'
    '{"timestamp": 0, "input_length": 7, "output_length": 1, "hash_ids": []}\n'
)
SHARED = Path(os.environ.get("MOERAY_TRACES") or Path(__file__).parents[3] / "shared" / "traces")


@pytest.mark.parametrize(
    ("text", "arrival", "prompt", "output"),
    [
        (AZURE, [0, 4.314579], [374, 396], [44, 1]),
        (AZURE.replace("\n", "\r\n"), [0, 4.314579], [374, 396], [44, 1]),
        ("\ufeff" + AZURE, [0, 4.314579], [374, 396], [44, 1]),
        (
            "GeneratedTokens,model,TIMESTAMP,ContextTokens\n5,m,2024-05-10 00:00:01+00:00,6\n"
            "7,m,2024-05-10 00:00:00+00:00,8\n",
            [0, 1], [8, 6], [7, 5],
        ),
        (MOONCAKE, [0, 0.5], [7, 10], [1, 3]),
        (AZURE.replace("TIMESTAMP,ContextTokens,GeneratedTokens", '"TIMESTAMP","ContextTokens","GeneratedTokens"'),
         [0, 4.314579], [374, 396], [44, 1]),
        ('"","TIMESTAMP","ContextTokens","GeneratedTokens"\n"1","2024-05-10 00:00:01","6","5"\n', [0], [6], [5]),
        ("\n\n" + AZURE, [0, 4.314579], [374, 396], [44, 1]),
        (MOONCAKE.replace("[0]", '["a\u2028b"]'), [0, 0.5], [7, 10], [1, 3]),
    ],
)  # fmt: skip
def test_both_formats_are_read_and_sorted(tmp_path, text, arrival, prompt, output):
    path = tmp_path / "any-name"
    path.write_text(text)
    trace = read_trace(path)
    assert trace.arrival_s == pytest.approx(arrival)
    assert (trace.prompt.tolist(), trace.output.tolist()) == (prompt, output)


@pytest.mark.parametrize(
    ("text", "began"),
    [
        (AZURE, datetime(2023, 11, 16, 18, 15, 46, 680590, tzinfo=UTC)),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 02:00:01+02:00,6,5\n2024-05-10 00:00:00+00:00,8,7\n",
            datetime(2024, 5, 10, tzinfo=UTC),
        ),
        (MOONCAKE, datetime(2024, 1, 1, tzinfo=UTC)),  # as good as any
    ],
)
def test_a_trace_knows_when_it_began(tmp_path, text, began):
    path = tmp_path / "any-name"
    path.write_text(text)
    assert read_trace(path).began_at == pytest.approx(began.timestamp())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: neither"),
        ("a,b,c\n1,2,3\n", "line 1: neither"),
        ('["' + "1" * 200_000 + '"]', "line 1: neither"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no request"),
        (AZURE + "2023-11-16 18:15:51,12\n", "line 4: has 2 columns"),
        (AZURE + "yesterday,1,2\n", "line 4: Invalid isoformat"),
        (AZURE + "2023-11-16 18:15:51,1,-2\n", "line 4: token counts must be between 0 and 10,000,000"),
        (AZURE + "2023-11-16 18:15:51,9" + "9" * 20 + ",2\n", "line 4: token counts must be between 0 and 10,000,000"),
        (
            AZURE + "2020-11-16 18:15:51,5,2\n",
            "for 1095 days before the request at 2023-11-16 18:15:46",
        ),
        (AZURE + "2023-11-16 18:15:51,1.5,2\n", "line 4: token counts must be whole numbers, got '1.5'"),
        (MOONCAKE + '{"timestamp": 1}\n', "line 3: lacks input_length, output_length"),
        (MOONCAKE + "\n{\n", "line 4: Expecting"),
        (MOONCAKE + "[1]\n", "line 3: is not a JSON object"),
        (MOONCAKE.replace("500", '"soon"'), "line 1: timestamp must be a number"),
        (MOONCAKE.replace("10", "true"), "line 1: token counts must be whole numbers"),
        (MOONCAKE.replace("500", "NaN"), "line 1: timestamp must be of the years 1 to 9999"),
        (MOONCAKE.replace("500", "Infinity"), "line 1: timestamp must be of the years 1 to 9999"),
        (MOONCAKE.replace("500", "1" + "0" * 400), "line 1: timestamp must be of the years 1 to 9999"),
        (MOONCAKE.replace("500", "-200000000000000"), "line 1: timestamp must be of the years 1 to 9999"),
        (AZURE.replace("2023-11-16 18:15:50.9951690", "9999-12-31 23:59:59-05:00"), "line 3: timestamp must be of the"),
        (MOONCAKE.replace("10", "[" * 100_000), "line 1: maximum recursion depth"),
        (AZURE + '2023-11-16 18:15:51,"' + "1" * 200_000 + '",2\n', "line 4: field larger than field limit"),
        ("\n" + AZURE + "yesterday,1,2\n", "line 5: Invalid isoformat"),
    ],
)
def test_a_bad_row_is_named(tmp_path, text, message):
    path = tmp_path / "trace.txt"
    path.write_text(text)
    with pytest.raises(TraceError, match=r"trace\.txt") as raised:
        read_trace(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_or_binary_file_is_one_line(tmp_path):
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="not UTF-8"):
        read_trace(tmp_path / "x")


@pytest.mark.parametrize(
    ("arrivals", "start_s", "length_s", "left", "duration_s"),
    [
        ([0, 1, 2, 3], 0, 3, 3, 3),
        ([0, 1, 2, 3], 0, 3.5, 4, 3),
        ([0, 1, 2, 3], 1, 1000, 3, 2),
        ([0, 1, 2, 3], 3, None, 1, 0),
        ([0], 0, 300, 1, 0),
    ],
)
def test_a_window_has_the_last_request_where_it_reaches_so_far(arrivals, start_s, length_s, left, duration_s):
    part = trace_of("t", [(at, 1, 1) for at in arrivals]).window(start_s, length_s)
    assert (len(part), part.duration_s) == (left, duration_s)


def test_windows_speed_and_scale():
    trace = trace_of("t", [(i, i + 1, 1) for i in range(100)])
    assert trace.window(10, 20).faster(4).scaled(2).began_at == trace.began_at + 10
    part = trace.window(10, 20)
    assert (part.arrival_s[0], len(part), part.prompt[0], part.duration_s) == (0, 20, 11, 20)
    assert len(trace.window(90, None)) == 10
    with pytest.raises(TraceError, match="no request between"):
        trace.window(200, 10)
    assert trace.faster(4).arrival_s[-1] == pytest.approx(99 / 4)
    assert len(trace.scaled(0.25)) == 25
    double = trace.scaled(2)
    assert len(double) == 200
    assert (np.diff(double.arrival_s) >= 0).all()
    assert double.arrival_s[1] == pytest.approx(0.5)
    with pytest.raises(TraceError, match="no request is left"):
        trace.scaled(0.001)
    for factor in (1e6, 1e308):
        with pytest.raises(TraceError, match=r"may have 10,000,000; lower the factor"):
            trace.scaled(factor)


@pytest.mark.parametrize(
    ("prompt", "output", "context", "left"),
    [
        (60, 40, 100, (60, 40)),
        (61, 40, 100, (60, 40)),
        (7000, 40, 100, (60, 40)),
        (60, 7000, 100, (50, 50)),
        (10, 7000, 100, (10, 50)),
        (9, 9, 1, (1, 1)),
    ],
)
def test_a_request_is_cut_to_a_context(prompt, output, context, left):
    cut = trace_of("t", [(0.0, prompt, output), (1.0, 1, 1)]).clipped(context)
    assert (cut.prompt[0], cut.output[0]) == left
    assert (cut.prompt[1], cut.output[1]) == (1, 1)
    assert cut.arrival_s.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("name", "requests"),
    [
        ("AzureLLMInferenceTrace_conv.csv", 19366),
        ("AzureLLMInferenceTrace_code.csv", 8819),
        ("mooncake_conversation_trace.jsonl", 12031),
    ],
)
def test_public_traces(name, requests):
    if not (SHARED / name).exists():
        pytest.skip(f"the public trace {name} is not on this machine")
    assert len(read_trace(SHARED / name)) == requests
