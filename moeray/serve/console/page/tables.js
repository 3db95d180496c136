// The actors, by group, and what was decided.

import { clock, DASH, number, percent } from "./format.js";

/** A table of actors whose rows stay the same elements from one picture to the next. */
export class Actors {
  #bodies = new Map();

  constructor(table) {
    this.table = table;
  }

  show(groups, actors) {
    keep(this.#bodies, groups.map((group) => group.group), (name) => {
      const body = new Group(name);
      this.table.append(body.element);
      return body;
    });
    for (const group of groups) {
      this.#bodies.get(group.group).show(group, actors.filter((actor) => actor.group === group.group));
    }
  }
}

class Group {
  #rows = new Map();

  constructor() {
    this.element = document.createElement("tbody");
    this.head = cell("th", { scope: "rowgroup", colSpan: 7 });
    const row = document.createElement("tr");
    row.className = "group";
    row.append(this.head);
    this.element.append(row);
  }

  show(group, actors) {
    this.head.textContent = summary(group);
    keep(this.#rows, actors.map((actor) => actor.actor), () => {
      const row = new Row();
      this.element.append(row.element);
      return row;
    });
    for (const actor of actors) this.#rows.get(actor.actor).show(actor);
  }
}

function summary(group) {
  const reserve = group.reserve ? ` and ${group.reserve} in reserve` : "";
  const span = group.min === group.max ? "" : `, scales from ${group.min} to ${group.max}`;
  return `${group.group}: ${group.ready} ready, ${group.wanted} wanted${reserve}${span}`;
}

class Row {
  constructor() {
    this.element = document.createElement("tr");
    this.name = cell("th", { scope: "row" });
    this.state = document.createElement("span");
    this.state.className = "state";
    const state = document.createElement("td");
    state.append(this.state);
    this.place = cell("td", { className: "place" });
    this.experts = cell("td", { className: "number" }, "experts");
    this.rate = cell("td", { className: "number" }, "rows/s");
    this.busy = new Bar();
    const busy = cell("td", {}, "busy");
    busy.append(this.busy.element);
    this.queue = cell("td", { className: "number" }, "queue");
    this.does = cell("td", { colSpan: 3 });
    this.ofExpert = [this.experts, this.rate, busy];
    this.element.append(this.name, state, this.place, ...this.ofExpert, this.queue);
  }

  show(actor) {
    this.name.textContent = actor.actor;
    this.state.textContent = actor.state;
    this.state.dataset.state = actor.state;
    this.place.textContent = [actor.device, actor.node.slice(0, 6)].filter(Boolean).join(" · ") || DASH;
    this.place.title = actor.node && `node ${actor.node}`;
    this.queue.textContent = number(actor.queue);
    if (actor.kind === "router") this.#router(actor);
    else this.#expert(actor);
  }

  #expert(actor) {
    this.experts.textContent = number(actor.experts);
    this.rate.textContent = number(actor.rows_per_s);
    this.busy.show(actor.busy);
  }

  #router(actor) {
    if (!this.does.isConnected) {
      this.experts.before(this.does);
      for (const unused of this.ofExpert) unused.remove();
    }
    this.does.textContent = `${number(actor.running)} running, KV cache ${percent(actor.kv_usage).join(" ")}`;
  }
}

class Bar {
  constructor() {
    this.element = document.createElement("span");
    this.element.className = "bar";
    const track = document.createElement("i");
    this.fill = document.createElement("b");
    track.append(this.fill);
    this.text = document.createElement("span");
    this.element.append(track, this.text);
  }

  show(part) {
    this.fill.style.width = `${100 * part}%`;
    this.text.textContent = percent(part).join(" ");
  }
}

/** The newest decisions; the list is left alone while it does not change, so that it can be read and scrolled. */
export class Decisions {
  #shown = "";

  constructor(list) {
    this.list = list;
  }

  show(decisions) {
    const text = JSON.stringify(decisions);
    if (text === this.#shown) return;
    this.#shown = text;
    this.list.replaceChildren(...decisions.map(decision));
  }
}

function decision({ at, text, tone }) {
  const time = document.createElement("time");
  time.dateTime = new Date(at * 1000).toISOString();
  time.textContent = clock(at);
  const said = document.createElement("p");
  said.textContent = text;
  const item = document.createElement("li");
  item.dataset.tone = tone;
  item.append(time, said);
  return item;
}

/** Bring a map of views (each with an `element`) to these names. */
function keep(views, names, make) {
  for (const [name, view] of views) {
    if (names.includes(name)) continue;
    view.element.remove();
    views.delete(name);
  }
  for (const name of names) if (!views.has(name)) views.set(name, make(name));
}

function cell(name, properties, label) {
  const made = Object.assign(document.createElement(name), properties);
  if (label) made.dataset.label = label;
  return made;
}
