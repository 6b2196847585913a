// @ts-check
// Numbers as people read them; a dash where there is none.
const missing = (value) => value === null || value === undefined || Number.isNaN(value);

export const int = (value) => (missing(value) ? "–" : Math.round(value).toLocaleString("en"));
export const num = (value, digits = 3) => (missing(value) ? "–" : Number(value).toPrecision(digits).replace(/e([+-]\d+)$/, "e$1"));
/** Of a mean log p − log q, log q − log p. */
export const negated = (value) => (missing(value) ? null : -value);
export const pct = (value) => (missing(value) ? "–" : `${(100 * value).toFixed(1)} %`);
/** Tokens per second: never 0 while something is made. */
export const rate = (value) => (missing(value) || value >= 9.5 ? int(value) : num(value, 2));
export const time = (seconds) => (missing(seconds) || !seconds ? "–" : new Date(1000 * seconds).toLocaleString());
export const logprob = (value) => (missing(value) ? "–" : value.toFixed(3));

export function span(s) {
  if (missing(s)) return "–";
  if (s < 90) return `${Math.max(0, Math.round(s))} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  if (s < 129600) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86400)} d`;
}

export const ago = (seconds) => (missing(seconds) || !seconds ? "–" : `${span(Date.now() / 1000 - seconds)} ago`);
