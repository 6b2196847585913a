// @ts-check
// A response token by token, coloured by log q − log p: blue where the teacher likes a token more than the student did.
import { go } from "../app.js";
import { get } from "../client.js";
import { css, fill, h, table } from "../dom.js";
import { logprob, negated, num, pct } from "../format.js";

const FULL_COLOUR_NATS = 3;
const NO_TOP_K = "The teacher's own likeliest tokens were not recorded (recording.top_k records them). These are the student's likeliest, with the teacher's log-prob.";

export async function trajectory(node, [id, index], signal) {
  const path = `/v1/runs/${encodeURIComponent(id)}`, at = (i) => `/runs/${encodeURIComponent(id)}/trajectories/${i}`;
  addEventListener("keydown", (e) => {
    if (/** @type {any} */ (e.target).closest?.("input,textarea,select") || e.ctrlKey || e.metaKey || e.altKey) return;
    if (e.key === "j") go(at(Number(index) + 1));
    if (e.key === "k" && Number(index)) go(at(Number(index) - 1));
  }, { signal });
  const head = h("div", { class: "row spread" }, h("h1", {}, h("a", { href: `/runs/${encodeURIComponent(id)}`, "data-link": "" }, id), ` · index ${index}`),
    h("div", { class: "row" }, Number(index) > 0 && h("a", { href: at(Number(index) - 1), "data-link": "" }, "← previous (k)"), h("a", { href: at(Number(index) + 1), "data-link": "" }, "next (j) →")));
  // Shown also where there is no such response: dropped, or not produced yet.
  fill(node, head);
  const found = await get(`${path}/trajectories/${index}`, signal).catch((error) => {
    if (error.problem?.status !== 404) throw error;
    fill(node, head, h("p", { role: "alert" }, error.message));
  });
  if (!found) return;
  const { summary, tokens, trained_at_step: step } = found;
  const drift = step === null ? null : (await get(`${path}/metrics?key=train/drift_nats&from_step=${step}&to_step=${step + 1}`, signal)).series["train/drift_nats"]?.[0] ?? null;
  const later = step === null ? "This response is not trained yet."
    : `The learner had it at step ${step} and kept the mean over the step's tokens, drift KL(sampling‖current) ${num(drift)} nats.`;
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

  const side = (title, setting, list, token, note = "") => h("div", {}, h("h2", {}, title), list.length
    ? table([["token", 0], ["id", 1], ["log-prob", 1], ["prob", 1]], list.map((a) => [a.id === token.id ? h("strong", {}, a.text) : a.text, a.id, logprob(a.logprob), a.logprob === null ? "–" : pct(Math.exp(a.logprob))]), title)
    : h("p", { class: "quiet" }, `Not recorded; a run keeps it with ${setting}.`), list.length > 0 && note && h("p", { class: "quiet" }, note));
  let picked = 0;
  function pick(t) {
    for (const [i, is] of /** @type {[number, boolean][]} */ ([[picked, false], [t, true]])) { buttons[i].setAttribute("aria-pressed", String(is)); buttons[i].tabIndex = is ? 0 : -1; }
    picked = t;
    const token = tokens[t];
    const gap = token.teacher_logprob === null ? null : token.teacher_logprob - token.behaviour_logprob;
    const facts = [["log p when sampled", logprob(token.behaviour_logprob)], ["log q", logprob(token.teacher_logprob)], ["log q − log p", logprob(gap)],
      ["position", t], ["id", token.id], ["policy version", token.version]];
    fill(detail, h("p", {}, h("strong", { class: "picked" }, token.text)),
      h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value))))),
      h("p", { class: "quiet" }, later),
      h("div", { class: "sides" }, found.teacher_top_of === "topk" ? side("Teacher's likeliest", "recording.top_k", token.teacher_top, token) : side("Teacher on student's likeliest", "recording.top_k", token.teacher_top, token, NO_TOP_K), side("Sampling student's likeliest", "recording.head", token.student_top, token)));
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
  const facts = [summary.group, summary.correct === null ? null : summary.correct ? "right" : "wrong", `${summary.num_tokens} tokens`, `ended by ${summary.finish_reason}`, `teacher ${found.teacher}`,
    step === null ? "not trained yet" : `trained at step ${step}, staleness ${found.staleness}`, `mean log q − log p ${num(negated(summary.kl_nats))} nats`];
  fill(node, head, h("p", { class: "quiet" }, facts.filter(Boolean).join(" · ")),
    h("section", { class: "reading" },
      h("div", {}, h("h2", {}, "Prompt"), h("pre", {}, found.prompt),
        h("div", { class: "row spread" }, h("h2", {}, "Response"), h("div", { class: "legend" }, legend("--blue", "teacher likes it more"), legend("--orange", "less"), h("span", {}, `full colour at ${FULL_COLOUR_NATS} nats`))), text),
      detail));
  // What one came for: where student and teacher differ most.
  const gaps = tokens.map((token) => Math.abs((token.teacher_logprob ?? token.behaviour_logprob) - token.behaviour_logprob));
  if (tokens.length) pick(gaps.indexOf(Math.max(...gaps)));
}

const legend = (colour, label) => h("span", {}, h("i", { style: `background:rgba(var(${colour}), var(--full))` }), label);
