// @ts-check
// The REST API: requests, problems as errors, and the live event stream.
import { h } from "./dom.js";

export class ProblemError extends Error {
  constructor(problem) { super(problem.detail || problem.title || "the service did not answer"); this.problem = problem; }
}

const headers = () => {
  const token = sessionStorage.getItem("token");
  return token ? { Authorization: `Bearer ${token}` } : {};
};

async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (response.status === 401 && (await askForToken())) return ask(path, options);
  if (!response.ok) throw new ProblemError(await response.json().catch(() => ({ title: `HTTP ${response.status}` })));
  return response;
}

export const get = async (path, signal) => (await ask(path, { signal })).json();

export const post = async (path, body, extra = {}) =>
  (await ask(path, { method: "POST", body: JSON.stringify(body ?? {}), headers: { "Content-Type": "application/json", ...extra } })).json();

const pause = (ms) => new Promise((resume) => setTimeout(resume, ms));

/** Resolves once the tab is looked at; never, when the view is left before. */
const visible = (signal) => new Promise((resume) => {
  if (!document.hidden) { resume(undefined); return; }
  document.addEventListener("visibilitychange", resume, { once: true, signal });
});

/**
 * Call `look` again and again until the view is left. A hidden tab asks nothing, and a slow service is asked less often:
 * at least four times as long as it took to answer passes before the next look.
 * @param {() => Promise<unknown>} look @param {() => number} pauseMs @param {AbortSignal} signal
 */
export async function poll(look, pauseMs, signal) {
  let took = 0;
  while (!signal.aborted) {
    await pause(Math.max(pauseMs(), 4 * took));
    await visible(signal);
    const began = performance.now();
    await look().catch(() => undefined);
    took = performance.now() - began;
  }
}

/**
 * Follow a run's events after `last` until they end; goes on where it left off. `onEvent(kind, event)`.
 * A hidden tab hangs up: a browser has six connections to a host, for all tabs together.
 */
export async function follow(runId, last, onEvent, signal) {
  while (!signal.aborted) {
    await visible(signal);
    const line = new AbortController();
    const hangUp = () => document.hidden && line.abort();
    document.addEventListener("visibilitychange", hangUp);
    try {
      const options = { signal: AbortSignal.any([signal, line.signal]), headers: last ? { "Last-Event-ID": last } : {} };
      for await (const { id, event, data } of frames(await ask(`/v1/runs/${encodeURIComponent(runId)}/events/stream`, options))) {
        if (signal.aborted) return;
        last = id ?? last;
        onEvent(event, JSON.parse(data));
        if (event === "end") return;
      }
    } catch (error) {
      // Too many requests or a service that is going down: later. A refusal stays one.
      if (signal.aborted || (error instanceof ProblemError && error.problem.status < 500 && error.problem.status !== 429)) return;
    } finally {
      document.removeEventListener("visibilitychange", hangUp);
    }
    await pause(1000);
  }
}

/** The frames of a server-sent event stream, as objects of their fields; comments are left out. */
async function* frames(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (buffer + value).split(/\r?\n\r?\n/);
    buffer = blocks.pop() ?? "";
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split(/\r?\n/).filter((l) => l && !l.startsWith(":")).map((l) => {
        const at = l.indexOf(":");
        return [l.slice(0, at), l.slice(at + 1).trimStart()];
      }));
      if (fields.data) yield fields;
    }
  }
}

let asking = null;
/** Ask for a token once, however many requests were refused; true when one was given. */
function askForToken() {
  asking ??= new Promise((answer) => {
    const input = h("input", { type: "password", id: "token", autocomplete: "off", size: "40" });
    const dialog = h("dialog", { "aria-label": "Token" },
      h("form", { method: "dialog" },
        h("p", {}, h("label", { for: "token" }, "This service asks for a token (asyncopd token create NAME).")),
        h("div", { class: "row" }, input, h("button", { class: "primary" }, "Use it"))));
    dialog.addEventListener("close", () => {
      if (input.value) sessionStorage.setItem("token", input.value.trim());
      dialog.remove(); asking = null; answer(Boolean(input.value));
    });
    document.body.append(dialog);
    dialog.showModal();
  });
  return asking;
}
