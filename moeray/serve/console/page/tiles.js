// Throughput and latency: the figure of now, and a line of the last two minutes.

import { DASH, duration, number, percent } from "./format.js";

const SPAN_S = 120;
const HIGH = 36;

const per = (value, unit) => [number(value), value === null ? "" : unit];

const TILES = [
  {
    title: "Tokens generated",
    line: "generation_tokens_per_s",
    value: (f) => per(f.generation_tokens_per_s, "/s"),
    more: (f) => `prompts ${per(f.prompt_tokens_per_s, "/s").join("")}`,
  },
  {
    title: "To the first token",
    line: "ttft_p50_s",
    second: "ttft_p95_s",
    value: (f) => duration(f.ttft_p50_s),
    more: (f) => `p95 ${duration(f.ttft_p95_s).join(" ")}`,
  },
  {
    title: "Between tokens",
    line: "tpot_p50_s",
    second: "tpot_p95_s",
    value: (f) => duration(f.tpot_p50_s),
    more: (f) => `p95 ${duration(f.tpot_p95_s).join(" ")}`,
  },
  {
    title: "Requests running",
    line: "running",
    second: "waiting",
    value: (f) => [number(f.running), ""],
    more: (f) => `${number(f.waiting)} waiting`,
  },
  {
    title: "KV cache in use",
    line: "kv_usage",
    least: 1,
    value: (f) => percent(f.kv_usage),
    more: () => "of the fullest router",
  },
];

export class Tiles {
  #history = [];

  constructor(parent) {
    this.tiles = TILES.map((spec) => new Tile(spec));
    parent.append(...this.tiles.map((tile) => tile.element));
  }

  /** `figures` at a time in unix seconds. The same picture may come twice. */
  show(at, figures) {
    if (this.#history.at(-1)?.at === at) return;
    this.#history.push({ at, figures });
    while (this.#history[0].at < at - SPAN_S) this.#history.shift();
    for (const tile of this.tiles) tile.show(at, figures, this.#history);
  }
}

class Tile {
  constructor(spec) {
    this.spec = spec;
    this.element = element("article", "tile");
    this.digits = document.createTextNode(DASH);
    this.unit = document.createElement("small");
    this.more = element("p", "more");
    const title = document.createElement("h3");
    title.textContent = spec.title;
    const value = element("p", "value");
    value.append(this.digits, this.unit);
    this.element.append(title, value, this.more, this.#chart());
  }

  #chart() {
    const svg = vector("svg", { viewBox: `0 0 ${SPAN_S} ${HIGH}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    this.second = vector("path", { class: "second" });
    this.line = vector("path", {});
    svg.append(vector("line", { x1: 0, x2: SPAN_S, y1: HIGH, y2: HIGH }), this.second, this.line);
    return svg;
  }

  show(at, figures, history) {
    const [digits, unit] = this.spec.value(figures);
    this.digits.data = digits;
    this.unit.textContent = unit;
    this.more.textContent = this.spec.more(figures);
    const names = [this.spec.line, this.spec.second].filter(Boolean);
    const values = history.flatMap((point) => names.map((name) => point.figures[name] ?? 0));
    const top = Math.max(this.spec.least ?? 0, ...values) || 1;
    this.line.setAttribute("d", path(history, this.spec.line, at, top));
    if (this.spec.second) this.second.setAttribute("d", path(history, this.spec.second, at, top));
  }
}

/** A line through the points that have a value; it is broken where there is none. */
function path(history, name, at, top) {
  let pen = "M";
  const parts = [];
  for (const point of history) {
    const value = point.figures[name];
    if (value === null) {
      pen = "M";
      continue;
    }
    const x = SPAN_S - (at - point.at);
    const y = HIGH - (value / top) * (HIGH - 2);
    parts.push(`${pen}${x.toFixed(1)} ${y.toFixed(1)}`);
    pen = "L";
  }
  return parts.join("");
}

function element(name, className) {
  const made = document.createElement(name);
  made.className = className;
  return made;
}

function vector(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
