// What the server found in an adapter's files, as facts and as the difference of two versions.
import { count } from "../format";
import type { AdapterVersion, Report } from "../types";
import { short } from "../format";

/** A report as paths and texts: nested objects become `a.b`, lists become lines. */
export function flat(report: unknown, prefix = ""): [string, string][] {
  if (Array.isArray(report)) return [[prefix, report.length ? report.map((item) => (typeof item === "object" ? JSON.stringify(item) : String(item))).join("\n") : "none"]];
  if (report === null || typeof report !== "object") return [[prefix, String(report)]];
  return Object.entries(report).flatMap(([name, value]) => flat(value, prefix ? `${prefix}.${name}` : name));
}

function written(text: string): string {
  const number = Number(text);
  if (text === "" || Number.isNaN(number)) return text;
  return Number.isInteger(number) ? count(number) : number.toPrecision(3);
}

export function Facts({ report, rank }: { report: Report; rank?: number | null }) {
  const facts = flat(report);
  if (rank !== null && rank !== undefined) facts.unshift(["rank", String(rank)]);
  return (
    <dl class="facts">
      {facts.map(([name, value]) => (
        <div key={name}>
          <dt>{name.replaceAll("_", " ")}</dt>
          <dd>{written(value)}</dd>
        </div>
      ))}
    </dl>
  );
}

function described(version: AdapterVersion): Map<string, string> {
  const { rank, bytes, target_modules } = version;
  return new Map([["rank", String(rank)], ["bytes", String(bytes)], ["target modules", (target_modules ?? []).join("\n")], ...flat(version.report)]);
}

/** Two versions beside each other; what is equal is left out unless all is. */
export function Difference({ older, newer }: { older: AdapterVersion; newer: AdapterVersion }) {
  if (!older.report || !newer.report) return <p class="muted">One of them is no longer stored, so that there is nothing to compare.</p>;
  const [before, after] = [described(older), described(newer)];
  const names = [...new Set([...before.keys(), ...after.keys()])];
  const changed = names.filter((name) => before.get(name) !== after.get(name));
  if (!changed.length) return <p class="muted">Their reports are equal: {names.length} facts.</p>;
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label="Difference of the reports">
      <table class="difference">
        <caption class="sr-only">
          Difference between {short(older.version)} and {short(newer.version)}
        </caption>
        <thead>
          <tr>
            <th scope="col">fact</th>
            <th scope="col">{short(older.version)}</th>
            <th scope="col">{short(newer.version)}</th>
          </tr>
        </thead>
        <tbody>
          {changed.map((name) => (
            <tr key={name}>
              <th scope="row">{name.replaceAll("_", " ")}</th>
              <td class="old">{written(before.get(name) ?? "none")}</td>
              <td class="new">{written(after.get(name) ?? "none")}</td>
            </tr>
          ))}
        </tbody>
      </table>
      <p class="hint">{names.length - changed.length} other facts are equal.</p>
    </div>
  );
}
