// @ts-check
// Several runs on the same axes, live, and where their configurations differ.
import { go } from "../app.js";
import { INK, lineChart } from "../charts.js";
import { get, poll } from "../client.js";
import { fill, h, table } from "../dom.js";
import { int, num, pct, rate } from "../format.js";
import { CURVES, KEYS } from "./run.js";
import { LIVE, badge } from "./runs.js";

export async function compare(node, _parts, signal) {
  const ids = [...new Set(new URLSearchParams(location.search).getAll("run"))];
  const known = (await get("/v1/runs?limit=100", signal)).data.map((run) => run.id);
  const choice = h("select", { "aria-label": "Add a run", onchange: (e) => e.target.value && go(`/compare?${[...ids, e.target.value].map((i) => `run=${i}`).join("&")}`) },
    h("option", { value: "" }, "add a run …"), known.filter((id) => !ids.includes(id)).map((id) => h("option", { value: id }, id)));
  const x = h("select", { "aria-label": "Horizontal axis" }, [["steps", "step"], ["wall_s", "seconds"], ["tokens", "tokens"]].map(([value, label]) => h("option", { value }, label)));
  const place = h("div");
  fill(node, h("div", { class: "row spread" }, h("h1", {}, "Compare"), h("div", { class: "row" }, choice, h("label", {}, "against ", x))), place);
  if (!ids.length) { fill(place, h("p", { class: "quiet" }, "Pick runs here, or tick them in the list of runs.")); return; }

  const read = async (id) => {
    const path = `/v1/runs/${encodeURIComponent(id)}`;
    // The run first: where it says that it ended, everything read later is complete.
    const run = await get(path, signal);
    const [metrics, evals, config] = await Promise.all([get(`${path}/metrics?max_points=300&${KEYS}`, signal), get(`${path}/evals`, signal), get(`${path}/config`, signal)]);
    return { run, metrics, evals: evals.data, config: flat(config.config) };
  };
  const loaded = await Promise.all(ids.map(read));
  // Ids are long, legends are not: a letter for each run.
  const series = ids.map((_, i) => ({ label: letter(i) }));
  const drop = (id) => go(`/compare?${ids.filter((i) => i !== id).map((i) => `run=${i}`).join("&")}`);

  const facts = h("section");
  let charts = [];
  function draw() {
    const axis = x.value;
    // Each chart with what answers its data: they are asked again while a run goes on.
    charts = CURVES.map(([title, unit, [first, middle]]) => {
      // Of percentiles the median, of mean and maximum the mean: one curve a run.
      const key = middle?.endsWith("_p50") ? middle : first;
      return [lineChart({ title, unit: middle ? key.split("_").at(-1) : unit, x: axis, series }),
        () => merged(loaded.map((l) => [l.metrics[axis], l.metrics.series[key] ?? []]))];
    });
    for (const [title, unit, key] of [["Held-out KL to the teacher", "nats per token", "kl_nats"], ["Held-out accuracy", "fraction", "accuracy"]]) {
      charts.unshift([lineChart({ title, unit, x: "version", series: series.map((s) => ({ ...s, points: true })), min: 0 }),
        () => merged(loaded.map((l) => [l.evals.map((e) => e.version), l.evals.map((e) => e[key])]))]);
    }
    charts.unshift(...pairedDifference(loaded));
    const notes = [...sharedRollouts(loaded), ...notEvaluated(loaded)];
    fill(place, facts,
      notes.length ? h("section", { class: "quiet" }, notes.map((note) => h("p", {}, note))) : null,
      h("section", { class: "grid" }, charts.map(([chart]) => chart.node)),
      h("section", {}, h("h2", {}, "Where the configurations differ"), differences(loaded)));
    show();
  }
  function show() {
    // A button in focus stays in focus.
    if (!facts.contains(document.activeElement)) {
      fill(facts, table([[h("span", { class: "sr" }, "letter"), 0], ["run", 0], ["state", 0], ["steps", 1], ["tokens", 1], ["loss, nats", 1], ["KL, nats", 1], ["accuracy", 1], ["tokens/s", 1], [h("span", { class: "sr" }, "action"), 0]],
        loaded.map(({ run }, i) => [h("span", {}, h("i", { class: "swatch", style: `background:var(${INK[i % INK.length]})` }), letter(i)), h("a", { href: `/runs/${run.id}`, "data-link": "" }, run.id), badge(run.status), int(run.progress.steps), int(run.progress.tokens), num(run.latest.loss_nats), num(run.latest.kl_nats), pct(run.latest.accuracy), rate(run.latest.tokens_per_s),
          h("button", { type: "button", "aria-label": `Remove ${run.id}`, onclick: () => drop(run.id) }, "remove")])));
    }
    const isOver = !loaded.some(({ run }) => LIVE.includes(run.status));
    for (const [chart, data] of charts) { chart.over(isOver); chart.set(...data()); }
  }
  x.addEventListener("change", draw);
  draw();
  void poll(async () => {
    const live = loaded.flatMap(({ run }, i) => (LIVE.includes(run.status) ? [i] : []));
    if (!live.length) return;
    // All first, then shown in one go.
    const newer = await Promise.all(live.map((i) => read(ids[i])));
    live.forEach((place, i) => { loaded[place] = newer[i]; });
    show();
  }, () => 3000, signal);
}

