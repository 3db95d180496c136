#!/usr/bin/env bash
# Draws dashboards/*.png from a run of some minutes: load that rises and falls, and an expert actor that is killed.
#   usage: dashboards/pictures.sh MODEL [moeray serve's flags]      needs: prometheus, moeray[plot]
set -euo pipefail
cd "$(dirname "$0")/.."
url=http://127.0.0.1:8000 scrape=5 work=$(mktemp -d) began=$(date +%s)
prometheus=
trap 'kill $prometheus; kill -INT "$server"; wait "$server" || true; rm -rf "$work"' EXIT

moeray serve --experts-replicas 2 --experts-min-actors 2 --experts-max-actors 4 --router-max-actors 2 \
  --experts-num-cpus 0.1 --router-num-cpus 0.1 --control-slo-ttft-s 5 --control-slo-tpot-s 0.6 \
  --control-shrink-votes 5 "$@" >"$work/serve.log" 2>&1 &
server=$!
until grep -q "^serving" "$work/serve.log"; do
  kill -0 "$server" || { tail "$work/serve.log"; exit 1; }
  sleep 1
done
sed "s/interval: 15s/interval: ${scrape}s/; s#rules/#$PWD/deploy/prometheus/rules/#" deploy/prometheus/prometheus.yml >"$work/prometheus.yml"
prometheus --config.file="$work/prometheus.yml" --storage.tsdb.path="$work/data" --web.listen-address=127.0.0.1:9090 2>"$work/prometheus.log" &
prometheus=$!

load() { # CONCURRENCY SECONDS
  local until=$((SECONDS + $2))
  while [ "$SECONDS" -lt "$until" ]; do
    moeray bench serve "$url" --concurrency "$1" --requests $((6 * $1)) --prompt-tokens 64 --output-tokens 32
  done
}
victim() { # the process of an expert actor that serves
  moeray status --output json | python -c 'import json, sys
print(next(row["pid"] for row in json.load(sys.stdin)["actors"] if row["kind"] == "expert" and row["state"] == "ready"))'
}
load 2 15
load 12 55
(sleep 15 && kill -9 "$(victim)") & # under the load that follows
load 12 45
load 1 40
moeray dashboards dashboards --draw http://127.0.0.1:9090 --scrape "$scrape" \
  --minutes "$(python -c "import time; print((time.time() - $began) / 60)")"
