// @ts-check
// One run, live: what it does, how it learns, who waits for whom, what it wrote.
import { lineChart, stalenessMap } from "../charts.js";
import { follow, get, post } from "../client.js";
import { fill, h, table, toast } from "../dom.js";
import { ago, int, num, pct, time } from "../format.js";
import { timeline } from "../timeline.js";
import { badge } from "./runs.js";

const LIVE = ["queued", "running", "pausing", "cancelling"];

export const CURVES = [
  ["Loss", "nats per token", ["train/loss_nats"]],
  ["KL to the teacher", "nats per token", ["train/kl_nats"]],
  ["Drift", "nats per token", ["train/drift_nats"]],
  ["Effective sample size", "fraction", ["train/ess_fraction"]],
  ["Gradient norm", "", ["train/grad_norm"]],
  ["Entropy", "nats", ["train/entropy_nats"]],
  ["Response length", "tokens", ["rollout/response_tokens_mean", "rollout/response_tokens_max"]],
];

export async function run(node, [id], signal) {
  const path = `/v1/runs/${encodeURIComponent(id)}`;
  const head = h("div"), facts = h("dl", { class: "facts" }), actions = h("div", { class: "row" });
  const curves = CURVES.map(([title, unit, keys]) => ({ keys, chart: lineChart({ title, unit, series: keys.map((label) => ({ label: label.split("/")[1] })) }) }));
  const quality = lineChart({ title: "Held-out quality", x: "version", series: [{ label: "accuracy", points: true }, { label: "KL, nats", points: true }], min: 0 });
  const speed = lineChart({ title: "Throughput", unit: "tokens per second", series: [{ label: "trained" }, { label: "generated" }, { label: "scored" }], x: "seconds", min: 0 });
  const stale = stalenessMap();
  const roles = timeline();
  const policies = h("div"), events = h("div"), responses = h("div");
  fill(node, head, h("div", { class: "card" }, actions, facts),
    h("section", { class: "grid", "aria-label": "Curves" }, curves[0].chart.node, curves[1].chart.node, quality.node, speed.node, stale.node, ...curves.slice(2).map((c) => c.chart.node)),
    h("section", {}, roles.node),
    h("section", {}, h("h2", {}, "Responses"), responses),
    h("section", { class: "grid" }, h("div", { class: "card" }, h("h2", {}, "Policy versions"), policies), h("div", { class: "card" }, h("h2", {}, "Events"), events)));

  let state = null;
  async function header() {
    state = await get(path, signal);
    const { progress, latest } = state;
    fill(head, h("div", { class: "row spread" }, h("div", { class: "row" }, h("h1", {}, state.id), badge(state.status), h("span", { class: "quiet" }, state.phase)),
      h("a", { href: `/compare?run=${state.id}`, "data-link": "" }, "Compare with …")));
    fill(facts, [["step", `${int(progress.steps)} of ${int(progress.total_steps)}`], ["tokens trained", int(progress.tokens)], ["tokens/s", int(latest.tokens_per_s)], ["loss, nats", num(latest.loss_nats)], ["KL, nats", num(latest.kl_nats)],
      ["accuracy", pct(latest.accuracy)], ["staleness, mean", num(latest.staleness_mean_versions)], ["created", ago(state.created)]].map(([label, value]) => h("div", {}, h("dt", {}, label), h("dd", {}, value))));
    const button = (label, verb, when) => h("button", { type: "button", disabled: !when, onclick: () => act(verb) }, label);
    const stopped = ["paused", "cancelled", "failed"].includes(state.status);
    fill(actions, button("Pause", "pause", ["queued", "running"].includes(state.status)), button("Cancel", "cancel", LIVE.includes(state.status)), button("Resume", "resume", stopped),
      state.error && h("span", { role: "alert" }, state.error));
  }
  async function act(verb) {
    try { await post(`${path}/${verb}`); } catch (error) { toast(error.message); }
    await header();
    if (verb === "resume") watch();
  }
  async function charts() {
    if (state.status === "queued") return;
    const [metrics, staleness, evals, lanes, throughput] = await Promise.all(
      ["metrics?max_points=300", "staleness?max_points=120", "evals", "timeline", "throughput"].map((part) => get(`${path}/${part}`, signal)));
    for (const { keys, chart } of curves) chart.set(metrics.steps, ...keys.map((key) => metrics.series[key] ?? metrics.steps.map(() => null)));
    quality.set(evals.data.map((e) => e.version), evals.data.map((e) => e.accuracy), evals.data.map((e) => e.kl_nats));
    speed.set(throughput.seconds, throughput.trained, throughput.generated, throughput.scored);
    stale.set(staleness);
    roles.set(lanes);
  }
  async function lists() {
    if (state.status === "queued") return;
    const [versions, rows] = await Promise.all([get(`${path}/policies`, signal), get(`${path}/trajectories?limit=25`, signal)]);
    const recent = versions.data.slice(-12).reverse();
    fill(policies, versions.rewinds.length > 0 && h("p", {}, `The learner went back ${versions.rewinds.length} times: ${versions.rewinds.map((r) => `to step ${r.to_step}`).join(", ")}.`),
      table([["version", 1], ["rewind", 1], ["published", 0], ["accuracy", 1], ["KL, nats", 1]], recent.map((p) => [p.number, p.rewind, time(p.created), pct(p.accuracy), num(p.kl_nats)])));
    fill(responses, responseTable(state.id, rows.data), responseFilter(state.id, signal, responses));
  }
  const seen = [];
  const show = () => fill(events, h("ul", { style: "padding-left:1rem;margin:0" }, seen.slice(-14).reverse().map((e) => h("li", {}, h("span", { class: "quiet" }, new Date(1000 * e.time).toLocaleTimeString(), " "), e.message))));
  function watch() {
    let due = 0;
    follow(id, (kind, event) => {
      if (kind !== "end") { if (kind !== "step" || seen.at(-1)?.kind !== "step") seen.push({ ...event, kind }); else seen[seen.length - 1] = { ...event, kind }; show(); }
      const now = performance.now();
      if (now > due || kind === "end") { due = now + 1500; header().then(charts).catch(() => undefined); }
      if (kind === "end") lists();
    }, signal);
  }
  await header();
  await Promise.all([charts(), lists()]);
  watch();
  const timer = setInterval(() => LIVE.includes(state.status) && header().then(lists).catch(() => undefined), 5000);
  signal.addEventListener("abort", () => clearInterval(timer));
}

