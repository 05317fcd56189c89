// The engine at work: a lane for each model, a column for each step, a cell where the model had rows in that step.
import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { count } from "../format";
import { color, repaints } from "../theme";
import { SHOWN_SECONDS, Steps, total, type Step } from "./steps";

const LANE = 24;
const MOST_LANES = 9;
const FRAME_MS = 80;
const FONT = "12px system-ui, sans-serif";

export function Lanes({ base }: { base: string }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const summary = useSignal("");
  const lanes = useSignal<string[]>([base]);
  useEffect(() => {
    const steps = new Steps();
    const stop = new AbortController();
    void steps.follow(stop.signal, () => {});
    const frame = setInterval(() => {
      if (document.hidden) return;
      const names = lanesOf(steps, base);
      if (names.join("\n") !== lanes.peek().join("\n")) lanes.value = names;
      if (canvas.current) draw(canvas.current, steps, names);
    }, FRAME_MS);
    const words = setInterval(() => (summary.value = summed(steps)), 1000);
    return () => {
      stop.abort();
      clearInterval(frame);
      clearInterval(words);
    };
  }, [base, repaints.value]);
  const height = lanes.value.length * LANE + 40;
  return (
    <section class="lanes" aria-label="Forward passes">
      <div class="labelled">
        <h2>Forward passes</h2>
        <p class="muted">{summary.value || "waiting for requests"}</p>
      </div>
      <canvas ref={canvas} style={{ height: `${height}px` }} role="img" aria-label={`Models in each forward pass of the last ${SHOWN_SECONDS} seconds. ${summary.value}`} />
      <p class="hint">
        Each column is one pass over the base model, each filled cell a model with rows in it. <b>▾</b> an adapter came to the device, <b>◆</b> its version was swapped: requests keep the one they began with.
      </p>
    </section>
  );
}

/** The base, then the models that had rows lately, in the order of their names so that lanes do not jump. */
function lanesOf(steps: Steps, base: string): string[] {
  const from = steps.now() - SHOWN_SECONDS;
  const seen = new Map<string, number>();
  for (const step of steps.steps) if (step.time > from) for (const [lane, versions] of step.rows) seen.set(lane, (seen.get(lane) ?? 0) + total(versions));
  seen.delete(base);
  const most = [...seen].sort((a, b) => b[1] - a[1]).slice(0, MOST_LANES);
  return [base, ...most.map(([lane]) => lane).sort()];
}

function summed(steps: Steps): string {
  const from = steps.now() - SHOWN_SECONDS;
  const shown = steps.steps.filter((step) => step.time > from && step.rows.size);
  if (!shown.length) return "";
  const models = new Set(shown.flatMap((step) => [...step.rows.keys()]));
  const most = Math.max(...shown.map((step) => step.rows.size));
  const tokens = shown.reduce((sum, step) => sum + rowsOf(step), 0);
  return `${count(tokens)} tokens of ${models.size} ${models.size === 1 ? "model" : "models"} in ${count(shown.length)} passes, up to ${most} in one`;
}

function draw(canvas: HTMLCanvasElement, steps: Steps, lanes: string[]): void {
  const ratio = devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== width * ratio || canvas.height !== height * ratio) Object.assign(canvas, { width: width * ratio, height: height * ratio });
  const pen = canvas.getContext("2d")!;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = FONT;
  const left = Math.min(Math.max(...lanes.map((lane) => pen.measureText(cut(lane, width)).width), 60) + 16, width * 0.4);
  const end = steps.now();
  const scale = (width - left) / SHOWN_SECONDS;
  const x = (time: number) => width - (end - time) * scale;
  backdrop(pen, lanes, left, width);
  pen.save();
  pen.beginPath();
  pen.rect(left, 0, width - left, height);
  pen.clip();
  const newer = new Set(steps.marks.map((mark) => mark.version ?? ""));
  const begun = steps.steps.findIndex((step) => step.time > end - SHOWN_SECONDS - 1);
  for (const step of begun < 0 ? [] : steps.steps.slice(begun)) cells(pen, step, lanes, newer, x, scale);
  marks(pen, steps, lanes, x);
  pen.restore();
  clock(pen, lanes.length * LANE + 16, left, width);
}

function rowsOf(step: Step): number {
  return [...step.rows.values()].reduce((sum, versions) => sum + total(versions), 0);
}

function cut(lane: string, width: number): string {
  const most = width < 600 ? 14 : 26;
  return lane.length > most ? `${lane.slice(0, most - 1)}…` : lane;
}

function backdrop(pen: CanvasRenderingContext2D, lanes: string[], left: number, width: number): void {
  pen.textBaseline = "middle";
  lanes.forEach((lane, number) => {
    const y = number * LANE;
    pen.fillStyle = color(number === 0 ? "ink" : "muted");
    pen.fillText(cut(lane, width), 0, y + LANE / 2);
    pen.fillStyle = color("line");
    pen.fillRect(left, y + LANE - 1, width - left, 1);
  });
}

/** One step: as wide as it took, and darker the more rows it had of a model, whose versions share its cell. What remains
 * of its tokens are prompts. */
function cells(pen: CanvasRenderingContext2D, step: Step, lanes: string[], newer: Set<string>, x: (time: number) => number, scale: number): void {
  const width = Math.max(step.seconds * scale - 1, 1.5);
  const from = x(step.time) - width;
  for (const [lane, versions] of step.rows) {
    const number = lanes.indexOf(lane);
    if (number < 0) continue;
    const tall = (LANE - 9) / versions.size;
    [...versions]
      .sort(([a], [b]) => Number(newer.has(a)) - Number(newer.has(b)))
      .forEach(([version, rows], place) => {
        pen.fillStyle = color(number === 0 ? "second" : newer.has(version) ? "heat-color" : "accent");
        pen.globalAlpha = Math.min(0.55 + rows * 0.15, 1);
        pen.fillRect(from, number * LANE + 4 + place * tall, width, tall);
      });
  }
  const prompt = step.tokens - rowsOf(step);
  pen.globalAlpha = 1;
  if (prompt > 0) {
    pen.fillStyle = color("second");
    const tall = Math.min(2 + prompt / 24, 9);
    pen.fillRect(from, lanes.length * LANE + 10 - tall, width, tall);
  }
}

const SIGNS = { load: "▾", evict: "▵", swap: "◆", merge: "●" };

function marks(pen: CanvasRenderingContext2D, steps: Steps, lanes: string[], x: (time: number) => number): void {
  pen.textBaseline = "middle";
  for (const mark of steps.marks) {
    const number = lanes.indexOf(mark.lane);
    if (number < 0) continue;
    pen.fillStyle = color("ink");
    if (mark.kind === "swap") pen.fillRect(x(mark.time) - 0.75, number * LANE, 1.5, LANE - 1);
    pen.fillText(SIGNS[mark.kind], x(mark.time) - 5, number * LANE + (mark.kind === "swap" ? 4 : LANE / 2));
  }
}

function clock(pen: CanvasRenderingContext2D, y: number, left: number, width: number): void {
  pen.fillStyle = color("muted");
  pen.textBaseline = "top";
  pen.fillText("prompts", 0, y - 14);
  pen.fillText(`${SHOWN_SECONDS} s ago`, left, y);
  pen.textAlign = "right";
  pen.fillText("now", width, y);
  pen.textAlign = "left";
}
