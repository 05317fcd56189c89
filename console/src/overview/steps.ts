// The engine's steps of the last seconds, from `/v1/trace`.
import { linesOf, open } from "../api";

export interface Step {
  time: number; // seconds since the trace began, when the step had ended
  seconds: number;
  tokens: number;
  rows: Map<string, Map<string, number>>; // by model, and by version
}

export interface Mark {
  time: number;
  lane: string;
  kind: "load" | "evict" | "swap" | "merge";
  version?: string;
}

export function total(versions: Map<string, number>): number {
  return [...versions.values()].reduce((sum, rows) => sum + rows, 0);
}

export const SHOWN_SECONDS = 12;
const TRACE_SECONDS = 3600;
const RETRY_MS = 2000;

/** What has been traced, changed in place: a step comes dozens of times per second. */
export class Steps {
  steps: Step[] = [];
  marks: Mark[] = [];
  /** When the page's clock said so, the trace's said 0. */
  began = 0;
  base = "";
  private versions = new Map<string, Set<string>>();

  /** Follows the server's trace, again and again, until it is stopped. */
  async follow(stop: AbortSignal, told: () => void): Promise<void> {
    while (!stop.aborted) {
      try {
        for await (const line of linesOf(await open(`/v1/trace?seconds=${TRACE_SECONDS}`, { signal: stop }))) {
          this.take(JSON.parse(line));
          told();
        }
      } catch {
        if (!stop.aborted) await new Promise((done) => setTimeout(done, RETRY_MS));
      }
    }
  }

  now(): number {
    return performance.now() / 1000 - this.began;
  }

  private take(line: any): void {
    if (line.kind === "run") {
      Object.assign(this, { steps: [], marks: [], versions: new Map(), began: performance.now() / 1000, base: line.base_model });
    } else if (line.kind === "step") {
      this.steps.push({ time: line.time, seconds: line.seconds, tokens: line.tokens, rows: this.rowsOf(line) });
    } else if (line.kind === "move" && line.outcome === "ok") {
      const up = line.to === "device";
      if (up || line.from === "device") this.marks.push({ time: line.time, lane: line.adapter, kind: up ? "load" : "evict" });
    } else if (line.kind === "merge") {
      this.marks.push({ time: line.time, lane: line.adapter, kind: "merge" });
    }
    this.forget();
  }

  private rowsOf(line: { time: number; seconds: number; rows: Record<string, number> }): Step["rows"] {
    const rows: Step["rows"] = new Map();
    for (const [model, number] of Object.entries(line.rows)) {
      const [lane = "", version = ""] = model.split("@");
      const known = this.versions.get(lane) ?? new Set();
      if (known.size && !known.has(version)) this.marks.push({ time: line.time - line.seconds, lane, kind: "swap", version });
      this.versions.set(lane, known.add(version));
      rows.set(lane, (rows.get(lane) ?? new Map()).set(version, number));
    }
    return rows;
  }

  private forget(): void {
    const from = this.now() - SHOWN_SECONDS - 1;
    const first = this.steps.findIndex((step) => step.time > from);
    if (first > 64) this.steps.splice(0, first);
    this.marks = this.marks.filter((mark) => mark.time > from);
  }
}
