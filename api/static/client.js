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

/** Follow a run's events until they end; reconnects where it left off. `onEvent(kind, event)`. */
export async function follow(runId, onEvent, signal) {
  let last = "";
  while (!signal.aborted) {
    try {
      const response = await ask(`/v1/runs/${runId}/events/stream`, { signal, headers: last ? { "Last-Event-ID": last } : {} });
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let buffer = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        buffer += value;
        const blocks = buffer.split(/\r?\n\r?\n/);
        buffer = blocks.pop() ?? "";
        for (const block of blocks) {
          const fields = Object.fromEntries(block.split(/\r?\n/).filter((l) => l && !l.startsWith(":")).map((l) => {
            const at = l.indexOf(":");
            return [l.slice(0, at), l.slice(at + 1).trimStart()];
          }));
          if (!fields.data) continue;
          if (fields.id) last = fields.id;
          onEvent(fields.event, JSON.parse(fields.data));
          if (fields.event === "end") return;
        }
      }
    } catch (error) {
      if (signal.aborted || error instanceof ProblemError) return;
    }
    await new Promise((resume) => setTimeout(resume, 1000));
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
