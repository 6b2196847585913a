// @ts-check
// Numbers as people read them; a dash where there is none.
const missing = (value) => value === null || value === undefined || Number.isNaN(value);

export const int = (value) => (missing(value) ? "–" : Math.round(value).toLocaleString("en"));
export const num = (value, digits = 3) => (missing(value) ? "–" : Number(value).toPrecision(digits).replace(/e([+-]\d+)$/, "e$1"));
/** Of a mean log p − log q, log q − log p. */
export const negated = (value) => (missing(value) ? null : -value);
export const pct = (value) => (missing(value) ? "–" : `${(100 * value).toFixed(1)} %`);
export const time = (seconds) => (missing(seconds) || !seconds ? "–" : new Date(1000 * seconds).toLocaleString());
export const logprob = (value) => (missing(value) ? "–" : value.toFixed(3));

export function ago(seconds) {
  if (missing(seconds) || !seconds) return "–";
  const s = Date.now() / 1000 - seconds;
  if (s < 90) return `${Math.max(0, Math.round(s))} s ago`;
  if (s < 5400) return `${Math.round(s / 60)} min ago`;
  if (s < 129600) return `${Math.round(s / 3600)} h ago`;
  return `${Math.round(s / 86400)} d ago`;
}
