"""The rules of deploy/prometheus/rules as the Prometheus operator takes them; `python -m tests.deploy.rules` writes."""

from __future__ import annotations

import yaml

from tests.deploy.manifests import FOLDER, ROOT, Manifest, raw

RULES = ROOT / "deploy" / "prometheus" / "rules"
TARGET = FOLDER / "monitoring" / "prometheusrule.yaml"


def prometheus_rule() -> Manifest:
    """The PrometheusRule with the groups of all rule files, by file name."""
    files = sorted(RULES.glob("*.yml")) + sorted(RULES.glob("*.yaml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    return {**raw("monitoring/prometheusrule.yaml"), "spec": {"groups": groups}}


def main() -> None:
    comment = [line for line in TARGET.read_text().splitlines(keepends=True) if line.startswith("#")]
    TARGET.write_text("".join(comment) + yaml.safe_dump(prometheus_rule(), sort_keys=False, width=120))


if __name__ == "__main__":
    main()
