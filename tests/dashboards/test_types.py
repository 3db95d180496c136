"""The dashboards against Grafana's own TypeScript types: the compiler finds a misspelt or missing option."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from moeray.dashboards.catalog import DASHBOARDS
from moeray.dashboards.grafana import dashboard_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed"),
]

PANELS = {
    "timeseries": "TimeSeries", "stat": "Stat", "bargauge": "BarGauge", "table": "Table", "heatmap": "Heatmap",
}  # fmt: skip
"""Grafana's name of a panel -> the name of its types."""

HEAD = """
import type { AnnotationQuery, Dashboard as General } from '@grafana/schema';
// An annotation has options of its kind of data source beside the general ones; these are Prometheus's.
type Annotation = AnnotationQuery
  & { expr?: string; step?: string; titleFormat?: string; textFormat?: string; useValueForTime?: boolean };
type Dashboard = Omit<General, 'annotations'> & { annotations: { list: Annotation[] } };
// JSON has an enum's values, not its members.
type Plain<T> = T extends string ? `${T}` : T extends Array<infer E> ? Plain<E>[]
  : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
"""


@pytest.fixture(scope="module", params=["11.6.0", "13.2.3"])
def project(request, tmp_path_factory):
    """A TypeScript project with one version of Grafana's types."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "package.json").write_text('{"private": true}')
    packages = [f"@grafana/schema@{request.param}", "typescript@5.9"]
    done = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", *packages],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode != 0 and any(code in done.stderr for code in ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED")):
        pytest.skip("npm's registry cannot be reached")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def source(dashboard: dict) -> str:
    """A program that is correct where the dashboard is; each panel's options by the types of its kind."""
    lines = [HEAD]
    for kind, name in PANELS.items():
        path = f"./node_modules/@grafana/schema/dist/esm/raw/composable/{kind}/panelcfg/x/{name}PanelCfg_types.gen"
        lines.append(f"import type * as {name} from '{path}';")
    lines.append(f"export const dashboard: Plain<Dashboard> = {json.dumps(dashboard)};")
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            continue
        name = PANELS[panel["type"]]
        lines.append(f"export const options{panel['id']}: Plain<{name}.Options> = {json.dumps(panel['options'])};")
        if custom := panel["fieldConfig"]["defaults"]["custom"]:
            lines.append(f"export const field{panel['id']}: Plain<{name}.FieldConfig> = {json.dumps(custom)};")
    return "\n".join(lines)


def compile_all(folder: Path, **programs: str) -> str:
    """What the compiler has to say."""
    for old in folder.glob("*.ts"):
        old.unlink()
    for name, text in programs.items():
        (folder / f"{name}.ts").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            "npx", "tsc", "--noEmit", "--strict", "--skipLibCheck", "--target", "es2022", "--module", "esnext",
            "--moduleResolution", "bundler", *(f"{name}.ts" for name in programs),
        ],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.stdout


def test_the_dashboards_are_of_grafanas_types(project):
    programs = {dashboard.name: source(dashboard_json(dashboard)) for dashboard in DASHBOARDS}
    assert compile_all(project, **programs) == ""


def test_the_compiler_finds_what_is_wrong(project):
    dashboard = dashboard_json(DASHBOARDS[0])
    dashboard["panels"][1]["options"]["textModus"] = "auto"
    dashboard["templating"]["list"][0]["hide"] = 7
    said = compile_all(project, broken=source(dashboard))
    assert "textModus" in said
    assert "hide" in said or "7" in said
