// @ts-check
// Ask the log: stored questions with their parameters, own SQL; the result as a table, a chart and CSV.
import { get, post } from "../client.js";
import { fill, h, table } from "../dom.js";
import { num } from "../format.js";
import { resultChart } from "../result_chart.js";

const MAX_ROWS = 1000;
const START = "SELECT run, count(*) AS trajectories, sum(num_tokens) AS tokens\nFROM trajectories GROUP BY run ORDER BY run";
const RELATIONS = "runs, policies, steps, evals, trajectories, tokens, scores, candidates, dropped, shards, claims, spans, failures";

export async function sql(node, _parts, signal) {
  const [{ data: stored }, { data: runs }] = await Promise.all([get("/v1/sql/questions", signal), get("/v1/runs?limit=100", signal)]);
  const text = /** @type {HTMLTextAreaElement} */ (h("textarea", { class: "sql", id: "query", spellcheck: "false" }));
  text.value = new URLSearchParams(location.search).get("sql") ?? START;
  const run = h("select", { "aria-label": "Run" }, h("option", { value: "" }, "every run"), runs.map((r) => h("option", { value: r.id }, r.id)));
  const about = h("p", { class: "quiet about" }, "Ask one of the stored questions, or your own."), settings = h("div", { class: "row settings" });
  const answer = h("section", { "aria-live": "polite", style: "min-height:40vh" });
  const button = h("button", { class: "primary" }, "Run (Ctrl + Enter)");
  let inputs = new Map(), meanings = new Map();

  function choose(name) {
    const found = stored.find((q) => q.name === name);
    about.textContent = found?.question ?? "";
    // Its header says the question, which stands above, and what the columns mean, which the table tells.
    text.value = found ? found.template.replace(/^(--.*\n)+/, "") : START;
    meanings = new Map([...(found?.template ?? "").matchAll(/^-- column (\w+): (.+)$/gm)].map(([, column, meaning]) => [column, meaning]));
    inputs = new Map((found?.parameters ?? []).map((p) => [p.name, h("input", { value: typeof p.default === "string" ? p.default : JSON.stringify(p.default), size: "8" })]));
    fill(settings, (found?.parameters ?? []).map((p) => h("label", {}, `$${p.name} `, inputs.get(p.name), h("span", { class: "quiet" }, ` ${p.about}`))));
  }
  /** Of the parameters those that the text still has: it may have been edited. */
  function parameters() {
    const stays = [...inputs].filter(([name]) => new RegExp(`\\$${name}\\b`).test(text.value));
    return Object.fromEntries(stays.map(([name, { value }]) => {
      try { return [name, JSON.parse(value)]; } catch { return [name, value]; }
    }));
  }
  async function execute() {
    if (button.disabled) return;
    button.disabled = true;
    try {
      show(await post("/v1/sql", { sql: text.value, parameters: parameters(), ...(run.value ? { runs: [run.value] } : {}), limit: MAX_ROWS }));
    } catch (error) {
      fill(answer, h("pre", { role: "alert" }, error.message));
    } finally { button.disabled = false; }
  }
  function show({ columns, rows, seconds, truncated }) {
    const chart = resultChart(columns, rows);
    fill(answer,
      h("div", { class: "row" }, h("span", { class: "quiet" }, `${rows.length} ${rows.length === 1 ? "row" : "rows"} in ${num(seconds)} s${truncated ? `: only the first ${MAX_ROWS}` : ""}`),
        h("button", { type: "button", onclick: () => download(columns, rows) }, "CSV"), chart?.controls),
      chart?.node,
      table(columns.map((name, c) => [h("span", { title: meanings.get(name) }, name), rows.some((r) => typeof r[c] === "number")]), rows.map((row) => row.map(cell)), "Result"));
    chart?.draw();
  }

  text.addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); execute(); } });
  const question = h("select", { "aria-label": "Stored question", onchange: (e) => choose(e.target.value) },
    h("option", { value: "" }, "stored questions …"), stored.map((q) => h("option", { value: q.name }, q.name.replaceAll("_", " "))));
  fill(node, h("h1", {}, "SQL"), h("form", { onsubmit: (e) => { e.preventDefault(); execute(); } },
    h("div", { class: "row" }, question, run), about, settings, h("label", { for: "query" }, "SQL"), text,
    h("div", { class: "row" }, button, h("span", { class: "quiet" }, `One SELECT, read-only, 30 s at most. Relations: ${RELATIONS}; FROM documentation describes every column.`))), answer);
}

function cell(value) {
  if (value === null) return "–";
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : num(value, 5);
  const written = typeof value === "object" ? JSON.stringify(value) : String(value);
  return written.length > 120 ? h("span", { title: written }, `${written.slice(0, 119)}…`) : written;
}

function download(columns, rows) {
  const quote = (value) => {
    const written = value === null ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
    return /[",\r\n]/.test(written) ? `"${written.replaceAll('"', '""')}"` : written;
  };
  const url = URL.createObjectURL(new Blob([[columns, ...rows].map((row) => `${row.map(quote).join(",")}\r\n`).join("")], { type: "text/csv" }));
  h("a", { href: url, download: "result.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
