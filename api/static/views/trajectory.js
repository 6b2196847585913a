// @ts-check
// A response token by token, coloured by log q − log p: blue where the teacher likes a token more than the student did.
import { go } from "../app.js";
import { get } from "../client.js";
import { css, fill, h, table } from "../dom.js";
import { logprob, num, pct } from "../format.js";

const FULL_COLOUR_NATS = 3;

export async function trajectory(node, [id, index], signal) {
  const found = await get(`/v1/runs/${encodeURIComponent(id)}/trajectories/${index}`, signal);
  const { summary, tokens } = found;
  const detail = h("div", { class: "card detail", "aria-live": "off" }, h("p", { class: "quiet" }, "Point at a token, or move between them with the arrow keys."));
  const colour = (token) => {
    if (token.teacher_logprob === null) return "transparent";
    const gap = token.teacher_logprob - token.behaviour_logprob;
    return `rgba(${css(gap > 0 ? "--blue" : "--orange")}, ${Number(css("--full")) * Math.min(1, Math.abs(gap) / FULL_COLOUR_NATS)})`;
  };
  const buttons = tokens.map((token, t) => h("button", { type: "button", class: "token", "aria-pressed": "false", tabindex: t ? "-1" : "0", onmouseenter: () => pick(t), onfocus: () => pick(t),
    "aria-label": `token ${t}: ${token.text}, log q minus log p ${token.teacher_logprob === null ? "unknown" : logprob(token.teacher_logprob - token.behaviour_logprob)}` }, token.text));
  const paint = () => buttons.forEach((button, t) => { button.style.background = colour(tokens[t]); });
  paint();
  addEventListener("theme", paint, { signal });

  function pick(t) {
    buttons.forEach((button, i) => { button.setAttribute("aria-pressed", String(i === t)); button.tabIndex = i === t ? 0 : -1; });
    const token = tokens[t];
    const gap = token.teacher_logprob === null ? null : token.teacher_logprob - token.behaviour_logprob;
    const side = (title, list) => h("div", {}, h("h2", {}, title), list.length ? table([["token", 0], ["id", 1], ["log-prob", 1], ["prob", 1]], list.map((a) => [a.text, a.id, logprob(a.logprob), a.logprob === null ? "–" : pct(Math.exp(a.logprob))])) : h("p", { class: "quiet" }, "not recorded"));
    fill(detail, h("p", {}, h("strong", {}, `“${token.text}”`), ` position ${t}, id ${token.id}, policy version ${token.version}`),
      h("p", {}, `log p when sampled (v${token.version}) ${logprob(token.behaviour_logprob)}, log q ${logprob(token.teacher_logprob)}, log q − log p ${logprob(gap)} nats`),
      h("div", { class: "grid" }, side("Teacher's likeliest", token.teacher_top), side("Sampling student's likeliest", token.student_top)));
  }
  const text = h("div", { class: "tokens card", role: "group", "aria-label": "Response" });
  let version = null;
  tokens.forEach((token, t) => {
    if (token.version !== version) text.append(h("span", { class: "boundary", title: `policy version ${token.version} from here on` }, `v${token.version}`));
    version = token.version;
    text.append(buttons[t]);
  });
  text.addEventListener("keydown", (e) => {
    const now = buttons.indexOf(/** @type {any} */ (document.activeElement));
    const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: buttons.length - 1 }[e.key];
    if (next !== undefined && buttons[next]) { e.preventDefault(); buttons[next].focus(); }
  });
  const at = (i) => `/runs/${id}/trajectories/${i}`;
  addEventListener("keydown", (e) => {
    if (/** @type {any} */ (e.target).closest?.("input,textarea,select")) return;
    if (e.key === "j") go(at(summary.index + 1));
    if (e.key === "k" && summary.index) go(at(summary.index - 1));
  }, { signal });

  fill(node,
    h("div", { class: "row spread" }, h("h1", {}, h("a", { href: `/runs/${id}`, "data-link": "" }, id), ` · index ${summary.index}`),
      h("div", { class: "row" }, summary.index > 0 && h("a", { href: at(summary.index - 1), "data-link": "" }, "← previous (k)"), h("a", { href: at(summary.index + 1), "data-link": "" }, "next (j) →"))),
    h("p", { class: "quiet" }, [summary.group, summary.correct === null ? null : summary.correct ? "right" : "wrong", `${summary.num_tokens} tokens`, `ended by ${summary.finish_reason}`, `teacher ${found.teacher}`,
      found.trained_at_step === null ? "not trained yet" : `trained at step ${found.trained_at_step}, staleness ${found.staleness}`, `mean log p − log q ${num(summary.kl_nats)}`].filter(Boolean).join(" · ")),
    h("section", {}, h("h2", {}, "Prompt"), h("pre", {}, found.prompt)),
    h("section", {}, h("div", { class: "row spread" }, h("h2", {}, "Response"),
      h("div", { class: "legend" }, h("span", {}, h("i", { style: "background:rgba(var(--blue), var(--full))" }), "teacher likes it more"), h("span", {}, h("i", { style: "background:rgba(var(--orange), var(--full))" }), "teacher likes it less"), h("span", {}, `full colour at ${FULL_COLOUR_NATS} nats`))), text),
    h("section", {}, detail));
  if (tokens.length) pick(0);
}
