// Numbers as people read them.

export const DASH = "–";

/** 7.31 -> "7.3", 12345 -> "12.3k". */
export function number(value) {
  if (value === null || value === undefined) return DASH;
  if (value >= 1e6) return `${short(value / 1e6)}M`;
  if (value >= 1e4) return `${short(value / 1e3)}k`;
  return short(value);
}

function short(value) {
  if (value >= 100 || Number.isInteger(value)) return String(Math.round(value));
  return value.toFixed(1);
}

/** Seconds as [digits, unit]. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return [DASH, ""];
  if (seconds >= 10) return [seconds.toFixed(0), "s"];
  if (seconds >= 1) return [seconds.toFixed(1), "s"];
  return [String(Math.round(seconds * 1000)), "ms"];
}

/** 0.417 -> ["42", "%"]; something is never shown as nothing. */
export function percent(part) {
  return [part > 0 && part < 0.01 ? "<1" : String(Math.round(part * 100)), "%"];
}

/** 1 -> "1 actor", 2 -> "2 actors". */
export function count(amount, what) {
  return `${number(amount)} ${what}${amount === 1 ? "" : "s"}`;
}

/** Unix seconds as the reader's time of day. */
export function clock(at) {
  return new Date(at * 1000).toLocaleTimeString([], { timeStyle: "medium", hourCycle: "h23" });
}
