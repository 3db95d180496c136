"""Every metric of moeray in one table.

Names follow Prometheus (base units, `_total`) and, for requests, vLLM's under the prefix `moeray_`. Counters and
histograms without the label `actor` never fall, whatever becomes of the actors that count them; series with it leave
some minutes after their actor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
MICRO = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 2.5, 10.0, 60.0)
TOKENS = tuple(float(2**n) for n in range(18))
ROWS = tuple(float(2**n) for n in range(14))


@dataclass(frozen=True)
class MetricSpec:
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def counter(text: str, *labels: str) -> MetricSpec:
    return MetricSpec("counter", text, labels)


def gauge(text: str, *labels: str) -> MetricSpec:
    return MetricSpec("gauge", text, labels)


def histogram(text: str, buckets: tuple[float, ...], *labels: str) -> MetricSpec:
    return MetricSpec("histogram", text, labels, buckets)


REQUESTS = ("model_name",)
"""The label of what vLLM names too, so that its dashboards translate by their prefix."""

METRICS: dict[str, MetricSpec] = {
    # -- requests, as vLLM names them
    "moeray_request_success_total": counter("Requests that ended, by finish reason.", *REQUESTS, "finished_reason"),
    "moeray_prompt_tokens_total": counter("Prompt tokens computed or taken from the prefix cache.", *REQUESTS),
    "moeray_generation_tokens_total": counter("Tokens generated.", *REQUESTS),
    "moeray_prefix_cache_queries_total": counter("Prompt tokens looked up in the prefix cache.", *REQUESTS),
    "moeray_prefix_cache_hits_total": counter("Prompt tokens taken from the prefix cache.", *REQUESTS),
    "moeray_num_preemptions_total": counter("Sequences preempted because blocks ran out.", *REQUESTS),
    "moeray_time_to_first_token_seconds": histogram(
        "From arrival at the router to the first token.", SECONDS, *REQUESTS
    ),
    "moeray_time_per_output_token_seconds": histogram(
        "Between a request's tokens after the first.", SECONDS, *REQUESTS
    ),
    "moeray_e2e_request_latency_seconds": histogram(
        "From arrival at the router to the last token.", SECONDS, *REQUESTS
    ),
    "moeray_request_queue_time_seconds": histogram(
        "From arrival at the router to the first step with it.", SECONDS, *REQUESTS
    ),
    "moeray_request_prompt_tokens": histogram("Prompt tokens of a request.", TOKENS, *REQUESTS),
    "moeray_request_generation_tokens": histogram("Generated tokens of a request.", TOKENS, *REQUESTS),
    "moeray_num_requests_running": gauge("Sequences that hold blocks.", *REQUESTS, "actor"),
    "moeray_num_requests_waiting": gauge("Sequences that wait for blocks.", *REQUESTS, "actor"),
    "moeray_kv_cache_usage_ratio": gauge("Used part of the KV cache.", *REQUESTS, "actor"),
    "moeray_slo_requests_total": counter("Requests that ended with all their tokens.", *REQUESTS),
    "moeray_slo_late_requests_total": counter("Of them, those that missed an objective of `control.slo_*`.", *REQUESTS),
    # -- the endpoint
    "moeray_http_requests_total": counter(
        "HTTP requests answered, by route, method and status code.", "handler", "method", "status"
    ),
    "moeray_http_request_duration_seconds": histogram(
        "From an HTTP request's head to its answer's end.", SECONDS, "handler"
    ),
    "moeray_requests_moved_total": counter(
        "Requests taken from a lost router to another one, with their tokens so far."
    ),
    # -- the way to the experts
    "moeray_step_seconds": histogram("Duration of an engine step.", SECONDS),
    "moeray_dispatch_seconds": histogram("From sending an actor's rows to having their outputs.", MICRO, "hop"),
    "moeray_combine_seconds": histogram("Weighted sum of a layer's outputs.", MICRO),
    "moeray_dispatch_rows_total": counter("Rows whose outputs came back, by hop (unix, tcp, grpc, device).", "hop"),
    "moeray_dispatch_bytes_total": counter("Tensor bytes sent to experts and received from them.", "hop", "direction"),
    "moeray_dispatch_retries_total": counter("Rows sent again after a loss, by reason.", "reason"),
    # -- expert groups
    "moeray_expert_rows_total": counter("Rows that an expert actor served.", "group", "actor"),
    "moeray_expert_forwards_total": counter("Forwards that an expert actor served.", "group", "actor"),
    "moeray_expert_busy_seconds_total": counter("Time an expert actor computed.", "group", "actor"),
    "moeray_expert_queue_wait_seconds": histogram(
        "A forward's wait from its arrival to its computation.", MICRO, "group"
    ),
    "moeray_expert_service_seconds": histogram("Computation of one forward.", MICRO, "group"),
    "moeray_expert_batch_rows": histogram("Rows of one forward.", ROWS, "group"),
    "moeray_expert_weight_bytes": gauge("Stored bytes of the experts an actor hosts.", "group", "actor"),
    "moeray_expert_hosted": gauge("Experts (replicas) that an actor hosts.", "group", "actor"),
    "moeray_actor_memory_bytes": gauge(
        "Resident memory of an actor's process, mapped weights included.", "kind", "group", "actor"
    ),
    "moeray_device_ring_bytes": gauge(
        "A GPU's memory that an actor's channels hold for rows (`wire.device_rows`).", "kind", "group", "actor"
    ),
    # -- the controller
    "moeray_info": gauge("1; the labels say what runs.", "model_name", "version", "system"),
    "moeray_actors": gauge("Actors by group and state.", "kind", "group", "state"),
    "moeray_actors_desired": gauge("Actors that are wanted, by group.", "group"),
    "moeray_actors_limit": gauge("The config's bounds of a group: min, max.", "group", "bound"),
    "moeray_actor_seconds_total": counter("Actors' lifetimes, added up.", "group"),
    "moeray_actor_cost_total": counter("Their cost by `price_per_hour`, in its currency.", "group"),
    "moeray_actor_losses_total": counter("Actors that were lost, by reason.", "kind", "group", "reason"),
    "moeray_plans_total": counter("Changes of the placement, by kind and result.", "kind", "result"),
    "moeray_migrations_total": counter("Replicas of experts mapped on an actor or dropped from one.", "change"),
    "moeray_decisions_total": counter("Decisions to scale a group, by direction (up, down).", "group", "direction"),
    "moeray_autoscaling_enabled": gauge("1 where the controller scales by itself, 0 where it is paused."),
    "moeray_placement_epoch": gauge("The newest placement epoch."),
    "moeray_replicas": gauge("Replicas of all experts."),
    "moeray_experts_without_replica": gauge("Experts that no actor hosts."),
    "moeray_experts_without_spare": gauge("Experts that fewer than two actors host."),
    "moeray_layer_skew_ratio": gauge("Max/mean rows of the actors of a layer, of late.", "layer"),
    "moeray_slo_objective_seconds": gauge("The config's objectives: ttft, tpot, queue_wait.", "objective"),
    "moeray_slo_attainment_objective_ratio": gauge("The part of the requests that is to meet them."),
    "moeray_expert_load_rows_total": counter("Rows by expert, where `metrics.expert_load` is on.", "layer", "expert"),
}