function responseTable(id, rows) {
  if (!rows.length) return h("p", { class: "quiet" }, "None yet.");
  return table([["index", 1], ["difficulty", 0], ["right", 0], ["tokens", 1], ["ended by", 0], ["versions", 0], ["log p − log q, mean", 1]],
    rows.map((t) => [h("a", { href: `/runs/${id}/trajectories/${t.index}`, "data-link": "" }, String(t.index)), t.group, t.correct === null ? "–" : t.correct ? "yes" : "no", t.num_tokens, t.finish_reason,
      t.version_first === t.version_last ? String(t.version_first) : `${t.version_first}–${t.version_last}`, num(t.kl_nats)]));
}

function responseFilter(id, signal, place) {
  const after = h("input", { type: "number", min: "0", value: "0", "aria-label": "From index", style: "width:7rem" });
  const right = h("select", { "aria-label": "Right or wrong" }, h("option", { value: "" }, "right and wrong"), h("option", { value: "true" }, "right"), h("option", { value: "false" }, "wrong"));
  const long = h("input", { type: "number", min: "1", value: "1", "aria-label": "At least so many tokens", style: "width:6rem" });
  const form = h("form", { class: "row", onsubmit: async (e) => {
    e.preventDefault();
    const query = new URLSearchParams({ after: String(Number(after.value) - 1), limit: "25", min_tokens: long.value || "1" });
    if (right.value) query.set("correct", right.value);
    const page = await get(`/v1/runs/${id}/trajectories?${query}`, signal);
    fill(place, responseTable(id, page.data), form);
  } }, h("label", {}, "from index ", after), right, h("label", {}, "at least ", long, " tokens"), h("button", {}, "Show"));
  return form;
}
