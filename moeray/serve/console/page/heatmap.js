// The layer x expert heat map: a column for each MoE layer, in the order in which tokens pass them, and a row for each
// expert. Rates move evenly from one picture to the next.

import { count, number } from "./format.js";

const EASE_MS = 260;
const GAMMA = 0.75; // below 1: little load is seen beside much
const HEIGHT = 340; // what the cells share, in CSS pixels, within the bounds of one cell
const CELL = { least: 2, most: 24 };
const AXIS = { left: 30, bottom: 20 };
const STILL = matchMedia("(prefers-reduced-motion: reduce)");
const DARK = matchMedia("(prefers-color-scheme: dark)");

export class Heatmap {
  #layers = [];
  #replicas = [];
  #offsets = [0];
  #rows = 0;
  #target = new Float32Array(0);
  #shown = new Float32Array(0);
  #top = 1;
  #usual = 1;
  #cell = 0;
  #cursor = null;
  #frame = 0;
  #before = 0;
  #colours = [];
  #ratio = 0;

  /** `page`: canvas, tip, spoken, scale, scaleHigh, legendReplicas, legendMissing. */
  constructor(page) {
    this.page = page;
    this.#readColours();
    DARK.addEventListener("change", () => {
      this.#readColours();
      this.#draw();
    });
    new ResizeObserver(() => this.#resize()).observe(page.canvas.parentElement);
    page.canvas.addEventListener("pointermove", (event) => this.#point(event));
    page.canvas.addEventListener("pointerdown", (event) => this.#point(event));
    page.canvas.addEventListener("pointerleave", () => this.#leave());
    page.canvas.addEventListener("blur", () => this.#leave());
    page.canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  /** `layers`: [{layer, rates, replicas}], both lists by expert. */
  show(layers) {
    const shape = layers.map((row) => `${row.layer}:${row.rates.length}`).join();
    const same = shape === this.#layers.map((row) => `${row.layer}:${row.rates.length}`).join();
    this.#layers = layers;
    this.#replicas = layers.flatMap((row) => row.replicas);
    this.#usual = Math.max(1, Math.min(...this.#replicas.filter((held) => held)));
    this.#target = Float32Array.from(layers.flatMap((row) => row.rates));
    if (!same) {
      this.#offsets = layers.reduce((ends, row) => [...ends, ends.at(-1) + row.rates.length], [0]);
      this.#rows = Math.max(0, ...layers.map((row) => row.rates.length));
      this.#shown = new Float32Array(this.#target.length);
      this.#cursor = null;
      this.#resize();
    }
    this.page.legendReplicas.hidden = !this.#replicas.some((held) => held > this.#usual);
    this.page.legendMissing.hidden = !this.#replicas.includes(0);
    this.#tell();
    this.#move();
  }

  // -- moving ---------------------------------------------------------------------------------------------------

  #move() {
    if (this.#frame) return;
    this.#before = performance.now();
    this.#frame = requestAnimationFrame((now) => this.#step(now));
  }

  #step(now) {
    const part = STILL.matches ? 1 : 1 - Math.exp(-Math.min(100, now - this.#before) / EASE_MS);
    this.#before = now;
    const peak = this.#target.reduce((most, rate) => Math.max(most, rate), 1);
    let left = Math.abs(peak - this.#top) / peak;
    this.#top += (peak > this.#top ? part : part / 4) * (peak - this.#top); // the scale rises at once, and falls slowly
    for (let i = 0; i < this.#target.length; i += 1) {
      const away = this.#target[i] - this.#shown[i];
      this.#shown[i] += part * away;
      left = Math.max(left, Math.abs(away) / this.#top);
    }
    this.#draw();
    this.#frame = left > 0.004 ? requestAnimationFrame((next) => this.#step(next)) : 0;
  }

  // -- drawing --------------------------------------------------------------------------------------------------

  #readColours() {
    const style = getComputedStyle(document.documentElement);
    const stops = [0, 1, 2, 3, 4].map((i) => rgb(style.getPropertyValue(`--heat-${i}`)));
    this.#colours = Array.from({ length: 256 }, (_, i) => blend(stops, i / 255));
    this.ink = style.getPropertyValue("--heat-ink");
    this.muted = style.getPropertyValue("--muted");
    this.panel = style.getPropertyValue("--panel");
    this.bad = style.getPropertyValue("--bad");
    const scale = this.page.scale.getContext("2d");
    const width = this.page.scale.width;
    for (let x = 0; x < width; x += 1) {
      scale.fillStyle = this.#colour((x / (width - 1)) * this.#top);
      scale.fillRect(x, 0, 1, this.page.scale.height);
    }
  }

  #colour(rate) {
    return this.#colours[Math.round(255 * Math.min(1, rate / this.#top) ** GAMMA)];
  }

  #resize() {
    if (!this.#rows) return;
    const { canvas } = this.page;
    const width = canvas.clientWidth;
    this.#ratio = devicePixelRatio;
    this.#cell = Math.max(CELL.least, Math.min(CELL.most, Math.floor(HEIGHT / this.#rows)));
    canvas.style.height = `${this.#rows * this.#cell + AXIS.bottom}px`;
    canvas.width = Math.round(width * this.#ratio);
    canvas.height = Math.round((this.#rows * this.#cell + AXIS.bottom) * this.#ratio);
    this.#draw();
  }

  /** Left edge of a layer's column, in whole pixels. */
  #x(place) {
    return AXIS.left + Math.round((place * (this.page.canvas.clientWidth - AXIS.left)) / this.#layers.length);
  }

  #draw() {
    if (!this.#rows) return;
    if (this.#ratio !== devicePixelRatio) return this.#resize(); // another screen, or another zoom
    const { canvas } = this.page;
    const draw = canvas.getContext("2d");
    draw.setTransform(this.#ratio, 0, 0, this.#ratio, 0, 0);
    draw.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    this.#layers.forEach((row, place) => this.#column(draw, place, row.rates.length));
    this.#axes(draw);
    if (this.#cursor) this.#outline(draw);
    this.page.scaleHigh.textContent = number(this.#top);
  }

  #column(draw, place, experts) {
    const x = this.#x(place);
    const width = this.#x(place + 1) - x;
    const gap = Math.min(width, this.#cell) > 4 ? 1 : 0;
    const round = gap && Math.min(width, this.#cell) > 9 ? 2 : 0;
    for (let expert = 0; expert < experts; expert += 1) {
      const index = this.#offsets[place] + expert;
      const y = expert * this.#cell;
      draw.fillStyle = this.#colour(this.#shown[index]);
      if (round) {
        draw.beginPath();
        draw.roundRect(x, y, width - gap, this.#cell - gap, round);
        draw.fill();
      } else {
        draw.fillRect(x, y, width - gap, this.#cell - gap);
      }
      const held = this.#replicas[index];
      if (held > this.#usual || held === 0) this.#mark(draw, x + (width - gap) / 2, y + (this.#cell - gap) / 2, held);
    }
  }

  /** An expert with more replicas than others have, or with none. */
  #mark(draw, x, y, held) {
    const size = Math.max(1, Math.min(3, this.#cell / 4));
    draw.fillStyle = held ? this.panel : this.bad;
    draw.strokeStyle = this.ink;
    draw.beginPath();
    if (held) draw.arc(x, y, size, 0, 2 * Math.PI);
    else draw.rect(x - size, y - size, 2 * size, 2 * size);
    draw.fill();
    if (this.#cell > 6) draw.stroke();
  }

  #axes(draw) {
    draw.fillStyle = this.muted;
    draw.font = `11px ${getComputedStyle(document.documentElement).fontFamily}`;
    draw.textAlign = "right";
    draw.textBaseline = "middle";
    for (const expert of ticks(this.#rows, this.#cell, 18)) {
      draw.fillText(String(expert), AXIS.left - 7, (expert + 0.5) * this.#cell);
    }
    draw.textAlign = "center";
    draw.textBaseline = "alphabetic";
    const y = this.#rows * this.#cell + 14;
    const width = (this.page.canvas.clientWidth - AXIS.left) / this.#layers.length;
    for (const place of ticks(this.#layers.length, width, 26)) {
      draw.fillText(String(this.#layers[place].layer), (this.#x(place) + this.#x(place + 1)) / 2, y);
    }
  }

  #outline(draw) {
    const [place, expert] = this.#cursor;
    draw.strokeStyle = this.ink;
    draw.lineWidth = 1.5;
    draw.strokeRect(
      this.#x(place) - 0.5, expert * this.#cell - 0.5, this.#x(place + 1) - this.#x(place), Math.max(3, this.#cell),
    );
  }

  // -- looking closer -------------------------------------------------------------------------------------------

  #point(event) {
    const width = (this.page.canvas.clientWidth - AXIS.left) / this.#layers.length;
    this.#choose(Math.floor((event.offsetX - AXIS.left) / width), Math.floor(event.offsetY / this.#cell));
  }

  #key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "Escape") this.#leave();
    const step = steps[event.key];
    if (!step || !this.#layers.length) return;
    event.preventDefault();
    const [place, expert] = this.#cursor ?? [-step[0], -step[1]]; // the first key leads to the first expert
    const column = Math.max(0, Math.min(this.#layers.length - 1, place + step[0]));
    this.#choose(column, Math.max(0, Math.min(this.#layers[column].rates.length - 1, expert + step[1])));
    this.page.spoken.textContent = [...this.page.tip.children].map((line) => line.textContent).join(", ");
  }

  #choose(place, expert) {
    if (!(expert >= 0 && expert < (this.#layers[place]?.rates.length ?? 0))) return this.#leave();
    this.#cursor = [place, expert];
    this.#tell();
    this.#draw();
  }

  #leave() {
    this.#cursor = null;
    this.page.tip.hidden = true;
    this.#draw();
  }

  #tell() {
    if (!this.#cursor) return;
    const [place, expert] = this.#cursor;
    const { tip, canvas } = this.page;
    const row = this.#layers[place];
    const head = document.createElement("b");
    head.textContent = `Layer ${row.layer}, expert ${expert}`;
    const lines = [`${number(row.rates[expert])} rows/s`, count(row.replicas[expert], "replica")].map((text) => {
      const line = document.createElement("span");
      line.textContent = text;
      return line;
    });
    tip.replaceChildren(head, ...lines);
    tip.hidden = false;
    const x = canvas.offsetLeft + this.#x(place);
    const right = x + tip.offsetWidth + 40 > canvas.parentElement.clientWidth;
    tip.style.left = `${right ? x - tip.offsetWidth - 8 : x + this.#x(1) - AXIS.left + 8}px`;
    tip.style.top = `${canvas.offsetTop + Math.min(expert * this.#cell, canvas.clientHeight - tip.offsetHeight - 4)}px`;
  }
}

/** Indices to label, so that labels are at least `room` pixels apart. */
function ticks(amount, size, room) {
  const every = [1, 2, 5, 10, 20, 25, 50, 100].find((step) => step * size >= room) ?? 200;
  return Array.from({ length: Math.ceil(amount / every) }, (_, i) => i * every);
}

function rgb(hex) {
  const value = parseInt(hex.trim().slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

function blend(stops, part) {
  const place = part * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  const mixed = stops[low].map((from, i) => Math.round(from + (place - low) * (stops[low + 1][i] - from)));
  return `rgb(${mixed.join(" ")})`;
}
