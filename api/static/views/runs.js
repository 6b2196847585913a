// @ts-check
// All runs: state, progress, loss, quality; pick several to compare.
import { go } from "../app.js";
import { sparkline } from "../charts.js";
import { get, poll } from "../client.js";
import { fill, h, table } from "../dom.js";
import { ago, int, num, pct, rate } from "../format.js";

const STATES = ["queued", "running", "paused", "cancelled", "succeeded", "failed"];

export const LIVE = ["queued", "running", "pausing", "cancelling"];

export const badge = (status) => h("span", { class: `badge ${status}` }, status);

/** Of `table`, with a class for what a narrow window leaves out (style.css). */
const COLUMNS = [["pick", 0, "pick"], ["run", 0, "id"], ["state", 0, "state"], ["steps", 0, "steps"], ["loss", 0, "curve"], ["loss, nats", 1, "loss"], ["KL, nats", 1, "kl"], ["accuracy", 1, "right"],
  ["staleness", 1, "minor"], ["tokens/s", 1, "minor"], ["created", 0, "created"]];

const nameOf = (node) => node.getAttribute("href") ?? node.getAttribute("aria-label");

export async function runs(node, _parts, signal) {
  const chosen = new Set();
  const status = h("select", { "aria-label": "State" }, h("option", { value: "" }, "every state"), STATES.map((s) => h("option", { value: s }, s)));
  const name = h("input", { type: "search", placeholder: "id starts with …", "aria-label": "Id starts with" });
  const compare = h("button", { type: "button", disabled: true, onclick: () => go(`/compare?${[...chosen].map((id) => `run=${id}`).join("&")}`) }, "Compare");
  const more = h("button", { type: "button", hidden: true }, "More");
  const list = h("div", { class: "runs", style: "min-height:60vh" });
  let limit = 20, isLive = true, asked = 0;
  fill(node, h("div", { class: "row spread" }, h("h1", {}, "Runs"), h("div", { class: "row" }, name, status, compare, h("a", { href: "/launch", "data-link": "" }, "Launch a run"))), h("section", {}, list, more));

  function row(run) {
    const box = h("input", { type: "checkbox", "aria-label": `Compare ${run.id}`, checked: chosen.has(run.id), onchange: (e) => {
      e.target.checked ? chosen.add(run.id) : chosen.delete(run.id);
      compare.disabled = chosen.size < 2;
    } });
    const { progress, latest } = run;
    return [
      box, h("a", { href: `/runs/${run.id}`, "data-link": "" }, run.id), h("span", { title: run.phase }, badge(run.status)),
      h("span", {}, h("progress", { max: progress.total_steps, value: progress.steps, "aria-label": "steps" }), ` ${int(progress.steps)} / ${int(progress.total_steps)}`),
      sparkline(run.sparkline), num(latest.loss_nats), num(latest.kl_nats), pct(latest.accuracy), num(latest.staleness_mean_versions), rate(latest.tokens_per_s), ago(run.created),
    ];
  }

  async function look() {
    const query = new URLSearchParams({ limit: String(limit) });
    if (status.value) query.set("status", status.value);
    if (name.value) query.set("name", name.value);
    const mine = ++asked;
    const page = await get(`/v1/runs?${query}`, signal);
    if (mine !== asked) return;  // an older question's answer
    const held = list.contains(document.activeElement) ? nameOf(document.activeElement) : null;
    more.hidden = !page.next_cursor;
    isLive = page.data.some((run) => LIVE.includes(run.status));
    fill(list, page.data.length
      ? table(COLUMNS, page.data.map(row))
      : h("p", { class: "quiet" }, "No run yet. Launch one here, or with `asyncopd train`."));
    // What had the focus has it still.
    if (held) [...list.querySelectorAll("a,input")].find((node) => nameOf(node) === held)?.focus({ preventScroll: true });
  }
  const again = () => look().catch(() => undefined);
  status.addEventListener("change", again);
  name.addEventListener("input", again);
  more.addEventListener("click", () => { limit = Math.min(100, limit + 40); again(); });
  await look();
  // Where nothing runs, only a run that somebody else starts is news.
  void poll(look, () => (isLive ? 2000 : 10_000), signal);
}
