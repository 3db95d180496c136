"""Overview: is the service well, how fast is it, what does it cost?"""

from __future__ import annotations

from moeray.dashboards.common import EVENTS, RED, SYSTEM, YELLOW, objective, percentiles
from moeray.dashboards.grafana import Dashboard, Row
from moeray.dashboards.panels import Panel, Query
from moeray.dashboards.promql import gauge, quantile, rate

GENERATED = rate("moeray_generation_tokens_total")
PROMPTS = rate("moeray_prompt_tokens_total")
COST = rate("moeray_actor_cost_total")
API = 'handler=~"/v1/.*"'
FAILED = rate("moeray_http_requests_total", where=f'{API}, status=~"5.."')
ERRORS = f"({FAILED} or vector(0)) / ({rate('moeray_http_requests_total', where=API)} > 0)"
KV_USAGE = "moeray_kv_cache_usage_ratio"

NOW = Row(
    "Now",
    (
        Panel(
            "Model", "What is served, by which version.",
            (Query(gauge("moeray_info", ("model_name", "version", "system")), "{{model_name}} · moeray {{version}}"),),
            "name", width=6, height=4,
        ),
        Panel(
            "Requests", "How many requests end per second?",
            (Query(rate("moeray_request_success_total"), "requests"),), "stat", "reqps", 3, 4,
        ),
        Panel(
            "Generated", "How many tokens are generated per second?",
            (Query(GENERATED, "tokens"),), "stat", "none", 3, 4, decimals=0,
        ),
        Panel(
            "TTFT p95", "How long do 95 of 100 requests wait for their first token at most?",
            (Query(quantile(0.95, "moeray_time_to_first_token_seconds"), "TTFT"),), "stat", "s", 3, 4,
        ),
        Panel(
            "TPOT p95", "How long is the pause between two tokens, for 95 of 100 at most?",
            (Query(quantile(0.95, "moeray_time_per_output_token_seconds"), "TPOT"),), "stat", "s", 3, 4,
        ),
        Panel(
            "Errors", "Which part of the API requests of late failed by the server's fault (5xx)?",
            (Query(ERRORS, "5xx"),), "stat", "percentunit", 3, 4, steps=((0.001, YELLOW), (0.01, RED)),
        ),
        Panel(
            "Cost per 1M", "What do a million generated tokens cost at the moment, by the config's price_per_hour?",
            (Query(f"1e6 * {COST} / ({GENERATED} > 0)", "cost"),), "stat", "none", 3, 4, decimals=2,
        ),
    ),
)  # fmt: skip

REQUESTS = Row(
    "Requests and tokens",
    (
        Panel(
            "Requests by outcome", "How many requests end per second, and how?",
            (Query(rate("moeray_request_success_total", ("finished_reason",)), "{{finished_reason}}"),),
            unit="reqps", stacked=True,
        ),
        Panel(
            "HTTP answers", "What does the endpoint answer, by route and status?",
            (Query(rate("moeray_http_requests_total", ("handler", "status")), "{{handler}} {{status}}"),), unit="reqps",
        ),
        Panel(
            "Errors", "Which part of the API requests failed by the server's fault (5xx)?",
            (Query(ERRORS, "5xx"),), unit="percentunit", steps=((0.01, RED),),
        ),
        Panel(
            "Tokens per second", "How many tokens are read (prompts) and written (generated)?",
            (Query(GENERATED, "generated"), Query(PROMPTS, "prompt")), unit="none",
        ),
        Panel(
            "Prefix cache", "Which part of the prompt tokens did not have to be computed again?",
            (
                Query(
                    f"{rate('moeray_prefix_cache_hits_total')} / ({rate('moeray_prefix_cache_queries_total')} > 0)",
                    "hits",
                ),
            ),
            unit="percentunit", axis_max=1.0,
        ),
        Panel(
            "Length of requests", "How long are prompts and answers?",
            (
                Query(quantile(0.5, "moeray_request_prompt_tokens"), "prompt p50"),
                Query(quantile(0.99, "moeray_request_prompt_tokens"), "prompt p99"),
                Query(quantile(0.5, "moeray_request_generation_tokens"), "generated p50"),
                Query(quantile(0.99, "moeray_request_generation_tokens"), "generated p99"),
            ),
            unit="none",
        ),
    ),
)  # fmt: skip

