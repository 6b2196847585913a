// @ts-check
// One run, live: what it does, how it learns, who waits for whom, what it wrote.
import { lineChart, stalenessMap } from "../charts.js";
import { follow, get, poll, post } from "../client.js";
import { fill, h, table, toast } from "../dom.js";
import { ago, int, negated, num, pct, rate, span } from "../format.js";
import { lineage } from "../lineage.js";
import { timeline } from "../timeline.js";
import { LIVE, badge } from "./runs.js";

export const CURVES = [
  ["Loss", "nats per token", ["train/loss_nats"]],
  ["KL to the teacher", "nats per token", ["train/kl_nats"]],
  ["Drift", "nats per token", ["train/drift_nats"]],
  ["Effective sample size", "fraction", ["train/ess_fraction"]],
  ["Importance ratio", "p_θ / p_old, percentiles", ["train/ratio_p01", "train/ratio_p50", "train/ratio_p99"]],
  ["Gradient norm", "", ["train/grad_norm"]],
  ["Entropy", "nats per token", ["train/entropy_nats"]],
  ["Training accuracy", "fraction", ["rollout/accuracy"]],
  ["Response length", "tokens", ["rollout/response_tokens_mean", "rollout/response_tokens_max"]],
  ["Step time", "seconds", ["train/seconds"]],
  ["Learning rate", "", ["train/lr"]],
];

export const KEYS = CURVES.flatMap(([, , keys]) => keys).map((key) => `key=${encodeURIComponent(key)}`).join("&");
const NUM_FIRST = 5;  // of CURVES, above the roles
const NUM_RESPONSES = 15;
const MAX_SPANS = 800;  // per worker: about one for each pixel of the widest timeline

