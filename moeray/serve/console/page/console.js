// The page: asks the endpoint each second how all stands, and hands the picture to its parts.

import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { clock, count, number } from "./format.js";
import { Heatmap } from "./heatmap.js";
import { Actors, Decisions } from "./tables.js";
import { Tiles } from "./tiles.js";

const EACH_MS = 1000;
const ANSWER_MS = 10000;
const SERVES = ["ready", "waiting"];

const $ = (id) => document.getElementById(id);
const api = new Api(askForKey);
const chat = new Chat(api, {
  form: $("ask-form"),
  input: $("ask"),
  send: $("send"),
  stop: $("stop"),
  clear: $("clear"),
  log: $("log"),
  welcome: $("welcome"),
  suggestions: document.querySelectorAll(".suggestions button"),
  settings: () => ({ temperature: setting("temperature"), maxTokens: setting("max-tokens") }),
});
const heatmap = new Heatmap({
  canvas: $("heat"),
  tip: $("tip"),
  spoken: $("tip-spoken"),
  scale: $("scale"),
  scaleHigh: $("scale-high"),
  legendReplicas: $("legend-replicas"),
  legendMissing: $("legend-missing"),
});
const tiles = new Tiles($("tiles"));
const actors = new Actors(document.querySelector("table"));
const decisions = new Decisions($("decisions"));
let seenAt = null;

function setting(id) {
  const value = $(id).valueAsNumber;
  return Number.isNaN(value) ? null : value;
}

// -- the picture ------------------------------------------------------------------------------------------------

async function follow() {
  for (;;) {
    const next = new Promise((resolve) => setTimeout(resolve, EACH_MS));
    try {
      show(await api.get("console/state", ANSWER_MS));
    } catch {
      unreachable();
    }
    await next;
    await visible();
  }
}

/** Nobody is shown anything while the page is in the background. */
function visible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}

function show({ version, endpoint, model, system, error }) {
  document.querySelector("h1").title = `moeray ${version}`;
  $("key-item").hidden = !api.hasKey;
  status(endpoint.status);
  chat.serve(SERVES.includes(endpoint.status) ? model : null, endpoint.detail || endpoint.status);
  if (model) {
    $("model").textContent = model.name;
    document.title = `${model.name} · moeray`;
  }
  if (system) draw(system);
  document.body.classList.toggle("stale", !system && seenAt !== null);
  loading(endpoint);
  notice(remark(endpoint, system, error));
}

function draw(system) {
  seenAt = system.at;
  if (system.figures) tiles.show(system.at, system.figures);
  if (!system.layers) return;
  facts(system);
  heatmap.show(system.layers);
  actors.show(system.groups, system.actors);
  decisions.show(system.decisions);
  $("no-actors").hidden = system.actors.length > 0;
  $("no-decisions").hidden = system.decisions.length > 0;
  $("actors-line").textContent = system.changing ? "the placement is being changed" : "";
  $("experts-line").textContent = system.layers.length ? summary(system) : "";
}

function facts(system) {
  $("epoch").hidden = $("autoscaling").hidden = false;
  $("epoch").textContent = `epoch ${system.epoch}`;
  $("autoscaling").textContent = `autoscaling ${system.autoscaling ? "on" : "paused"}`;
}

function summary({ layers, replicas, skew }) {
  const experts = layers.reduce((sum, row) => sum + row.rates.length, 0);
  const rate = layers.reduce((sum, row) => sum + row.rates.reduce((a, b) => a + b, 0), 0);
  return [
    `${count(experts, "expert")} in ${count(layers.length, "layer")}`,
    replicas === experts ? "" : count(replicas, "replica"),
    `${number(rate)} rows/s`,
    rate ? `worst layer's max/mean ${skew.toFixed(2)}` : "",
  ].filter(Boolean).join(" · ");
}

function loading(endpoint) {
  const empty = !$("experts-line").textContent;
  const [, done, total] = /(\d+)\/(\d+)/.exec(endpoint.detail) ?? [];
  $("loading").hidden = !empty;
  $("heatmap").hidden = document.querySelector(".legend").hidden = empty;
  $("loading-text").textContent = endpoint.detail || endpoint.status;
  $("loading-bar").hidden = endpoint.status === "failed";
  if (total) {
    $("loading-bar").max = Number(total);
    $("loading-bar").value = Number(done);
  } else {
    $("loading-bar").removeAttribute("value");
  }
}

function remark(endpoint, system, error) {
  if (endpoint.status === "failed") return `The model could not be loaded: ${endpoint.detail}`;
  if (endpoint.status === "stopping") return "The system is being stopped.";
  if (endpoint.status === "waiting") return `Requests wait: ${endpoint.detail}`;
  if (!system && endpoint.status === "ready") {
    const since = seenAt === null ? "" : ` What is shown is from ${clock(seenAt)}.`;
    return `There is no answer from the controller (${error}). Requests are served all the same.${since}`;
  }
  if (system?.without_replica) {
    return `${count(system.without_replica, "expert")} without a replica: their rows wait for the controller's replacement.`;
  }
  return "";
}

function unreachable() {
  status("unreachable");
  chat.serve(null, "The endpoint does not answer");
  document.body.classList.toggle("stale", seenAt !== null);
  notice("The endpoint does not answer. The page tries again each second.");
}

function status(word) {
  $("status").textContent = word;
  $("status").dataset.state = word;
}

function notice(text) {
  if ($("notice").textContent !== text) $("notice").textContent = text;
  $("notice").hidden = !text;
}

// -- the key ----------------------------------------------------------------------------------------------------

function askForKey(wrong) {
  $("key-error").hidden = !wrong;
  $("key-error").textContent = wrong ? "That key was refused." : "";
  $("key").value = "";
  $("key-dialog").showModal();
  return new Promise((resolve) => {
    $("key-form").addEventListener("submit", () => resolve($("key").value), { once: true });
  });
}

$("key-dialog").addEventListener("cancel", (event) => event.preventDefault()); // nothing works without it
$("forget-key").addEventListener("click", () => {
  api.forgetKey();
  location.reload();
});

follow();
