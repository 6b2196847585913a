// @ts-check
// Ask the log: stored questions, own SQL, the result as a table and, where numbers allow, as a chart.
import { lineChart } from "../charts.js";
import { get, post } from "../client.js";
import { fill, h, table } from "../dom.js";
import { num } from "../format.js";

export async function sql(node, _parts, signal) {
  const asked = new URLSearchParams(location.search);
  const stored = await get("/v1/sql/questions", signal).then((page) => page.data, (error) => {
    if (error.problem?.status === 404) return null;
    throw error;
  });
  if (!stored) {
    fill(node, h("h1", {}, "SQL"), h("p", { role: "alert" }, "This service does not answer SQL: it has no /v1/sql. The same questions are answered on its machine by ", h("code", {}, "asyncopd sql"), "."));
    return;
  }
  const text = h("textarea", { class: "sql", id: "query", spellcheck: "false" });
  text.value = asked.get("sql") ?? "SELECT run, count(*) AS trajectories, sum(num_tokens) AS tokens\nFROM trajectories GROUP BY run ORDER BY run";
  const runs = (await get("/v1/runs?limit=100", signal)).data;
  const run = h("select", { "aria-label": "Run" }, h("option", { value: "" }, "every run"), runs.map((r) => h("option", { value: r.id }, r.id)));
  const question = h("select", { "aria-label": "Stored question", onchange: (e) => {
    const found = stored.find((q) => q.name === e.target.value);
    if (found) { text.value = found.sql; about.textContent = found.question; }
  } }, h("option", { value: "" }, "stored questions …"), stored.map((q) => h("option", { value: q.name }, q.name)));
  const about = h("p", { class: "quiet" }), answer = h("section", { "aria-live": "polite", style: "min-height:40vh" });
  const button = h("button", { class: "primary" }, "Run (Ctrl + Enter)");
  const form = h("form", { onsubmit: (e) => { e.preventDefault(); execute(); } },
    h("div", { class: "row" }, question, run), about, h("label", { for: "query" }, "SQL"), text, h("div", { class: "row" }, button, h("span", { class: "quiet" }, "Read-only, one SELECT; views: runs, policies, trajectories, tokens, scores, candidates, steps, evals, claims")));
  text.addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); execute(); } });
  fill(node, h("h1", {}, "SQL"), form, answer);

  async function execute() {
    button.disabled = true;
    try {
      const result = await post("/v1/sql", { sql: text.value, ...(run.value ? { runs: [run.value] } : {}), limit: 1000 });
      show(result);
    } catch (error) {
      fill(answer, h("pre", { role: "alert" }, error.message));
    } finally { button.disabled = false; }
  }

  function show({ columns, rows, seconds, truncated }) {
    const numeric = columns.map((_, c) => rows.length > 0 && rows.every((r) => r[c] === null || typeof r[c] === "number"));
    const options = columns.map((name, c) => h("option", { value: String(c) }, name));
    const xs = h("select", { "aria-label": "Horizontal axis" }, options.filter((_, c) => numeric[c]).map((o) => o.cloneNode(true)));
    const ys = h("select", { "aria-label": "Vertical axis" }, options.filter((_, c) => numeric[c]).map((o) => o.cloneNode(true)));
    if (ys.options.length > 1) ys.selectedIndex = 1;
    const place = h("div");
    const draw = () => {
      const x = Number(xs.value), y = Number(ys.value);
      const sorted = rows.filter((r) => r[x] !== null).sort((a, b) => a[x] - b[x]);
      const chart = lineChart({ title: columns[y], x: columns[x], series: [{ label: columns[y], points: true }] });
      fill(place, chart.node);
      chart.set(sorted.map((r) => r[x]), sorted.map((r) => r[y]));
    };
    xs.addEventListener("change", draw); ys.addEventListener("change", draw);
    const csv = () => {
      const quote = (v) => (v === null ? "" : /[",\n]/.test(String(v)) ? `"${String(v).replaceAll('"', '""')}"` : String(v));
      const blob = new Blob([[columns, ...rows].map((r) => r.map(quote).join(",")).join("\n")], { type: "text/csv" });
      const link = h("a", { href: URL.createObjectURL(blob), download: "result.csv" });
      link.click();
    };
    const canChart = numeric.filter(Boolean).length > 1 && rows.length > 1;
    fill(answer, h("div", { class: "row" }, h("span", { class: "quiet" }, `${rows.length} rows in ${num(seconds)} s${truncated ? ", cut off at the limit" : ""}`), h("button", { type: "button", onclick: csv }, "CSV"),
      canChart && h("label", {}, "chart ", ys), canChart && h("label", {}, "against ", xs)),
      canChart && place, table(columns.map((name, c) => [name, numeric[c]]), rows.slice(0, 500).map((r) => r.map((v) => (typeof v === "number" && !Number.isInteger(v) ? num(v, 5) : v === null ? "–" : String(v))))));
    if (canChart) draw();
  }
}
