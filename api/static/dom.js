// @ts-check
// Elements from values. Text is always a text node: what models write is never markup.

/** @param {string} tag @param {Record<string, any>} [props] @param {...any} children */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name in node && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Replace what `node` holds. */
export function fill(node, ...children) {
  node.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/**
 * A table whose header cells are [label, isNumber, class for the column]; cells may be text or elements. `name` is for those who hear it.
 * Roles are written out: a table that a phone lays out as a grid stays a table to those who hear it.
 */
export function table(header, rows, name = "table") {
  // Focusable, so that a table wider than a phone can be scrolled by keys.
  return h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": name }, h("table", { role: "table" },
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, header.map((column) => h("th", { class: classOf(column), scope: "col", role: "columnheader" }, column[0])))),
    h("tbody", { role: "rowgroup" }, rows.map((row) => h("tr", { role: "row" }, row.map((cell, i) => h("td", { class: classOf(header[i] ?? []), role: "cell" }, cell ?? "–")))))));
}

const classOf = ([, numeric, name]) => [numeric && "n", name].filter(Boolean).join(" ");

export function toast(message) {
  const line = h("p", {}, message);
  document.getElementById("toast")?.append(line);
  setTimeout(() => line.remove(), 9000);
}

/** The value of a CSS variable, for canvases. */
export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
