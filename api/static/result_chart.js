// @ts-check
// The chart of a table that nobody described: lines over a numeric column, bars over anything else.
import { lineChart } from "./charts.js";
import { fill, h } from "./dom.js";
import { num } from "./format.js";

const MAX_LINES = 12, MAX_BARS = 40, NUM_INKS = 8;

/** A chart with the choices that make it; null where no column is a number or there is one row only. */
export function resultChart(columns, rows) {
  const places = columns.map((_, c) => c);
  const keyOf = (row, cs) => cs.map((c) => String(row[c] ?? "–")).join(" · ");
  const distinct = (cs) => new Set(rows.map((row) => keyOf(row, cs))).size;
  const numeric = places.filter((c) => rows.some((row) => typeof row[c] === "number") && rows.every((row) => row[c] === null || typeof row[c] === "number"));
  const texts = places.filter((c) => !numeric.includes(c) && rows.every((row) => typeof row[c] === "string"));
  const whole = (c) => rows.every((row) => row[c] === null || Number.isInteger(row[c]));
  if (numeric.length < (texts.length ? 1 : 2) || rows.length < 2) return null;

  // Steps, versions and positions are an axis; a table whose first number is a measurement is told by its texts.
  const label = texts.find((c) => distinct([c]) === rows.length);
  const isAxis = label === undefined && (!texts.length || (whole(numeric[0]) && distinct([numeric[0]]) > 1 && numeric.length > 1));
  const x0 = isAxis ? [numeric[0]] : label === undefined ? texts : [label];
  // Where a step has several rows, whatever tells them apart is a line each: one column, or two.
  const groups = places.filter((c) => !x0.includes(c) && distinct([c]) > 1 && distinct([c]) <= MAX_LINES);
  const sets = [[], ...groups.map((c) => [c]), ...groups.flatMap((c, i) => groups.slice(i + 1).map((d) => [c, d]))];
  const by0 = isAxis ? sets.find((set) => distinct([...x0, ...set]) === rows.length) ?? [] : [];
  const free = numeric.filter((c) => !x0.includes(c) && !by0.includes(c));
  const y0 = free.find((c) => !whole(c)) ?? free[0] ?? numeric[0];

  const pick = (name, options, chosen) => h("select", { "aria-label": name }, options.map((set) => h("option", { value: set.join(), selected: set.join() === chosen.join() }, set.map((c) => columns[c]).join(", ") || "nothing")));
  const singles = places.map((c) => [c]);
  const xs = pick("Horizontal axis", x0.length > 1 ? [x0, ...singles] : singles, x0), ys = pick("Vertical axis", numeric.map((c) => [c]), [y0]), lines = pick("A line for each", sets, by0);
  const node = h("div");

  function draw() {
    const [x, [y], by] = [xs, ys, lines].map((select) => select.value.split(",").filter(Boolean).map(Number));
    if (x.length > 1 || !numeric.includes(x[0])) { fill(node, bars(rows.map((row) => [keyOf(row, x), row[y]]), columns[y], x.map((c) => columns[c]).join(", "))); return; }
    const names = [...new Set(rows.map((row) => keyOf(row, by)))];
    const at = [...new Set(rows.map((row) => row[x[0]]).filter((v) => v !== null))].sort((a, b) => a - b);
    const curves = names.slice(0, MAX_LINES).map((name) => {
      const found = new Map(rows.filter((row) => keyOf(row, by) === name).map((row) => [row[x[0]], row[y]]));
      return at.map((v) => found.get(v) ?? null);
    });
    // A number alone says nothing, a text does.
    const nameOf = (name) => (by.length === 1 && numeric.includes(by[0]) ? `${columns[by[0]]} ${name}` : name);
    const chart = lineChart({ title: columns[y], x: columns[x[0]], height: 240, series: curves.map((_, i) => ({ label: by.length ? nameOf(names[i]) : columns[y], points: true, dash: i < NUM_INKS ? undefined : [5, 4] })) });
    chart.node.classList.add("tall");
    fill(node, chart.node, names.length > MAX_LINES && h("p", { class: "quiet" }, `The first ${MAX_LINES} of ${names.length} lines.`),
      rows.length > at.length * names.length && h("p", { class: "quiet" }, "Several rows share a point; the last of them is drawn."));
    chart.set(at, ...curves);
  }
  for (const select of [xs, ys, lines]) select.addEventListener("change", draw);
  return { node, draw, controls: [h("label", {}, "chart ", ys), h("label", {}, "against ", xs), sets.length > 1 && h("label", {}, "a line for each ", lines)] };
}

function bars(entries, y, x) {
  const shown = entries.slice(0, MAX_BARS);
  const largest = Math.max(...shown.map(([, value]) => Math.abs(value ?? 0))) || 1;
  return h("div", { class: "card" }, h("h2", {}, y, h("span", { class: "quiet" }, ` by ${x}`)),
    h("div", { class: "bars", role: "img", "aria-label": `${y} by ${x}` }, shown.map(([label, value]) => {
      const bar = h("i");
      bar.style.width = `${(100 * Math.abs(value ?? 0)) / largest}%`;
      return [h("span", {}, label), h("div", {}, bar), h("span", { class: "n" }, num(value, 4))];
    })),
    entries.length > MAX_BARS && h("p", { class: "quiet" }, `The first ${MAX_BARS} of ${entries.length}.`));
}