export async function run(node, [id], signal) {
  const path = `/v1/runs/${encodeURIComponent(id)}`;
  const head = h("div"), does = h("p", { class: "quiet does" }), facts = h("dl", { class: "facts" }), actions = h("div", { class: "row" });
  const curves = CURVES.map(([title, unit, keys]) => ({ keys, chart: lineChart({ title, unit, series: keys.map((key) => ({ label: keys.length > 1 ? key.split(/[_/]/).at(-1) : title.replace(/^[A-Z](?=[a-z])/, (c) => c.toLowerCase()) })) }) }));
  const quality = lineChart({ title: "Held-out accuracy", unit: "fraction", x: "version", series: [{ label: "accuracy", points: true }], min: 0 });
  const distance = lineChart({ title: "Held-out KL to the teacher", unit: "nats per token", x: "version", series: [{ label: "KL", points: true }], min: 0 });
  const speed = lineChart({ title: "Throughput", unit: "tokens per second", series: [{ label: "generated", ink: "--rollout" }, { label: "scored", ink: "--score" }, { label: "trained", ink: "--learn" }], x: "seconds", min: 0 });
  const stale = stalenessMap();
  const roles = timeline((from, to) => get(`${path}/timeline?start_s=${from}&stop_s=${to}&max_spans=${MAX_SPANS}`, signal));
  const policies = lineage(), events = h("div", { class: "events" }), filter = responseFilter(id, signal);
  const place = () => fill(node, head, h("div", { class: "card" }, actions, facts),
    h("section", { class: "grid", "aria-label": "Curves" }, curves[0].chart.node, curves[1].chart.node, quality.node, distance.node, speed.node, stale.node, ...curves.slice(2, NUM_FIRST).map((c) => c.chart.node)),
    h("section", {}, roles.node),
    h("section", {}, policies.node),
    h("section", { class: "grid", "aria-label": "More curves" }, curves.slice(NUM_FIRST).map((c) => c.chart.node)),
    h("section", {}, h("h2", {}, "Responses"), filter.node),
    h("section", {}, h("div", { class: "card" }, h("h2", {}, "Events"), events)));

  const awaiting = [...curves.map((c) => c.chart), quality, distance, speed, stale, policies, filter];
  let state = null, shownActions = "";
  async function header() {
    state = await get(path, signal);
    const { progress, latest, status, error } = state;
    const sampled = state.workers.filter((worker) => worker.role === "rollout");
    fill(head, h("div", { class: "row spread" }, h("div", { class: "row" }, h("h1", {}, state.id), badge(status)),
      h("a", { href: `/compare?run=${state.id}`, "data-link": "" }, "Compare with …")),
      does);
    does.textContent = does.title = state.phase;
    if (LIVE.includes(status)) does.classList.add("live");  // and it stays so: nothing moves when the run ends
    fill(facts, [["step", `${int(progress.steps)} of ${int(progress.total_steps)}`], ["tokens trained", int(progress.tokens)], ["tokens/s trained", rate(latest.tokens_per_s)],
      ["tokens/s sampled", rate(sampled.reduce((sum, worker) => sum + worker.tokens_per_s, 0) || null)], ["tokens in flight", int(sampled.reduce((sum, worker) => sum + worker.num_tokens_in_flight, 0))], ["time left", span(state.eta_s)], ["loss, nats", num(latest.loss_nats)], ["KL, nats", num(latest.kl_nats)],
      ["accuracy", pct(latest.accuracy)], ["staleness, mean", num(latest.staleness_mean_versions)], ["created", ago(state.created)]].map(([label, value]) => h("div", {}, h("dt", {}, label), h("dd", {}, value))));
    for (const part of awaiting) part.over(!LIVE.includes(status));
    // Only when something changed: a button in focus stays in focus.
    if (shownActions === `${status} ${error}`) return;
    shownActions = `${status} ${error}`;
    const button = (label, verb, when) => h("button", { type: "button", disabled: !when, onclick: () => act(verb) }, label);
    fill(actions, button("Pause", "pause", ["queued", "running"].includes(status)), button("Cancel", "cancel", LIVE.includes(status)), button("Resume", "resume", ["paused", "cancelled", "failed"].includes(status)),
      error && h("span", { role: "alert" }, error));
  }
  async function act(verb) {
    try { await post(`${path}/${verb}`); } catch (error) { toast(error.message); }
    await header();
  }
  // Each reads and answers how to show it: first read, then show in one go, so that nothing on the page moves.
  const parts = {
    async curves() {
      const [metrics, staleness, throughput] = await Promise.all(
        [`metrics?max_points=300&${KEYS}`, "staleness?max_points=120", "throughput?max_points=40"].map((part) => get(`${path}/${part}`, signal)));
      return () => {
        for (const { keys, chart } of curves) chart.set(metrics.steps, ...keys.map((key) => metrics.series[key] ?? metrics.steps.map(() => null)));
        // The last stretch of a run that goes on has only begun.
        const stop = LIVE.includes(state.status) ? -1 : undefined;
        speed.set(...["seconds", "generated", "scored", "trained"].map((name) => throughput[name].slice(0, stop)));
        stale.set(staleness);
      };
    },
    async lists() {
      const [lanes, evals, versions, rows] = await Promise.all(
        [get(`${path}/timeline?max_spans=${MAX_SPANS}`, signal), get(`${path}/evals`, signal), get(`${path}/policies`, signal), filter.read()]);
      newest = versions.data.at(-1);
      return () => {
        roles.set(lanes);
        quality.set(evals.data.map((e) => e.version), evals.data.map((e) => e.accuracy));
        distance.set(evals.data.map((e) => e.version), evals.data.map((e) => e.kl_nats));
        policies.set(versions);
        filter.show(rows);
      };
    },
  };
  async function update(...names) {
    await header();
    if (!isCreated(state)) return;
    for (const show of await Promise.all(names.map((name) => parts[name]()))) show();
  }

  const seen = [];
  function tell(kind, event) {
    // Of steps only the newest: they would push everything else off the list.
    if (kind === "step" && seen.at(-1)?.kind === "step") seen.pop();
    seen.push({ ...event, kind });
    fill(events, h("ul", {}, seen.slice(-14).reverse().map((e) => h("li", {}, h("span", { class: "quiet" }, new Date(1000 * e.time).toLocaleTimeString(), " "), e.message))));
  }
  const isStale = { curves: false, lists: false };
  let newest = null, last = "", isFollowing = false;
  function watch() {
    isFollowing = true;
    follow(id, last, (kind, event) => {
      isStale.curves = isStale.lists = true;
      last = event.id || last;
      if (kind === "end") update("curves", "lists").catch(() => undefined);
      else tell(kind, event);
    }, signal).finally(() => { isFollowing = false; });
  }
  await header();
  const first = isCreated(state) ? await Promise.all([parts.curves(), parts.lists()]) : [];
  place();
  for (const show of first) show();
  // The feed from the newest step on, and every other event from the beginning (api/feed.py reads such a cursor).
  if (newest) last = `e0-0.f0.r0.s${newest.rewind}-${Math.max(0, newest.number - 1)}.t0`;
  watch();
  // What an event made stale is read again, curves sooner than the longer answers.
  for (const [name, pauseMs] of [["curves", 2000], ["lists", 5000]]) {
    void poll(async () => {
      if (!isStale[name]) return;
      isStale[name] = false;
      await update(name).catch(() => { isStale[name] = true; });
    }, () => pauseMs, signal);
  }
  // Who waits for what is no event; and a run that had ended may be resumed, here or elsewhere.
  void poll(async () => {
    if (!isStale.curves) await header();
    if (!isFollowing && LIVE.includes(state.status)) watch();
  }, () => (LIVE.includes(state.status) ? 5000 : 10_000), signal);
}

