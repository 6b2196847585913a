// @ts-check
// Policy lineage: versions along a line; a rewind branches off below it, and what it superseded is drawn pale.
import { picture } from "./charts.js";
import { css, h } from "./dom.js";
import { pct } from "./format.js";

const LEFT = 64, RIGHT = 14, TOP = 26, ROW = 30, MAX_DOTS = 90;

/** A picture with a row per rewind (the run's first line is row 0); `set` takes the answer of /policies. */
export function lineage() {
  let known = { data: [], superseded: [], rewinds: [] };
  let view = null;
  const holder = h("div", { class: "lineage" });
  let nothing = "No version is published yet.";
  const words = h("p", { class: "quiet" }, nothing);
  const rowsOf = () => Math.max(0, ...known.data.map((p) => p.rewind), ...known.rewinds.map((r) => r.rewind)) + 1;

  function draw(ctx, width) {
    const all = [...known.superseded, ...known.data];
    if (!all.length) return;
    const last = Math.max(1, ...all.map((p) => p.number), ...known.rewinds.map((r) => r.to_step));
    const px = (number) => LEFT + (number / last) * (width - LEFT - RIGHT), py = (row) => TOP + row * ROW;
    ctx.font = "11px system-ui";
    ctx.fillStyle = css("--quiet");
    for (let row = 0; row < rowsOf(); row++) ctx.fillText(row ? `rewind ${row}` : "start", 2, py(row) + 4);
    for (const { rewind, to_step: step } of known.rewinds) {
      // It branches off the newest earlier row that has the version gone back to.
      const from = Math.max(0, ...all.filter((p) => p.number === step && p.rewind < rewind).map((p) => p.rewind));
      ctx.strokeStyle = css("--warn");
      ctx.beginPath(); ctx.moveTo(px(step), py(from)); ctx.lineTo(px(step), py(rewind)); ctx.stroke();
    }
    for (const [versions, colour] of [[known.superseded, css("--wait")], [known.data, css("--learn")]]) {
      for (const row of new Set(versions.map((p) => p.rewind))) {
        const numbers = versions.filter((p) => p.rewind === row).map((p) => p.number);
        const began = known.rewinds.find((r) => r.rewind === row)?.to_step ?? 0;
        // A superseded stretch starts where the surviving one before it ended.
        const start = versions === known.superseded ? Math.max(began, Math.min(...numbers) - 1) : Math.min(began, ...numbers);
        ctx.strokeStyle = ctx.fillStyle = colour;
        ctx.lineWidth = 2;
        ctx.beginPath(); ctx.moveTo(px(start), py(row)); ctx.lineTo(px(Math.max(...numbers)), py(row)); ctx.stroke();
        ctx.lineWidth = 1;
        if (last <= MAX_DOTS) for (const number of numbers) { ctx.beginPath(); ctx.arc(px(number), py(row), 2.5, 0, 7); ctx.fill(); }
      }
    }
    // The newest version first: its label has its place, whatever else finds none.
    const taken = [];
    for (const policy of [...known.data.slice(-1), ...known.data.slice(0, -1).filter((p) => p.accuracy !== null)]) {
      const isEvaluated = policy.accuracy !== null, x = px(policy.number), y = py(policy.rewind);
      const label = isEvaluated ? `v${policy.number} ${pct(policy.accuracy)}` : `v${policy.number}`, wide = ctx.measureText(label).width;
      const at = Math.min(x, width - wide - 2);
      ctx.fillStyle = css(isEvaluated ? "--evaluate" : "--learn");
      ctx.beginPath(); ctx.arc(x, y, isEvaluated ? 5 : 2.5, 0, 7); ctx.fill();
      if (taken.some((other) => other.y === y && at < other.end && other.at < at + wide + 10)) continue;
      ctx.fillStyle = css("--text");
      ctx.fillText(label, at, y - 10);
      taken.push({ y, at, end: at + wide + 10 });
    }
  }

  return {
    node: h("div", { class: "card" }, h("h2", {}, "Policy lineage"), holder, words),
    set(next) {
      const rows = view ? rowsOf() : -1;
      known = next;
      const newest = known.data.at(-1);
      words.textContent = newest
        ? `Newest version ${newest.number}; large green dots were evaluated. ` + (known.rewinds.length
          ? `The learner went back ${known.rewinds.map((r) => `to step ${r.to_step}`).join(", then ")}; ${known.superseded.length} versions (pale) no longer count.`
          : "The learner never went back.")
        : nothing;
      if (rows !== rowsOf()) {
        view = picture(TOP + ROW * rowsOf() - 8, "Versions of the student along a line, with a branch for every rewind", draw);
        holder.replaceChildren(view.canvas);
      }
      view.redraw();
    },
    over(isOver) {
      nothing = isOver ? "No version was published." : "No version is published yet.";
      if (!known.data.length) words.textContent = nothing;
    },
  };
}
