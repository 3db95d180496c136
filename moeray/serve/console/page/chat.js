// The conversation: what was said, the answer that streams in, and how fast it came.

import { Refused } from "./api.js";
import { count, duration } from "./format.js";

const PLAIN_TOKENS = 256; // a completion's length where the reader sets none; the API's own default is 16

export class Chat {
  #turns = [];
  #plain = false;
  #model = null;
  #running = null;

  constructor(api, page) {
    this.api = api;
    this.page = page;
    page.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    page.input.addEventListener("input", () => this.#fit());
    page.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#submit();
    });
    page.stop.addEventListener("click", () => this.#running?.abort());
    page.clear.addEventListener("click", () => this.#clear());
    for (const button of page.suggestions) {
      button.addEventListener("click", () => this.#suggest(button.textContent));
    }
  }

  /** The model that answers, or null and the reason why none does. */
  serve(model, reason) {
    this.#model = model;
    this.page.send.disabled = model === null;
    this.page.input.placeholder = model === null ? reason : "Message";
  }

  #suggest(text) {
    this.page.input.value = text;
    this.#fit();
    this.page.input.focus();
    this.#submit();
  }

  #submit() {
    const text = this.page.input.value.trim();
    if (!text || this.#running || this.#model === null) return;
    this.page.input.value = "";
    this.#fit();
    this.#say(text);
  }

  #clear() {
    this.#running?.abort();
    this.#turns = [];
    for (const turn of this.page.log.querySelectorAll(".turn")) turn.remove();
    this.page.welcome.hidden = false;
    this.page.clear.hidden = true;
    this.page.input.focus();
  }

  async #say(text) {
    this.page.welcome.hidden = true;
    this.page.clear.hidden = false;
    this.#turns.push({ role: "user", content: text });
    this.#add("user", text);
    const turns = this.#turns; // a new chat begins another list
    const shown = this.#add("assistant", "");
    this.#running = new AbortController();
    this.#busy(shown, true);
    const answer = new Answer();
    try {
      await this.#answer(answer, shown, this.#running.signal);
      shown.meta.textContent = answer.summary();
    } catch (error) {
      shown.meta.textContent = error.name === "AbortError" ? `stopped after ${answer.summary()}` : "";
      if (error.name !== "AbortError") this.#fail(shown, error);
    } finally {
      turns.push({ role: "assistant", content: answer.text });
      this.#running = null;
      this.#busy(shown, false);
    }
  }

  async #answer(answer, shown, signal) {
    try {
      await this.#stream(answer, shown, signal);
    } catch (error) {
      if (!(error instanceof Refused) || error.code !== "no_chat_template") throw error;
      this.#plain = true; // for good: it is the model that has none
      this.#note("This model has no chat template: it goes on with the text so far, as it stands.", shown);
      await this.#stream(answer, shown, signal);
    }
  }

  async #stream(answer, shown, signal) {
    const [path, body] = this.#request();
    for await (const event of this.api.stream(path, body, signal)) {
      const choice = event.choices[0];
      const piece = choice?.delta?.content ?? choice?.text ?? "";
      answer.take(piece, event.usage);
      if (piece) {
        const follow = this.#atEnd();
        shown.text.appendData(piece);
        if (follow) this.#scroll();
      }
    }
  }

  #request() {
    const { temperature, maxTokens } = this.page.settings();
    const body = { model: this.#model.name, stream: true, stream_options: { include_usage: true } };
    if (temperature !== null) body.temperature = temperature;
    if (maxTokens !== null) body.max_tokens = maxTokens;
    if (!this.#plain) return ["v1/chat/completions", { ...body, messages: this.#turns.filter((turn) => turn.content) }];
    const prompt = this.#turns.map((turn) => turn.content).join("");
    const room = Math.max(1, Math.min(PLAIN_TOKENS, Math.floor(this.#model.max_context / 4)));
    return ["v1/completions", { max_tokens: room, ...body, prompt }];
  }

  #add(role, text) {
    const turn = document.createElement("div");
    turn.className = `turn ${role}`;
    const body = document.createElement("div");
    body.className = "text";
    body.append(text);
    if (!text) body.append(document.createTextNode(""));
    const meta = document.createElement("div");
    meta.className = "meta";
    turn.append(body, meta);
    this.page.log.append(turn);
    this.#scroll();
    return { turn, text: body.firstChild ?? body.appendChild(document.createTextNode("")), meta };
  }

  #note(text, before) {
    const note = document.createElement("div");
    note.className = "turn meta";
    note.textContent = text;
    before.turn.before(note);
  }

  #fail(shown, error) {
    shown.meta.classList.add("error");
    shown.meta.textContent = error instanceof Refused ? error.message : "the endpoint does not answer; try again";
  }

  /** While an answer streams, a screen reader waits for its end instead of reading each piece. */
  #busy(shown, busy) {
    shown.turn.classList.toggle("busy", busy);
    this.page.log.setAttribute("aria-busy", String(busy));
    this.page.send.hidden = busy;
    this.page.stop.hidden = !busy;
    this.#scroll();
  }

  #atEnd() {
    const log = this.page.log;
    return log.scrollHeight - log.scrollTop - log.clientHeight < 48;
  }

  #scroll() {
    this.page.log.scrollTop = this.page.log.scrollHeight;
  }

  #fit() {
    const input = this.page.input;
    input.style.height = "auto";
    input.style.height = `${input.scrollHeight}px`;
  }
}

/** One answer's text and times. */
class Answer {
  text = "";
  #began = performance.now();
  #first = null;
  #last = 0;
  #pieces = 0;
  #tokens = null;

  take(piece, usage) {
    this.#tokens = usage?.completion_tokens ?? this.#tokens;
    if (!piece) return;
    this.text += piece;
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#pieces += 1;
  }

  summary() {
    if (this.#first === null) return "no text";
    const tokens = this.#tokens ?? this.#pieces;
    const parts = [count(tokens, "token"), `first after ${duration((this.#first - this.#began) / 1000).join(" ")}`];
    const seconds = (this.#last - this.#first) / 1000;
    if (seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    return parts.join(" · ");
  }
}
