// The layer x expert heat map: a column for each MoE layer, in the order in which tokens pass them, and a row for each
// expert. Rates move evenly from one picture to the next.

import { count, number } from "./format.js";
import { Palette } from "./palette.js";

const EASE_MS = 260;
const HOT = 8; // times the mean: what has more is as hot as can be, so that a few leave the others their shades
const HEIGHT = 340; // what the cells share, in CSS pixels, within the bounds of one cell
const CELL = { least: 2, most: 24, apart: 5 }; // smaller than `apart`, they are drawn without gaps, as one picture
const AXIS = { left: 30, top: 5, bottom: 20 };
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
  #palette = null;
  #ratio = 0;

  /** `page`: canvas, tip, spoken, scale, scaleHigh, legendReplicas, legendMissing. */
  constructor(page) {
    this.page = page;
    this.#dress();
    DARK.addEventListener("change", () => {
      this.#dress();
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
    const peak = this.#peak();
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

  #peak() {
    const total = this.#target.reduce((sum, rate) => sum + rate, 0);
    const most = this.#target.reduce((max, rate) => Math.max(max, rate), 0);
    return Math.max(1, Math.min(most, (HOT * total) / this.#target.length));
  }

  // -- drawing --------------------------------------------------------------------------------------------------

  #dress() {
    this.#palette = new Palette();
    this.#palette.paintScale(this.page.scale);
  }

  #resize() {
    if (!this.#rows) return;
    const { canvas } = this.page;
    const width = canvas.clientWidth;
    this.#ratio = devicePixelRatio;
    this.#cell = Math.max(CELL.least, Math.min(CELL.most, Math.floor(HEIGHT / this.#rows)));
    const height = AXIS.top + this.#rows * this.#cell + AXIS.bottom;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * this.#ratio);
    canvas.height = Math.round(height * this.#ratio);
    this.#draw();
  }

  /** Left edge of a layer's column, in whole pixels. */
  #x(place) {
    return AXIS.left + Math.round((place * (this.page.canvas.clientWidth - AXIS.left)) / this.#layers.length);
  }

  #y(expert) {
    return AXIS.top + expert * this.#cell;
  }

  #draw() {
    if (!this.#rows) return;
    if (this.#ratio !== devicePixelRatio) return this.#resize(); // another screen, or another zoom
    const { canvas } = this.page;
    const draw = canvas.getContext("2d");
    draw.setTransform(this.#ratio, 0, 0, this.#ratio, 0, 0);
    draw.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    if (this.#cell < CELL.apart) this.#drawTogether(draw);
    else this.#layers.forEach((row, place) => this.#drawColumn(draw, place, row.rates.length));
    this.#drawMarks(draw);
    this.#drawAxes(draw);
    if (this.#cursor) this.#drawCursor(draw);
    this.page.scaleHigh.textContent = number(this.#top) + (this.#shown.some((rate) => rate > 1.01 * this.#top) ? "+" : "");
  }

  #shade(index) {
    return this.#palette.shade(this.#shown[index] / this.#top);
  }

  /** A pixel for each expert, enlarged: thousands of cells at once. */
  #drawTogether(draw) {
    const pixels = new ImageData(this.#layers.length, this.#rows);
    this.#layers.forEach((row, place) => {
      for (let expert = 0; expert < row.rates.length; expert += 1) {
        const shade = this.#palette.shades[this.#shade(this.#offsets[place] + expert)];
        pixels.data.set([...shade, 255], 4 * (expert * this.#layers.length + place));
      }
    });
    const small = new OffscreenCanvas(this.#layers.length, this.#rows);
    small.getContext("2d").putImageData(pixels, 0, 0);
    draw.imageSmoothingEnabled = false;
    draw.drawImage(small, AXIS.left, AXIS.top, this.page.canvas.clientWidth - AXIS.left, this.#rows * this.#cell);
  }

  #drawColumn(draw, place, experts) {
    const x = this.#x(place);
    const width = this.#x(place + 1) - x - 1;
    const height = this.#cell - 1;
    for (let expert = 0; expert < experts; expert += 1) {
      draw.fillStyle = this.#palette.names[this.#shade(this.#offsets[place] + expert)];
      draw.beginPath();
      draw.roundRect(x, this.#y(expert), width, height, Math.min(width, height) > 9 ? 2 : 0);
      draw.fill();
    }
  }

  #drawMarks(draw) {
    this.#layers.forEach((row, place) => {
      const x = (this.#x(place) + this.#x(place + 1) - 1) / 2;
      row.replicas.forEach((held, expert) => {
        if (held === 0 || held > this.#usual) this.#mark(draw, x, this.#y(expert) + (this.#cell - 1) / 2, held);
      });
    });
  }

  /** An expert with more replicas than others have, or with none. */
  #mark(draw, x, y, held) {
    const size = Math.max(1, Math.min(3, this.#cell / 4));
    draw.fillStyle = held ? this.#palette.panel : this.#palette.bad;
    draw.strokeStyle = this.#palette.ink;
    draw.beginPath();
    if (held) draw.arc(x, y, size, 0, 2 * Math.PI);
    else draw.rect(x - size, y - size, 2 * size, 2 * size);
    draw.fill();
    if (this.#cell > 6) draw.stroke();
  }

  #drawAxes(draw) {
    draw.fillStyle = this.#palette.muted;
    draw.font = this.#palette.font;
    draw.textAlign = "right";
    draw.textBaseline = "middle";
    for (const expert of ticks(this.#rows, this.#cell, 22)) {
      draw.fillText(String(expert), AXIS.left - 7, this.#y(expert) + this.#cell / 2);
    }
    draw.textAlign = "center";
    draw.textBaseline = "alphabetic";
    const y = this.#y(this.#rows) + 14;
    const width = (this.page.canvas.clientWidth - AXIS.left) / this.#layers.length;
    for (const place of ticks(this.#layers.length, width, 26)) {
      draw.fillText(String(this.#layers[place].layer), (this.#x(place) + this.#x(place + 1)) / 2, y);
    }
  }

  #drawCursor(draw) {
    const [place, expert] = this.#cursor;
    const x = this.#x(place);
    draw.strokeStyle = this.#palette.ink;
    draw.lineWidth = 1.5;
    draw.strokeRect(x - 0.5, this.#y(expert) - 0.5, this.#x(place + 1) - x, Math.max(3, this.#cell));
  }

  // -- looking closer -------------------------------------------------------------------------------------------

  #point(event) {
    const width = (this.page.canvas.clientWidth - AXIS.left) / this.#layers.length;
    const expert = Math.floor((event.offsetY - AXIS.top) / this.#cell);
    this.#choose(Math.floor((event.offsetX - AXIS.left) / width), expert);
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
    tip.style.top = `${canvas.offsetTop + Math.min(this.#y(expert), canvas.clientHeight - tip.offsetHeight - 4)}px`;
  }
}

/** Indices to label, so that labels are at least `room` pixels apart. */
function ticks(amount, size, room) {
  const every = [1, 2, 5, 10, 20, 25, 50, 100].find((step) => step * size >= room) ?? 200;
  return Array.from({ length: Math.ceil(amount / every) }, (_, i) => i * every);
}
