import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { DASH } from "../format";
import { color, repaints } from "../theme";

const HEIGHT = 112;
const HOUR = 3600;
const LEAST = 300; // seconds that a plot shows of a server that has just started
const now = () => Date.now() / 1000;

interface Shape {
  title: string;
  unit: (value: number) => string;
  time: number[];
  lines: Record<string, (number | null)[]>;
  top?: number;
}

/** A plot of the last hour. Its legend has the latest values, or those under the pointer. */
export function Plot({ title, unit, time, lines, top }: Shape) {
  const box = useRef<HTMLDivElement>(null);
  const drawn = useRef<uPlot | null>(null);
  const at = useSignal<number | null>(null);
  const names = Object.keys(lines);
  const data = [time, ...Object.values(lines)] as uPlot.AlignedData;

  useEffect(() => {
    const place = box.current!;
    const plot = new uPlot(optionsFor(names, unit, top, place.clientWidth, (index) => (at.value = index)), data, place);
    drawn.current = plot;
    const resized = new ResizeObserver(() => plot.setSize({ width: place.clientWidth, height: HEIGHT }));
    resized.observe(place);
    return () => {
      resized.disconnect();
      plot.destroy();
    };
  }, [names.join(), repaints.value]);
  useEffect(() => drawn.current?.setData(data), [time]);

  const shown = at.value !== null && at.value < time.length ? at.value : time.length - 1;
  const clock = at.value === null || time[shown] === undefined ? "" : new Date(time[shown] * 1000).toLocaleTimeString([], { hourCycle: "h23" });
  return (
    <figure class="plot">
      <figcaption>
        <span class="plot-title">{title}</span>
        {clock && <span class="muted">{clock}</span>}
        <span class="legend">
          {names.map((name, line) => (
            <span key={name} class={line === 0 ? "first" : "second"}>
              <i aria-hidden="true" />
              {name} <b>{written(lines[name]![shown], unit)}</b>
            </span>
          ))}
        </span>
      </figcaption>
      <div ref={box} class="canvas" role="img" aria-label={`${title} over the last hour`} style={{ height: `${HEIGHT}px` }} />
    </figure>
  );
}

function written(value: number | null | undefined, unit: (value: number) => string): string {
  return value === null || value === undefined ? DASH : unit(value);
}

function optionsFor(names: string[], unit: (value: number) => string, top: number | undefined, width: number, hover: (index: number | null) => void): uPlot.Options {
  const ink = color("muted");
  const line = color("line");
  const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
    padding: [8, 8, 0, 0],
    scales: {
      x: { time: true, range: (_, first) => [Math.min(Math.max(first ?? now(), now() - HOUR), now() - LEAST), now()] },
      y: { range: (_, __, most) => [0, top ?? Math.max(most * 1.15, 1e-9)] },
    },
    axes: [
      { ...axis, grid: { show: false }, size: 22, space: 70, values: (_, marks) => marks.map((mark) => new Date(mark * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hourCycle: "h23" })) },
      { ...axis, size: 56, space: 34, values: (_, marks) => marks.map((mark) => (mark === 0 ? "0" : unit(mark))) },
    ],
    series: [
      {},
      ...names.map((label, number) => ({
        label,
        stroke: number === 0 ? color("accent") : color("second"),
        width: number === 0 ? 1.75 : 1.25,
        fill: number === 0 ? color("accent-wash") : undefined,
        points: { show: false },
        spanGaps: false,
      })),
    ],
    hooks: { setCursor: [(plot) => hover(plot.cursor.left === undefined || plot.cursor.left < 0 ? null : (plot.cursor.idx ?? null))] },
  };
}
