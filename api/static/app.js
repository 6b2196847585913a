// @ts-check
// The shell: which view a path shows, links without reloads, keys, theme. A view is `async (node, path match, signal)`.
import { fill, h, toast } from "./dom.js";
import { compare } from "./views/compare.js";
import { launch } from "./views/launch.js";
import { run } from "./views/run.js";
import { runs } from "./views/runs.js";
import { sql } from "./views/sql.js";
import { trajectory } from "./views/trajectory.js";

const ROUTES = [
  [/^\/$/, runs, "Runs"],
  [/^\/runs\/([^/]+)$/, run, "Run"],
  [/^\/runs\/([^/]+)\/trajectories\/(\d+)$/, trajectory, "Trajectory"],
  [/^\/compare$/, compare, "Compare"],
  [/^\/sql$/, sql, "SQL"],
  [/^\/launch$/, launch, "Launch"],
];

let leaving = new AbortController();

export async function go(path, { replace = false } = {}) {
  if (path !== location.pathname + location.search) history[replace ? "replaceState" : "pushState"]({}, "", path);
  await show();
}

async function show() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const view = /** @type {HTMLElement} */ (document.getElementById("view"));
  const [pattern, render, title] = ROUTES.find(([p]) => p.test(location.pathname)) ?? [];
  for (const link of document.querySelectorAll("nav a")) {
    const here = new URL(link.href).pathname;
    if (here === location.pathname || (here === "/" && location.pathname.startsWith("/runs/"))) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (!render) { fill(view, h("p", {}, `There is no page at ${location.pathname}.`)); return; }
  const parts = location.pathname.match(pattern).slice(1).map(decodeURIComponent);
  document.title = [...parts, title, "AsyncOPD"].join(" · ");
  const stage = h("div");
  fill(view, stage);
  try {
    await render(stage, parts, signal);
  } catch (error) {
    if (!signal.aborted) fill(stage, h("p", { role: "alert" }, String(error.message ?? error)));
  }
}

document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[data-link]");
  if (!link || event.metaKey || event.ctrlKey || event.shiftKey || event.button) return;
  event.preventDefault();
  go(link.getAttribute("href")).then(() => document.getElementById("view")?.focus({ preventScroll: true }));
});
addEventListener("popstate", show);
addEventListener("unhandledrejection", (event) => {
  // A view that is left stops its requests.
  if (event.reason?.name === "AbortError") event.preventDefault();
  else toast(String(event.reason?.message ?? event.reason));
});

const theme = localStorage.getItem("theme");
if (theme) document.documentElement.dataset.theme = theme;
document.getElementById("theme")?.addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", document.documentElement.dataset.theme);
  dispatchEvent(new Event("theme"));
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("theme")));

show();
