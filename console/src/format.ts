// Numbers, sizes and times as the console writes them.

export const DASH = "–";

export function count(value: number): string {
  if (value < 10_000) return Math.round(value).toLocaleString("en");
  if (value < 1_000_000) return `${(value / 1000).toFixed(value < 100_000 ? 1 : 0)} k`;
  return `${(value / 1_000_000).toFixed(value < 100_000_000 ? 1 : 0)} M`;
}

export function rate(value: number): string {
  return value === 0 ? "0" : value < 10 ? value.toFixed(1) : count(value);
}

export function seconds(value: number | null | undefined): string {
  if (value === null || value === undefined) return DASH;
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  return value < 100 ? `${value.toFixed(value < 10 ? 2 : 1)} s` : duration(value);
}

export function duration(value: number): string {
  if (value < 60) return `${Math.round(value)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min`;
  if (value < 86_400) return `${Math.floor(value / 3600)} h ${Math.floor((value % 3600) / 60)} min`;
  return `${Math.floor(value / 86_400)} d ${Math.floor((value % 86_400) / 3600)} h`;
}

export function bytes(value: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  let size = value;
  for (; size >= 1000 && at < units.length - 1; at++) size /= 1000;
  return `${at === 0 || size >= 100 ? Math.round(size) : size.toFixed(1)} ${units[at]}`;
}

export function percent(part: number): string {
  const value = part * 100;
  return `${value > 0 && value < 10 ? value.toFixed(1) : Math.round(value)} %`;
}

/** A moment in Unix seconds, relative to now. */
export function ago(moment: number | null): string {
  if (moment === null) return "never";
  const passed = Date.now() / 1000 - moment;
  return passed < 5 ? "just now" : `${duration(passed).split(" ").slice(0, 2).join(" ")} ago`;
}

export function moment(unix: number): string {
  return new Date(unix * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

/** The first digits of a version, as the API accepts them after `name@`. */
export function short(version: string | null): string {
  return version === null ? DASH : version.replace("sha256:", "").slice(0, 12);
}
