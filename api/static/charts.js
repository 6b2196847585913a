// @ts-check
// Line charts (uPlot) and the staleness heat map, in the page's colours; redrawn when the theme changes.
/* global uPlot */
import { css, h } from "./dom.js";
import { int, num } from "./format.js";

export const INK = ["--rollout", "--learn", "--score", "--evaluate", "--pretrain", "--bad", "--good", "--warn"];
export const ink = (i) => css(INK[i % INK.length]);

/**
 * A chart that is made once and then given data.
 * @param {{title: string, unit?: string, x?: string, series: {label: string, ink?: string, dash?: number[], points?: boolean}[], min?: number, height?: number}} options
 */
export function lineChart({ title, unit = "", x = "step", series, min, height = 165 }) {
  const empty = h("p", { class: "empty" }, "no data yet");
  const place = h("div", { class: "chart", role: "img", "aria-label": `${title} by ${x}` }, empty);
  place.style.height = `${height + 40}px`;  // two lines of legend
  const heading = h("h2", {}, title, unit && h("span", { class: "quiet" }, ` (${unit})`));
  let plot = null;
  let data = null;

  function options() {
    const axis = { stroke: css("--quiet"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") }, size: 60, font: "11px system-ui" };
    return {
      width: place.clientWidth || 340, height, cursor: { sync: { key: x }, points: { size: 6 } },
      legend: { show: true, live: true },
      hooks: { setCursor: [showLast] },
      scales: { x: { time: false }, y: { range: (_, lo, hi) => rangeOf(lo, hi, min) } },
      axes: [{ ...axis, size: 30 }, { ...axis, values: (_, ticks) => ticks.map((v) => (Math.abs(v) >= 1e4 && Math.abs(v) < 1e7 ? `${+(v / 1000).toPrecision(4)}k` : String(+v.toPrecision(4)))) }],
      series: [{ label: x }, ...series.map((s, i) => ({
        label: s.label, stroke: s.ink ? css(s.ink) : ink(i), width: 1.6, dash: s.dash, spanGaps: true,
        points: { show: s.points ?? undefined, size: 5 }, value: (_, v) => (Math.abs(v ?? 0) >= 1000 ? int(v) : num(v, 4)),
      }))],
    };
  }

  function draw() {
    if (!data || !data[0].length || !place.isConnected) return;
    if (plot) { plot.setData(data); showLast(); return; }
    place.replaceChildren();
    plot = new uPlot(options(), data, place);
    showLast();
  }

  /** Where nothing is pointed at, the legend tells the newest value of each curve. */
  function showLast() {
    if (!plot || plot.cursor.idx != null) return;
    plot.setLegend({ idxs: data.map((values) => Math.max(0, values.findLastIndex((v) => v != null))) }, false);
  }

  addEventListener("theme", () => { plot?.destroy(); plot = null; draw(); });
  new ResizeObserver(() => plot?.setSize({ width: place.clientWidth, height })).observe(place);
  return {
    node: h("div", { class: "card" }, heading, place),
    /** @param {number[]} xs @param {...(number|null)[]} ys */
    set(xs, ...ys) { data = [xs, ...ys]; draw(); },
    /** Has what it is about ended, so that no more data will come? */
    over(isOver) { empty.textContent = isOver ? "no data" : "no data yet"; },
  };
}

/** The vertical range of values from `lo` to `hi` (null where there are none), from `min` on if it is given. */
function rangeOf(lo, hi, min) {
  if (min !== undefined) return [Math.min(min, lo ?? min), hi > min ? hi * 1.05 : min + 1];
  const room = Math.abs(lo) / 10 || 1;
  return lo === hi ? [lo - room, lo + room] : uPlot.rangeNum(lo, hi, 0.1, true);
}

/** A canvas of a fixed height that redraws itself when its width, the device or the theme changes. */
export function picture(height, label, draw) {
  const canvas = /** @type {HTMLCanvasElement} */ (h("canvas", { role: "img", "aria-label": label, style: `height:${height}px` }));
  function redraw() {
    const scale = devicePixelRatio || 1;
    const width = canvas.clientWidth;
    if (!width) return;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.clearRect(0, 0, width, height);
    draw(context, width, height);
  }
  new ResizeObserver(redraw).observe(canvas);
  addEventListener("theme", redraw);
  return { canvas, redraw };
}

/** Trained tokens by staleness over time: a column per stretch of steps, darker where more tokens. */
export function stalenessMap() {
  let known = null, nothing = "no data yet";
  const { canvas, redraw } = picture(150, "Tokens by staleness and step", (ctx, width, height) => {
    if (!known?.steps.length) { ctx.fillStyle = css("--quiet"); ctx.fillText(nothing, width / 2 - 25, height / 2); return; }
    const left = 40, bottom = 20, rows = known.versions.length, columns = known.steps.length;
    const totals = known.steps.map((_, c) => known.tokens.reduce((sum, row) => sum + row[c], 0));
    const cellWidth = (width - left) / columns, cellHeight = (height - bottom) / rows;
    const rgb = css("--blue");
    known.versions.forEach((version, r) => {
      const y = height - bottom - (r + 1) * cellHeight;
      known.tokens[r].forEach((count, c) => {
        if (!count) return;
        ctx.fillStyle = `rgba(${rgb}, ${0.08 + (0.92 * count) / totals[c]})`;
        ctx.fillRect(left + c * cellWidth, y, cellWidth > 4 ? cellWidth - 0.5 : cellWidth + 0.3, cellHeight - 1);
      });
      if (rows <= 10 || r % Math.ceil(rows / 10) === 0) { ctx.fillStyle = css("--quiet"); ctx.font = "11px system-ui"; ctx.fillText(String(version), 22, y + cellHeight / 2 + 4); }
    });
    ctx.fillStyle = css("--quiet"); ctx.font = "11px system-ui";
    ctx.fillText(`step ${Math.round(known.steps[0])}`, left, height - 5);
    const end = `step ${Math.round(known.steps[columns - 1])}`;
    ctx.fillText(end, width - ctx.measureText(end).width, height - 5);
  });
  const note = h("p", { class: "quiet" });
  return {
    node: h("div", { class: "card" }, h("h2", {}, "Staleness ", h("span", { class: "quiet" }, "(versions, share of tokens)")), canvas, note),
    set(staleness) {
      known = staleness;
      const sums = staleness.tokens.map((row) => row.reduce((a, b) => a + b, 0));
      const all = sums.reduce((a, b) => a + b, 0);
      const mean = all ? sums.reduce((acc, n, i) => acc + n * staleness.versions[i], 0) / all : null;
      note.textContent = all ? `mean ${mean.toFixed(2)}, largest ${Math.max(...staleness.versions)}, bound τ = ${staleness.max_staleness}` : "";
      redraw();
    },
    over(isOver) {
      const before = nothing;
      nothing = isOver ? "no data" : "no data yet";
      if (nothing !== before) redraw();
    },
  };
}

/** A loss curve in a table row. */
export function sparkline(values) {
  const known = values.filter((v) => v !== null);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "spark"); svg.setAttribute("viewBox", "0 0 120 28"); svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", known.length ? `loss from ${num(known[0])} to ${num(known.at(-1))}` : "no loss yet");
  if (known.length > 1) {
    const low = Math.min(...known), high = Math.max(...known);
    const line = document.createElementNS(svg.namespaceURI, "polyline");
    line.setAttribute("points", known.map((v, i) => `${(120 * i) / (known.length - 1)},${26 - (24 * (v - low)) / (high - low || 1)}`).join(" "));
    svg.append(line);
  }
  return svg;
}
