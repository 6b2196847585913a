// @ts-check
// A form made from the configuration's own schema. Only what differs from the chosen configuration is sent.
import { go } from "../app.js";
import { get, post } from "../client.js";
import { fill, h } from "../dom.js";

export async function launch(node, _parts, signal) {
  const { data: configs, json_schema: schema } = await get("/v1/configs", signal);
  const start = configs.find((c) => c.name === "quickstart") ?? configs[0];
  const base = h("select", { id: "base" }, configs.map((c) => h("option", { value: c.name, selected: c === start }, c.name)));
  const about = h("p", { class: "quiet" }), fields = h("div"), wrong = h("div", { role: "alert" });
  const runId = h("input", { id: "run-id", pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]{0,99}", placeholder: "made from name and time", autocomplete: "off" });
  const button = h("button", { class: "primary" }, "Launch"), changes = h("span", { class: "quiet", role: "status" });
  let chosen = start, inputs = new Map(), unions = new Map(), sent = { body: "", key: "" };

  function build() {
    chosen = configs.find((c) => c.name === base.value);
    about.textContent = chosen.about;
    changes.textContent = "";
    inputs = new Map();
    unions = new Map();
    const top = [], sections = [];
    for (const [name, value] of Object.entries(chosen.config)) {
      if (name === "storage") continue;
      if (isSection(value)) sections.push(section(name, value));
      else top.push(field(name, value, propertyOf(schema, schema, name)));
    }
    fill(fields, h("fieldset", {}, h("legend", {}, "run"), top), sections);
  }

  function section(path, value) {
    const body = h("fieldset", {}, h("legend", { class: "sr" }, path));
    const details = h("details", { open: OPEN.includes(path) }, h("summary", {}, path), body);
    const original = value;
    function show(now) {
      for (const known of [...inputs.keys()]) if (known.startsWith(`${path}.`)) inputs.delete(known);
      unions.delete(path);
      const union = unionAt(path);
      // What chooses the variant stands first.
      const rows = Object.entries(now).toSorted(([a], [b]) => Number(b === union?.tag) - Number(a === union?.tag)).map(([name, v]) => {
        if (name === union?.tag && union.variants.size > 1) return tagField(path, union, now, original, show);
        return isSection(v) ? section(`${path}.${name}`, v) : field(`${path}.${name}`, v, describe(path, name, now));
      });
      // Another variant is sent whole: its keys mean nothing beside those of the one it replaces.
      if (union && now !== original) unions.set(path, { tag: union.tag, name: now[union.tag] });
      fill(body, h("legend", { class: "sr" }, path), rows);
    }
    show(value);
    return details;
  }

  /** The discriminated union at a path of the schema: its tag, and each variant's defaults. */
  function unionAt(path) {
    const property = path.split(".").reduce((options, part) => options.flatMap((s) => variants(schema, propertyOf(schema, s, part))), [schema]);
    const found = property.map((variant) => [variant, Object.entries(variant.properties ?? {}).find(([, p]) => p.const !== undefined)]).filter(([, tag]) => tag);
    if (!found.length) return null;
    const tag = found[0][1][0];
    return { tag, variants: new Map(found.filter(([, [name]]) => name === tag).map(([variant, [, p]]) => [p.const, { ...defaultsOf(schema, variant), [tag]: p.const }])) };
  }

  function tagField(path, union, now, original, show) {
    const id = `field-${path}.${union.tag}`;
    const select = h("select", { id, onchange: () => { show(select.value === original[union.tag] ? original : union.variants.get(select.value)); document.getElementById(id)?.focus(); } },
      [...union.variants.keys()].map((name) => h("option", { value: name, selected: name === now[union.tag] }, name)));
    return h("div", { class: now === original ? "field" : "field changed" }, h("label", { for: id }, union.tag), select);
  }

  function describe(path, name, siblings) {
    let options = [schema];
    for (const part of path.split(".")) options = options.flatMap((s) => variants(schema, propertyOf(schema, s, part)));
    // Of a union, the variant whose fixed tag the value has.
    const fits = options.find((s) => Object.entries(s.properties ?? {}).every(([key, p]) => p.const === undefined || siblings[key] === p.const)) ?? options[0];
    return propertyOf(schema, fits, name);
  }

  function field(path, value, property = {}) {
    const id = `field-${path}`;
    const kinds = [property, ...(property.anyOf ?? [])].map((p) => resolve(schema, p));
    const options = kinds.flatMap((p) => p.enum ?? []);
    const number = kinds.find((p) => p.type === "integer" || p.type === "number");
    let input;
    if (typeof value === "boolean") input = h("input", { type: "checkbox", id, checked: value });
    else if (options.length) input = h("select", { id }, value === null && h("option", { value: "" }, "none"), options.map((o) => h("option", { value: o, selected: o === value }, o)));
    else if (number) input = h("input", { type: "number", id, step: number.type === "integer" ? "1" : "any", min: number.minimum, max: number.maximum, value: value ?? "" });
    else input = h("input", { id, value: typeof value === "string" ? value : JSON.stringify(value), readonly: property.const !== undefined });
    const read = () => {
      if (input.type === "checkbox") return input.checked;
      if (input.type === "number") return input.value === "" ? null : Number(input.value);
      if (options.length && value === null && input.value === "") return null;
      if (typeof value === "string" || options.length) return input.value;
      try { return JSON.parse(input.value); } catch { return input.value; }
    };
    const row = h("div", { class: "field" }, h("label", { for: id }, path.split(".").pop()), input, property.description && h("small", {}, prose(property.description)));
    input.addEventListener("input", () => row.classList.toggle("changed", JSON.stringify(read()) !== JSON.stringify(value)));
    inputs.set(path, { read, value });
    return row;
  }

  const form = h("form", { onsubmit: async (e) => {
    e.preventDefault();
    const overrides = {};
    const wholes = [...unions.keys()].sort((a, b) => a.length - b.length);
    for (const path of wholes) {
      const { tag, name } = unions.get(path), outer = wholes.find((prefix) => path.startsWith(`${prefix}.`));
      if (outer) put(overrides[outer], [...path.slice(outer.length + 1).split("."), tag], name);
      else overrides[path] = { [tag]: name };
    }
    for (const [path, { read, value }] of inputs) {
      const now = read();
      const whole = wholes.find((prefix) => path.startsWith(`${prefix}.`));
      if (whole) put(overrides[whole], path.slice(whole.length + 1).split("."), now);
      else if (JSON.stringify(now) !== JSON.stringify(value)) overrides[path] = now;
    }
    button.disabled = true;
    fill(wrong);
    try {
      const body = { config_name: chosen.name, overrides, ...(runId.value ? { run_id: runId.value } : {}) };
      // The same form sent again, after Prefect or the network failed, goes on with the launch it began.
      if (sent.body !== JSON.stringify(body)) sent = { body: JSON.stringify(body), key: newKey() };
      const run = await post("/v1/runs", body, { "Idempotency-Key": sent.key });
      await go(`/runs/${run.id}`);
    } catch (error) {
      fill(wrong, h("pre", {}, error.message));
      wrong.scrollIntoView({ block: "center" });
    } finally { button.disabled = false; }
  } },
    h("div", { class: "field" }, h("label", { for: "base" }, "configuration"), base), about,
    h("div", { class: "field" }, h("label", { for: "run-id" }, "run id"), runId), fields, wrong, h("div", { class: "foot row" }, button, changes));
  form.addEventListener("input", () => { const n = fields.querySelectorAll(".field.changed").length; changes.textContent = n ? `${n} changed` : ""; });
  base.addEventListener("change", build);
  fill(node, h("h1", {}, "Launch a run"), h("section", {}, form));
  build();
}

/** Random hexadecimal; crypto.randomUUID is missing where the page comes over http from another machine. */
const newKey = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
const OPEN = ["staleness", "learner", "loss"];
const put = (object, [name, ...rest], value) => { if (rest.length) put(object[name] ??= {}, rest, value); else object[name] = value; };
/** `code` of a description as code. */
const prose = (text) => text.split("`").map((part, i) => (i % 2 ? h("code", {}, part) : part));
const defaultsOf = (schema, variant) => Object.fromEntries(Object.entries(variant.properties ?? {}).map(([name, p]) => [name, p.default !== undefined ? p.default : resolve(schema, p).type === "object" ? defaultsOf(schema, resolve(schema, p)) : ""]));
const isSection = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const resolve = (schema, part) => (part?.$ref ? schema.$defs[part.$ref.split("/").pop()] : part ?? {});
const variants = (schema, part) => { const p = resolve(schema, part); return (p.oneOf ?? p.anyOf)?.map((v) => resolve(schema, v)) ?? [p]; };
function propertyOf(schema, part, name) {
  const property = resolve(schema, part)?.properties?.[name] ?? {};
  return property.$ref ? { ...resolve(schema, property), ...property, $ref: property.$ref } : property;
}