LATENCY = Row(
    "Latency",
    (
        Panel(
            "Time to first token", "How long does a user wait for the first token, and is the objective met?",
            (*percentiles("moeray_time_to_first_token_seconds"), objective("ttft")), unit="s",
        ),
        Panel(
            "Time per output token", "How fluent is the stream, and is the objective met?",
            (*percentiles("moeray_time_per_output_token_seconds"), objective("tpot")), unit="s",
        ),
        Panel(
            "Whole request", "How long does a request take from arrival to its last token?",
            percentiles("moeray_e2e_request_latency_seconds"), unit="s",
        ),
        Panel(
            "Wait for a router", "How long do requests queue until the first step that has room for them?",
            percentiles("moeray_request_queue_time_seconds"), unit="s",
        ),
        Panel(
            "HTTP", "How long until an API answer is complete, as seen by the ingress?",
            (
                Query(
                    quantile(0.99, "moeray_http_request_duration_seconds", ("handler",), where=API), "{{handler}} p99"
                ),
            ),
            unit="s",
        ),
        Panel(
            "Engine step", "How long does a router compute until every running request has its next token?",
            percentiles("moeray_step_seconds"), unit="s",
        ),
    ),
)  # fmt: skip

CAPACITY = Row(
    "Queue, KV cache, cost",
    (
        Panel(
            "Requests in the routers", "How many requests run, and how many wait for blocks of the KV cache?",
            (
                Query(gauge("moeray_num_requests_running", ("actor",)), "{{actor}} running"),
                Query(gauge("moeray_num_requests_waiting", ("actor",)), "{{actor}} waiting"),
            ),
            unit="none",
        ),
        Panel(
            "KV cache", "How full is the KV cache of each router? When it is full, requests wait or are preempted.",
            (Query(gauge(KV_USAGE, ("actor",), fold="max"), "{{actor}}"),),
            unit="percentunit", axis_max=1.0, steps=((0.95, RED),),
        ),
        Panel(
            "Preempted and moved",
            "How often does a request start over: preempted for want of blocks, or moved away from a lost router?",
            (
                Query(rate("moeray_num_preemptions_total"), "preempted"),
                Query(rate("moeray_requests_moved_total"), "moved"),
            ),
            unit="cps",
        ),
        Panel(
            "Actors",
            "What runs, in which state? All ready is the rule; starting and draining pass, pending waits for room.",
            (Query(gauge("moeray_actors", ("kind", "state")), "{{kind}} {{state}}"),), unit="none", stacked=True,
        ),
        Panel(
            "Memory of the actors",
            "How much memory does each process hold, mapped weights included, and how much of a GPU's for rows?",
            (
                Query(gauge("moeray_actor_memory_bytes", ("actor",)), "{{actor}}"),
                Query(gauge("moeray_device_ring_bytes", ("actor",)), "{{actor}} for rows, GPU"),
            ),
            unit="bytes",
        ),
        Panel(
            "Cost per million tokens", "What do a million tokens cost, in the currency of price_per_hour?",
            (
                Query(f"1e6 * {COST} / ({GENERATED} > 0)", "generated"),
                Query(f"1e6 * {COST} / ({GENERATED} + {PROMPTS} > 0)", "generated or read"),
            ),
            unit="none",
        ),
    ),
)  # fmt: skip

OVERVIEW = Dashboard(
    "overview",
    "moeray / Overview",
    "Requests, tokens, latency, errors and cost of a moeray system.",
    (NOW, REQUESTS, LATENCY, CAPACITY),
    SYSTEM,
    EVENTS,
)
