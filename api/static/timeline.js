// @ts-check
// Who works and who waits, for what: a lane per worker. Wheel or +/− zooms, dragging or arrow keys move.
import { picture } from "./charts.js";
import { css, fill, h, table } from "./dom.js";
import { pct } from "./format.js";

const ORDER = ["pretrain", "rollout", "score", "learn", "evaluate"];
const LANE = 26, TOP = 18;

/** @param {(from: number, to: number) => Promise<any>} read the same answer for a window, in which more spans are apart */
export function timeline(read) {
  let known = null, close = null, from = 0, to = 1, timer = 0;
  const detail = h("p", { class: "quiet phase" }, "Point at a span to see what it is.");
  const shares = h("div");
  const legend = h("div", { class: "legend" });
  const holder = h("div");
  let view = null, left = 88;

  const colourOf = (lane, activity) => (activity.startsWith("wait:") ? css("--wait") : activity.startsWith("orchestrate:") ? css("--overhead") : css(`--${lane.role}`) || css("--accent"));

  function draw(ctx, width) {
    if (!known) return;
    const px = (s) => left + ((s - from) / (to - from)) * (width - left);
    ctx.font = "11px system-ui";
    ctx.fillStyle = css("--quiet");
    const step = niceStep((to - from) / Math.max(2, Math.floor((width - left) / 90)));
    for (let s = Math.ceil(from / step) * step; s <= to; s += step) {
      ctx.fillRect(px(s), TOP - 4, 1, 4);
      const label = `${+s.toFixed(3)} s`;
      if (px(s) + 2 + ctx.measureText(label).width < width) ctx.fillText(label, px(s) + 2, TOP - 6);
    }
    shown().forEach((lane, i) => {
      const y = TOP + i * LANE;
      ctx.fillStyle = css("--text");
      ctx.fillText(known.lanes[i].label, 2, y + 15);
      ctx.save();
      ctx.beginPath(); ctx.rect(left, y, width - left, LANE); ctx.clip();
      for (const waits of [true, false]) {
        lane.starts.forEach((start, j) => {
          const activity = lane.activities[j], end = lane.ends[j];
          if (activity.startsWith("wait:") !== waits || end < from || start > to) return;
          ctx.fillStyle = colourOf(lane, activity);
          ctx.fillRect(px(start), y + (waits ? 8 : 3), Math.max(px(end) - px(start), 0.3), waits ? LANE - 16 : LANE - 7);
        });
      }
      ctx.restore();
    });
  }

  /** The lanes to draw: of the window read last while it holds what is looked at. */
  const shown = () => known.lanes.map((lane) => (close && close.from <= from && to <= close.to ? close.lanes.get(lane.worker) ?? { ...lane, starts: [] } : lane));

  function look(start, span) {
    from = Math.max(0, Math.min(known.duration_s - span, start));
    to = from + span;
    view.redraw();
    clearTimeout(timer);
    if (span < known.duration_s / 2) timer = setTimeout(async () => {
      const window = { from: Math.max(0, from - span / 2), to: to + span / 2 };
      const found = await read(window.from, window.to);
      close = { ...window, lanes: new Map(found.lanes.map((lane) => [lane.worker, lane])) };
      view.redraw();
    }, 250);
  }
  function zoom(factor, centre = (from + to) / 2) {
    const span = Math.min(known.duration_s, Math.max(0.05, (to - from) * factor));
    look(centre - (centre - from) * (span / (to - from)), span);
  }
  const move = (seconds) => look(from + seconds, to - from);
  const secondsAt = (event, canvas) => from + ((event.offsetX - left) / (canvas.clientWidth - left)) * (to - from);

  function attach(canvas) {
    canvas.tabIndex = 0;
    let dragged = null;
    canvas.addEventListener("wheel", (e) => { if (e.ctrlKey || e.shiftKey) { e.preventDefault(); zoom(e.deltaY > 0 ? 1.25 : 0.8, secondsAt(e, canvas)); } }, { passive: false });
    canvas.addEventListener("pointerdown", (e) => { dragged = e.offsetX; canvas.setPointerCapture(e.pointerId); tell(e); });
    canvas.addEventListener("pointerup", () => { dragged = null; });
    canvas.addEventListener("pointercancel", () => { dragged = null; });
    canvas.addEventListener("pointermove", (e) => {
      if (dragged === null) { tell(e); return; }
      move(((dragged - e.offsetX) / (canvas.clientWidth - left)) * (to - from));
      dragged = e.offsetX;
    });
    /** The shortest span under the pointer, in words. */
    function tell(e) {
      const lane = shown()[Math.floor((e.offsetY - TOP) / LANE)], s = secondsAt(e, canvas);
      const found = lane?.starts.map((start, j) => j).filter((j) => lane.starts[j] <= s && s <= lane.ends[j]) ?? [];
      const best = found.sort((a, b) => lane.ends[a] - lane.starts[a] - (lane.ends[b] - lane.starts[b]))[0];
      if (best !== undefined) detail.textContent = `${lane.worker}: ${lane.activities[best].replace("wait:", "waits for ")} ${lane.details[best]} · ${lane.starts[best].toFixed(2)}–${lane.ends[best].toFixed(2)} s`;
    }
    canvas.addEventListener("keydown", (e) => {
      const act = { "+": () => zoom(0.7), "=": () => zoom(0.7), "-": () => zoom(1.4), ArrowLeft: () => move((from - to) / 5), ArrowRight: () => move((to - from) / 5), 0: () => zoom(1e9) }[e.key];
      if (act) { e.preventDefault(); act(); }
    });
  }

  const buttons = h("div", { class: "row" },
    h("button", { type: "button", "aria-label": "Zoom in", onclick: () => known && zoom(0.6) }, "+"),
    h("button", { type: "button", "aria-label": "Zoom out", onclick: () => known && zoom(1.6) }, "−"),
    h("button", { type: "button", onclick: () => known && zoom(1e9) }, "All"),
    h("span", { class: "quiet" }, "Shift + wheel zooms, drag moves; keys + − ← → 0"));
  return {
    node: h("div", { class: "card roles" }, h("h2", {}, "Roles"), buttons, holder, detail, legend, shares),
    set(next) {
      const whole = !known || to - from >= known.duration_s * 0.999;
      const lanes = known?.lanes.length;
      known = { ...next, lanes: labelled(next.lanes.toSorted((a, b) => ORDER.indexOf(a.role) - ORDER.indexOf(b.role) || beginOf(a) - beginOf(b) || a.worker.localeCompare(b.worker))) };
      left = Math.max(88, ...known.lanes.map((lane) => 6 * lane.label.length + 4));
      if (whole) { from = 0; to = Math.max(next.duration_s, 0.05); }
      if (!view || lanes !== next.lanes.length) {
        view = picture(TOP + LANE * Math.max(1, next.lanes.length) + 4, "Timeline of the roles", draw);
        attach(view.canvas);
        holder.replaceChildren(view.canvas);
        legend.replaceChildren(...[...new Set(known.lanes.map((l) => l.role))].map((role) => entry(`--${role}`, role)), entry("--overhead", "overhead: reads, writes, Prefect"), entry("--wait", "waiting"));
      }
      view.redraw();
      fill(shares, table([["role", 0], ["works", 1], ["overhead", 1], ["waits for (may run beside work)", 0]], known.lanes.map(sharesOf)));
    },
  };
}

