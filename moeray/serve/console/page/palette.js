// The colours of heat, from the style sheet: they follow the reader's light or dark.

const SHADES = 256;
const GAMMA = 0.65; // below 1: little load is seen beside much

export class Palette {
  constructor() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const stops = [0, 1, 2, 3, 4].map((i) => rgb(colour(`--heat-${i}`)));
    this.shades = Array.from({ length: SHADES }, (_, i) => blend(stops, i / (SHADES - 1)));
    this.names = this.shades.map((shade) => `rgb(${shade.join(" ")})`);
    this.ink = colour("--heat-ink");
    this.muted = colour("--muted");
    this.panel = colour("--panel");
    this.bad = colour("--bad");
    this.font = `11px ${style.fontFamily}`;
  }

  /** Which shade a part (0 to 1) of the hottest has. */
  shade(part) {
    return Math.round((SHADES - 1) * Math.min(1, part) ** GAMMA);
  }

  /** A bar from cold to hot. */
  paintScale(canvas) {
    const draw = canvas.getContext("2d");
    for (let x = 0; x < canvas.width; x += 1) {
      draw.fillStyle = this.names[this.shade(x / (canvas.width - 1))];
      draw.fillRect(x, 0, 1, canvas.height);
    }
  }
}

function rgb(hex) {
  const value = parseInt(hex.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

function blend(stops, part) {
  const place = part * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  return stops[low].map((from, i) => Math.round(from + (place - low) * (stops[low + 1][i] - from)));
}
