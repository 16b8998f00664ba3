"""Metrics, status, model info, the prefix cache's flush, and what counts as what."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ziphius.frontend.metrics import Histogram, TokenRate

CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 4}


def samples(http):
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sorted(f"{k}={v}" for k, v in sample.labels.items() if k != "model_name")): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_metrics_count_what_happened(start_server):
    server = start_server()
    with server.http() as http:
        http.post("/v1/chat/completions", json=CHAT)
        http.post("/v1/chat/completions", json=CHAT)
        http.post("/v1/chat/completions", json={**CHAT, "n": 0})
        http.get("/made/up/path")
        told = samples(http)
    assert told["sglang:num_requests_total",] == 2
    assert told["sglang:generation_tokens_total",] == 8
    assert told["sglang:prompt_tokens_total",] == 2 * len(server.core.added[0].prompt_ids)
    assert told["sglang:cached_tokens_total",] == len(server.core.added[0].prompt_ids) - 1
    assert told["sglang:time_to_first_token_seconds_count",] == 2
    assert told["sglang:inter_token_latency_seconds_count",] == 6
    assert told["sglang:e2e_request_latency_seconds_bucket", "le=+Inf"] == 2
    assert told["sglang:num_running_reqs",] == 0
    assert told["sglang:max_total_num_tokens",] == 16000
    chat = ("endpoint=/v1/chat/completions", "method=POST")
    assert told["sglang:http_requests_total", *chat] == 3
    assert told["sglang:http_responses_total", *chat, "status_code=200"] == 2
    assert told["sglang:http_responses_total", *chat, "status_code=400"] == 1
    assert told["sglang:http_responses_total", "endpoint=other", "method=GET", "status_code=404"] == 1
    assert told["sglang:http_requests_active",] == 1


def test_two_servers_count_for_themselves(start_server):
    one, other = start_server(), start_server()
    with one.http() as http:
        http.post("/v1/chat/completions", json=CHAT)
    with other.http() as http:
        assert samples(http)["sglang:num_requests_total",] == 0


def test_status(http, server):
    http.post("/v1/chat/completions", json=CHAT)
    status = http.get("/status").json()
    assert status["state"] == "ready"
    assert status["model"] == "fake-model"
    assert status["kv_tokens"] == 16000
    assert status["engine_pids"] == []
    assert set(status) == {
        "state", "progress", "model", "uptime_s", "running", "queued", "generated_tokens_per_s", "prompt_tokens_per_s",
        "kv_tokens", "kv_tokens_used", "engine_pids", "version", "error",
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/get_model_info", "/model_info"])
def test_model_info(http, path):
    info = http.get(path).json()
    assert info["served_model_name"] == "fake-model"
    assert info["is_generation"] is True
    assert info["architectures"] == ["LlamaForCausalLM"]
    assert info["context_length"] == 512


def test_flush_cache(http):
    for method in ("GET", "POST"):
        response = http.request(method, "/flush_cache")
        assert response.status_code == 200
        assert response.text.startswith("Cache flushed.")


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping"])
def test_healthy(http, path):
    assert (http.get(path).status_code, http.get(path).content) == (200, b"")
    assert http.head(path).status_code == 200


def test_rates_forget_what_is_long_ago():
    now = 100.0
    meter = TokenRate(clock=lambda: now)
    meter.add(10)
    now = 101.0
    meter.add(30)
    assert meter.rate() == 10
    now = 102.5
    assert meter.rate() == 20
    now = 120.0
    assert meter.rate() == 0


def test_histogram_buckets_are_cumulative():
    histogram = Histogram((1.0, 2.0))
    histogram.observe(1.0)
    histogram.observe(1.5, times=2)
    histogram.observe(9.0)
    family = histogram.family("x", "help", {})
    assert [(s.labels.get("le"), s.value) for s in family.samples if s.name == "x_bucket"] == [
        ("1.0", 1), ("2.0", 3), ("+Inf", 4),
    ]  # fmt: skip
    assert next(s.value for s in family.samples if s.name == "x_sum") == 13.0
