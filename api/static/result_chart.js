// @ts-check
// The chart of a table that nobody described: lines over a numeric column, bars over anything else.
import { lineChart } from "./charts.js";
import { fill, h } from "./dom.js";
import { num } from "./format.js";

const MAX_LINES = 8, MAX_BARS = 40;

/** A chart with the choices that make it; null where no column is a number or there is one row only. */
export function resultChart(columns, rows) {
  const places = columns.map((_, c) => c);
  const distinct = (c) => new Set(rows.map((row) => JSON.stringify(row[c]))).size;
  const numeric = places.filter((c) => rows.some((row) => typeof row[c] === "number") && rows.every((row) => row[c] === null || typeof row[c] === "number"));
  if (!numeric.length || rows.length < 2) return null;
  const across = places.find((c) => numeric.includes(c) && distinct(c) > 1) ?? numeric[0];
  // A table of groups is told by its label; one along steps or versions by its first number.
  const labels = places.filter((c) => !numeric.includes(c) && distinct(c) === rows.length);
  const x0 = labels[0] ?? across;
  const pick = (label, options, chosen) => h("select", { "aria-label": label }, options.map((c) => h("option", { value: String(c), selected: c === chosen }, c < 0 ? "nothing" : columns[c])));
  const free = numeric.filter((c) => c !== x0);
  if (!free.length) return null;
  // Where a step has several rows, whatever tells them apart is a line each.
  const pairs = (x, by) => new Set(rows.map((row) => JSON.stringify([row[x], row[by]]))).size;
  const groups = places.filter((c) => distinct(c) > 1 && distinct(c) <= MAX_LINES && c !== x0);
  const by0 = distinct(x0) === rows.length ? -1 : groups.find((c) => pairs(x0, c) === rows.length) ?? -1;
  const y0 = free.findLast((c) => c !== by0) ?? free[0];
  const xs = pick("Horizontal axis", places, x0), ys = pick("Vertical axis", numeric, y0), lines = pick("A line for each", [-1, ...groups], by0);
  const node = h("div");

  function draw() {
    const [x, y, by] = [xs, ys, lines].map((select) => Number(select.value));
    if (!numeric.includes(x)) { fill(node, bars(columns, rows, x, y)); return; }
    const names = by < 0 ? [columns[y]] : [...new Set(rows.map((row) => String(row[by])))].slice(0, MAX_LINES);
    const at = [...new Set(rows.map((row) => row[x]).filter((v) => v !== null))].sort((a, b) => a - b);
    const series = names.map((name) => {
      const found = new Map(rows.filter((row) => by < 0 || String(row[by]) === name).map((row) => [row[x], row[y]]));
      return at.map((v) => found.get(v) ?? null);
    });
    const chart = lineChart({ title: columns[y], x: columns[x], height: 240, series: names.map((name) => ({ label: by < 0 ? name : `${columns[by]} ${name}`, points: true })) });
    fill(node, chart.node);
    chart.set(at, ...series);
  }
  for (const select of [xs, ys, lines]) select.addEventListener("change", draw);
  return { node, draw, controls: [h("label", {}, "chart ", ys), h("label", {}, "against ", xs), groups.length > 0 && h("label", {}, "a line for each ", lines)] };
}

function bars(columns, rows, x, y) {
  const shown = rows.slice(0, MAX_BARS);
  const largest = Math.max(...shown.map((row) => Math.abs(row[y] ?? 0))) || 1;
  return h("div", { class: "card" }, h("h2", {}, columns[y], h("span", { class: "quiet" }, ` by ${columns[x]}`)),
    h("div", { class: "bars", role: "img", "aria-label": `${columns[y]} by ${columns[x]}` }, shown.map((row) => {
      const bar = h("i");
      bar.style.width = `${(100 * Math.abs(row[y] ?? 0)) / largest}%`;
      return [h("span", {}, String(row[x] ?? "–")), h("div", {}, bar), h("span", { class: "n" }, num(row[y], 4))];
    })),
    rows.length > MAX_BARS && h("p", { class: "quiet" }, `the first ${MAX_BARS} of ${rows.length}`));
}