/** Has the flow created the run? Before, there is nothing but its launch. */
const isCreated = (state) => state.config_hash !== null;

function responseTable(id, rows) {
  return table([["index", 1], ["difficulty", 0], ["right", 0], ["tokens", 1], ["ended by", 0], ["versions", 0], ["log q − log p, mean", 1]],
    rows.map((t) => [h("a", { href: `/runs/${id}/trajectories/${t.index}`, "data-link": "" }, String(t.index)), t.group, t.correct === null ? "–" : t.correct ? "yes" : "no", t.num_tokens, t.finish_reason,
      t.version_first === t.version_last ? String(t.version_first) : `${t.version_first}–${t.version_last}`, num(negated(t.kl_nats))]));
}

/** The first responses that fit a filter; read again and shown when the run goes on. */
function responseFilter(id, signal) {
  const after = h("input", { type: "number", min: "0", value: "0" });
  const right = h("select", { "aria-label": "Right or wrong" }, h("option", { value: "" }, "right and wrong"), h("option", { value: "true" }, "right"), h("option", { value: "false" }, "wrong"));
  const long = h("input", { type: "number", min: "1", value: "1" });
  const none = h("p", { class: "quiet" }, "None yet.");
  const place = h("div", { class: "responses" }, none);
  let shown = "", newest = -1;
  const next = h("button", { type: "button", disabled: true, onclick: async () => { after.value = String(newest + 1); show(await read()); } }, "Next");
  async function read() {
    const query = new URLSearchParams({ after: String(Number(after.value) - 1), limit: String(NUM_RESPONSES), min_tokens: long.value || "1" });
    if (right.value) query.set("correct", right.value);
    return (await get(`/v1/runs/${encodeURIComponent(id)}/trajectories?${query}`, signal)).data;
  }
  function show(rows) {
    // Only when something changed: a row in focus stays in focus.
    const now = JSON.stringify(rows);
    if (now !== shown) fill(place, rows.length ? responseTable(id, rows) : none);
    shown = now;
    newest = rows.at(-1)?.index ?? -1;
    next.disabled = rows.length < NUM_RESPONSES;
  }
  const form = h("form", { class: "row", onsubmit: async (e) => { e.preventDefault(); show(await read()); } },
    h("label", {}, "from index ", after), right, h("label", {}, "at least ", long, " tokens"), h("button", {}, "Show"), next);
  return { node: h("div", {}, form, place), read, show, over: (isOver) => { none.textContent = isOver ? "None." : "None yet."; } };
}