const beginOf = (lane) => Math.min(...lane.starts), endOf = (lane) => Math.max(...lane.ends);

/** Lanes in order with a name each: the role, numbered where several work side by side; with its begin where another had ended before. */
function labelled(lanes) {
  const later = (lane) => (lanes.some((other) => other.role === lane.role && other.ends.length > 0 && endOf(other) < beginOf(lane)) ? `, from ${Math.round(beginOf(lane))} s` : "");
  return lanes.map((lane) => {
    const beside = lanes.filter((other) => other.role === lane.role && later(other) === later(lane));
    return { ...lane, label: `${lane.role}${beside.length > 1 ? ` ${beside.indexOf(lane) + 1}` : ""}${later(lane)}` };
  });
}

const entry = (variable, label) => h("span", {}, h("i", { style: `background:var(${variable})` }), label);

/** A lane in words: shares of the time from its first to its last span. Waits may run beside work. */
function sharesOf(lane) {
  const whole = Math.max(...lane.ends) - Math.min(...lane.starts) || 1;
  const seconds = new Map();
  lane.activities.forEach((activity, j) => {
    const kind = activity.startsWith("orchestrate:") ? "overhead" : activity.startsWith("wait:") ? activity.slice(5) : "work";
    seconds.set(kind, (seconds.get(kind) ?? 0) + lane.ends[j] - lane.starts[j]);
  });
  const share = (kind) => pct(Math.min(1, (seconds.get(kind) ?? 0) / whole));
  const waits = [...seconds.keys()].filter((kind) => kind !== "work" && kind !== "overhead");
  return [h("span", { title: lane.worker }, lane.label), share("work"), share("overhead"), waits.map((kind) => `${kind} ${share(kind)}`).join(", ") || "nothing"];
}

function niceStep(raw) {
  const power = 10 ** Math.floor(Math.log10(raw || 1));
  return [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw) ?? 10 * power;
}
