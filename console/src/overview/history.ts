import type { History } from "../types";

const HOUR = 3600;
type Columns = Omit<History, "interval_seconds">;

/** The known points and the newer ones, of the last hour. A server that restarted begins anew, so its gap shows. */
export function appended(known: History | null, newer: History): History {
  if (known === null) return newer;
  const from = Date.now() / 1000 - HOUR;
  const first = known.time.findIndex((time) => time >= from);
  const kept = first < 0 ? known.time.length : first;
  const names = Object.keys(newer).filter((name) => name !== "interval_seconds") as (keyof Columns)[];
  const joined = Object.fromEntries(names.map((name) => [name, [...known[name].slice(kept), ...newer[name]]]));
  return { ...(joined as unknown as Columns), interval_seconds: newer.interval_seconds };
}

/** The latest number of a column, if it is not older than a minute. */
export function last(column: (number | null)[] | undefined): number | null {
  return column?.slice(-12).findLast((value) => value !== null) ?? null;
}
