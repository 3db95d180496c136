"""What benchmarks print fits into 80 columns, with the largest figures that are likely."""

import pytest

from moeray.cli import bench_engine, bench_kernel, bench_serve

WHERE = {"cpu": "Xeon", "cores": 96}
BUDGET = {
    "step_ms": 12884.0, "trunk_ms": 1120.1, "gate_ms": 12.3, "dispatch_ms": 143.2, "experts_ms": 12272.0,
    "combine_ms": 13.1, "sampling_ms": 14.2, "other_ms": 15.9, "tax": 0.123,
}  # fmt: skip
ENGINE = {
    "prefill_tok_s": 120413.0, "decode_tok_s": 12345.6, "prefill_ratio": 10.07, "decode_ratio": 10.69, "budget": BUDGET,
}  # fmt: skip
TIMES = {"p50": 12.345, "p99": 23.456}
SERVED = {"errors": 0, "requests_per_s": 123.4, "output_tok_s": 12345.6, "ttft_s": TIMES, "tpot_s": TIMES}
KERNEL = {
    "format": "mxfp4", "kernel": "native", "rows": 256, "threads": 128, "seconds": 1.2345, "median_s": 1.3345,
    "gb_per_s": 987.6, "read_gb_per_s": 900.0, "gflop_per_s": 12345.0, "peak_gflop_per_s": 12000.0, "roofline": 1.03,
    "error": 0.01234,
}  # fmt: skip


@pytest.mark.parametrize(
    ("show", "result", "words"),
    [
        (
            bench_engine.show,
            {
                "model": "/models/granite", "environment": WHERE, "load_average": 1.0,
                "rows": [{"batch": 128, "in process": ENGINE}],
            },
            "128 in process 12884 1120 12.3 143.2 12272 13.1 14.2 15.9 12%",
        ),
        (
            bench_serve.show,
            {
                "requests": {"count": 640, "prompt": 2560, "output": 64}, "endpoints": {"moeray": "http://a"},
                "rows": [{"concurrency": 128, "rate": None, "moeray": SERVED}],
            },
            "128 at once moeray 123.4 12345.6 12345 23456 12345 23456 0",
        ),
        (
            bench_kernel.show,
            {
                "plan": {"distinct": 8, "hidden": 1024, "intermediate": 512, "repeat": 7}, "machine": "a CPU",
                "multiplies": "bf16", "environment": WHERE, "figures": [KERNEL],
            },
            "mxfp4 native 256 128 1234 1334 987.6 110% 12345 103% 103% 0.0123",
        ),
    ],
)  # fmt: skip
def test_80_columns_show_it_all(monkeypatch, capsys, show, result, words):
    monkeypatch.setenv("COLUMNS", "80")
    show(result)
    lines = capsys.readouterr().out.splitlines()
    assert "…" not in "".join(lines)
    assert words in [" ".join(line.split()) for line in lines]