/** One sorted x axis for several curves, null where a curve has no point. */
function merged(curves) {
  const xs = [...new Set(curves.flatMap(([x]) => x ?? []))].sort((a, b) => a - b);
  const places = new Map(xs.map((v, i) => [v, i]));
  return [xs, ...curves.map(([x, y]) => {
    const out = xs.map(() => null);
    (x ?? []).forEach((v, i) => { out[places.get(v)] = y[i] ?? null; });
    return out;
  })];
}

/** Replays of one log trained the same rollouts: their differences to the first run are paired, step by step. */
function pairedDifference(loaded) {
  const source = (l) => l.run.parent?.run_id ?? l.run.id;
  const places = loaded.map((_, i) => i).slice(1).filter((i) => source(loaded[i]) === source(loaded[0]));
  if (!places.length) return [];
  const chart = lineChart({ title: "Paired difference of loss", unit: "nats, to A on the same rollouts", series: places.map((i) => ({ label: `${letter(i)} − A`, ink: INK[i % INK.length] })) });
  return [[chart, () => {
    const [xs, base, ...ys] = merged([0, ...places].map((i) => [loaded[i].metrics.steps, loaded[i].metrics.series["train/loss_nats"] ?? []]));
    return [xs, ...ys.map((y) => y.map((v, i) => (v === null || base[i] === null ? null : v - base[i])))];
  }]];
}

/** What is one curve for replays and the run they repeat. */
function sharedRollouts(loaded) {
  const replays = loaded.flatMap(({ run }, i) => (run.parent ? [[run.parent.run_id, i]] : []));
  return [...new Set(replays.map(([source]) => source))].flatMap((source) => {
    const those = replays.filter(([id]) => id === source).map(([, i]) => letter(i)), at = loaded.findIndex(({ run }) => run.id === source);
    if (at < 0 && those.length < 2) return [];
    return [`${listed(those)} ${those.length > 1 ? "were" : "was"} trained on ${at < 0 ? source : letter(at)}'s rollouts: training accuracy and response length, and with the same teacher `
      + "KL to the teacher, are properties of those rollouts and so the same curve. Loss, drift and entropy tell the runs apart."];
  });
}

/** Which runs have no curve in the held-out charts, and why none will come. */
function notEvaluated(loaded) {
  const without = loaded.map((l, i) => ({ ...l, name: letter(i) })).filter((l) => !l.evals.length && (l.config["evaluate.every"] === 0 || !LIVE.includes(l.run.status)));
  const why = (l) => (l.run.parent ? "a replay evaluates only with evaluate: true" : l.config["evaluate.every"] === 0 ? "evaluate.every is 0" : "stopped before the first");
  return [...new Set(without.map(why))].map((reason) => {
    const those = without.filter((l) => why(l) === reason).map((l) => l.name);
    return `${listed(those)} ${those.length > 1 ? "have" : "has"} no held-out evaluations: ${reason}.`;
  });
}

const listed = (names) => (names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`);

const letter = (i) => String.fromCharCode(65 + i);

function differences(loaded) {
  const keys = [...new Set(loaded.flatMap((l) => Object.keys(l.config)))].filter((key) => new Set(loaded.map((l) => JSON.stringify(l.config[key]))).size > 1).sort();
  if (!keys.length) return h("p", { class: "quiet" }, "Nowhere.");
  return table([["setting", 0], ...loaded.map((l) => [l.run.id, 0])], keys.map((key) => [key, ...loaded.map((l) => JSON.stringify(l.config[key]) ?? "–")]));
}

function flat(value, prefix = "") {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return { [prefix]: value };
  return Object.assign({}, ...Object.entries(value).map(([key, inner]) => flat(inner, prefix ? `${prefix}.${key}` : key)));
}
