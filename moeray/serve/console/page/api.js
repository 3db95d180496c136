// Requests to the endpoint that the page came from. Where it asks for an API key, the reader is asked for one.

const STORED = "moeray-api-key";

/** The endpoint refused a request; `code` is its own word for why. */
export class Refused extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}

export class Api {
  #asking = null;

  /** `askForKey(wrong)` resolves to the key that the reader gives; `wrong`: the last one was refused. */
  constructor(askForKey) {
    this.askForKey = askForKey;
  }

  get hasKey() {
    return sessionStorage.getItem(STORED) !== null;
  }

  forgetKey() {
    sessionStorage.removeItem(STORED);
  }

  /** The JSON at a path, if it comes within so many milliseconds. */
  async get(path, within) {
    return (await this.#send(path, { cache: "no-store" }, within)).json();
  }

  /** The JSON of each server-sent event, as it comes. Throws Refused for an event that is an error. */
  async *stream(path, body, signal) {
    const headers = { "Content-Type": "application/json" };
    const response = await this.#send(path, { method: "POST", body: JSON.stringify(body), headers, signal });
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(event.error.message, event.error.code);
      yield event;
    }
    throw new Refused("the connection was cut off before the answer's end", "cut_off");
  }

  async #send(path, options, within) {
    for (;;) {
      const key = sessionStorage.getItem(STORED);
      const headers = { ...options.headers, ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
      const signal = within ? AbortSignal.timeout(within) : options.signal;
      const response = await fetch(path, { ...options, headers, signal });
      if (response.status === 401) {
        await this.#needKey(key);
      } else if (response.ok) {
        return response;
      } else {
        throw await refusal(response);
      }
    }
  }

  /** Ask once, however many requests were refused with that key. */
  async #needKey(refused) {
    if (sessionStorage.getItem(STORED) !== refused) return;
    this.#asking ??= this.askForKey(refused !== null).then((key) => {
      sessionStorage.setItem(STORED, key);
      this.#asking = null;
    });
    await this.#asking;
  }
}

async function refusal(response) {
  try {
    const { error } = await response.json();
    return new Refused(error.message, error.code);
  } catch {
    return new Refused(`the endpoint answered with status ${response.status}`, "status");
  }
}

/** The data of each event of an SSE body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
        if (data.length) yield data.join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have been aborted already
  }
}
